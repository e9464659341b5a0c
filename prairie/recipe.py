"""A run is a file: named stages with typed keys, read from YAML, changed by `key=value`, hashed.

    name: tiny
    params: {data: null}
    stages:
      chats: {kind: prepare, source: file, path: "${data}"}
      sft:   {kind: train, objective: causal_lm, start: base, data: chats, epochs: 3}

A stage names the stages it needs by their names; `Recipe.order()` is the order in which they run. A key that does not
exist is an error that names the nearest one. Not here: what a stage does (`pipeline/`, `flywheel/`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prairie.errors import RecipeError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class _Stage(_Strict):
    """What every stage has: a kind, and the stages it reads."""

    gives: ClassVar[str] = ""
    """What it leaves to others: rows, tokenizer, model, server, or nothing."""

    def wants(self) -> list[tuple[str, str]]:
        """Names of the stages that this one needs, each with what that one must give (empty: whatever it gives)."""
        return []

    def reads(self) -> list[str]:
        """Names of the stages that this one needs."""
        return [name for name, _ in self.wants()]


class Prepare(_Stage):
    """Text, conversations or preferences, cleaned and split, from the interpreter, from tasks or from a file."""

    gives: ClassVar[str] = "rows"
    kind: Literal["prepare"]
    source: Literal["interpreter", "tasks", "file"]
    megabytes: float = Field(8.0, gt=0)
    """interpreter: how much text to take."""
    tasks: list[str] = []
    """tasks: which of `tasks/`."""
    rows: int = Field(2000, gt=0)
    """tasks: training conversations of each task."""
    wordings: list[str] = []
    """tasks: how the answers are worded; empty = all wordings evenly."""
    path: str | None = None
    """file: JSONL, JSON, .gz, Parquet or text."""
    want: Literal["text", "chat", "preference"] | None = None
    """file: what the rows shall be read as; empty = as they are."""
    format: str | None = None
    """file: the name of a format, when the detected one is wrong."""
    limit: int | None = Field(None, gt=0)
    """file: at most so many rows."""
    held_out: float = Field(0.05, ge=0, lt=1)
    """Share of the rows kept for judging, chosen by the hash of the row."""
    max_refused: float = Field(0.5, ge=0, le=1)
    """A larger share of refused rows stops the run."""

    @model_validator(mode="after")
    def _needs(self) -> Prepare:
        if self.source == "file" and not self.path:
            raise ValueError("source `file` needs `path`")
        if self.source == "tasks" and not self.tasks:
            raise ValueError("source `tasks` needs `tasks`")
        return self


class TrainTokenizer(_Stage):
    """A byte-level BPE over the training rows of the named stages."""

    gives: ClassVar[str] = "tokenizer"
    kind: Literal["tokenizer"]
    data: list[str]
    vocab_size: int = Field(2048, ge=260)
    template: str = "chatml"

    def wants(self) -> list[tuple[str, str]]:
        return [(name, "rows") for name in self.data]


class Import(_Stage):
    """An open model from a Hugging Face folder."""

    gives: ClassVar[str] = "model"
    kind: Literal["import"]
    path: str
    template: str | None = None
    """A built-in chat template instead of the model's own."""


class Shape(_Strict):
    """The size of a new Llama-shaped model. `depth` alone is enough: width = 32 x depth, heads of 32."""

    depth: int = Field(4, gt=0)
    dim: int | None = Field(None, gt=0)
    heads: int | None = Field(None, gt=0)
    kv_heads: int | None = Field(None, gt=0)
    ffn_dim: int | None = Field(None, gt=0)
    context: int = Field(512, gt=0)


class AdapterShape(_Strict):
    """A LoRA (arXiv 2106.09685)."""

    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = "all-linear"
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732)."""
    dora: bool = False
    """Learn the lengths of the weights' rows apart from their directions (arXiv 2402.09353)."""
    stack: bool = False
    """If the start is an adapter: a new one on top of it, instead of going on with it."""


class HeldOut(_Strict):
    """Evaluations on held-out rows and tasks while a model learns."""

    every: int = Field(50, gt=0)
    """Steps between them; there is one more at the end."""
    tasks: list[str] = []
    """Tasks whose held-out items are answered greedily and checked, beside the loss on the sources' held-out rows."""
    items: int = Field(40, gt=0)
    """Held-out items of each task."""
    max_tokens: int = Field(48, gt=0)
    by: Literal["loss", "accuracy"] = "loss"
    """Which one is the best: that of the lowest held-out loss, or of the highest accuracy of tasks (without tasks: of
    pairs or classes)."""
    keep_best: bool = False
    """The weights of the best evaluation are kept, not the last ones."""
    patience: int = Field(0, ge=0)
    """Evaluations without a better one after which the training ends; 0 = it goes on to its last step."""


class Learning(_Strict):
    """The keys that every training has, whoever starts it."""

    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0)
    tokens_per_batch: int = Field(4096, gt=0)
    micro_batches: int = Field(1, gt=0)
    lr: float = Field(1e-3, gt=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon needs far fewer tokens on small models; it is for whole models, an adapter takes adamw."""
    muon_lr: float = Field(0.02, gt=0)
    """muon: the rate of the matrices inside the blocks; `lr` is that of everything else."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises from zero."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    activation_checkpointing: bool = False
    """Layers are computed again for their gradient: a third more time, far less memory, the same result."""
    shard: bool = Field(False, exclude=True)
    """Processes that share the training (torchrun) keep a part of the weights, gradients and moments each (FSDP2, arXiv
    2304.11277): for whole models by adamw; how it is made, not what, so not part of the product's name."""
    max_tokens: int = Field(256, gt=1)
    """Longest row."""
    on_long: Literal["refuse", "truncate"] = "refuse"
    max_refused: float = Field(0.5, ge=0, le=1)
    """A larger share of rows that cannot be learnt from (too long, nothing supervised) stops the run."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """auto: bfloat16 where this machine multiplies it clearly faster than float32; the log says which."""
    evaluation: HeldOut | None = None
    track: Literal["tensorboard", "mlflow"] | None = Field(None, exclude=True)
    """Who follows the run beside metrics.jsonl; not part of what the product is, so not of its name."""
    adapter: AdapterShape | None = None
    quantize: Literal["nf4", "int8", "int4"] | None = None
    """An adapter learns on a base that is kept in this form (QLoRA, arXiv 2305.14314)."""
    beta: float = Field(0.1, gt=0)
    """dpo, kto: the pull towards the reference."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """dpo: which member of the family."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """dpo: the share of pairs taken to be the wrong way round."""
    sft_weight: float = Field(0.0, ge=0)
    """dpo: how much of the chosen answer's own loss is added."""
    desirable_weight: float = Field(1.0, gt=0)
    """kto: how much an answer that people liked counts."""
    undesirable_weight: float = Field(1.0, gt=0)
    """kto: how much one that they did not like counts."""

    @model_validator(mode="after")
    def _length(self) -> Learning:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give `epochs` or `steps`, one of them")
        if self.adapter is not None and self.optimizer == "muon":
            raise ValueError("`optimizer: muon` trains whole models, an adapter takes adamw")
        if self.shard and (self.adapter is not None or self.optimizer == "muon"):
            raise ValueError("`shard` is for whole models by `optimizer: adamw`: leave it, or `adapter` and muon, out")
        return self


class Train(_Stage, Learning):
    """A model or an adapter from data: causal_lm on text or conversations, dpo (arXiv 2305.18290) and reward (arXiv
    2203.02155) on preferences, kto (arXiv 2402.01306) on answers with a label, classification on labelled texts,
    masked_lm (arXiv 1810.04805) on text, seq2seq (arXiv 1910.10683) on questions with answers."""

    gives: ClassVar[str] = "model"
    kind: Literal["train"]
    objective: Literal["causal_lm", "dpo", "kto", "reward", "classification", "masked_lm", "seq2seq"] = "causal_lm"
    data: str | list[str]
    start: str | None = None
    """The stage whose model is trained on; none = a new model of `shape` with the tokenizer of stage `tokenizer`."""
    tokenizer: str | None = None
    shape: Shape | None = None
    together: str | None = None
    """A name that several stages give: their adapters, on the model of one `start`, are trained in the same steps."""

    @model_validator(mode="after")
    def _origin(self) -> Train:
        if self.start is None and (self.tokenizer is None or self.shape is None):
            raise ValueError("give `start`, or `tokenizer` and `shape` for a new model")
        if self.start is not None and self.shape is not None:
            raise ValueError("`shape` is for a new model and does not go with `start`")
        if self.start is None and self.adapter is not None:
            raise ValueError("an adapter needs `start`, the model it stands on")
        if self.together and (self.adapter is None or self.objective not in ("causal_lm", "dpo")):
            raise ValueError("`together` is for adapters, of `objective` causal_lm or dpo")
        if self.shard and self.objective == "seq2seq":
            raise ValueError("`shard` is for decoders and encoders, not for `objective: seq2seq`")
        watch = self.evaluation
        counted = self.objective in ("dpo", "kto", "reward", "classification")
        if watch and watch.by == "accuracy" and not watch.tasks and not counted:
            raise ValueError("`evaluation.by: accuracy` needs `evaluation.tasks`")
        if watch and watch.tasks and self.objective in ("reward", "classification", "masked_lm", "seq2seq"):
            raise ValueError(f"a model of `objective: {self.objective}` answers no `evaluation.tasks`")
        return self

    def sources(self) -> list[str]:
        """The stages that give the rows."""
        return [self.data] if isinstance(self.data, str) else self.data

    def wants(self) -> list[tuple[str, str]]:
        origin = [(self.start, "model"), (self.tokenizer, "tokenizer")]
        return [(name, what) for name, what in origin if name] + [(name, "rows") for name in self.sources()]


class Sample(_Stage):
    """Preferences from a model's own answers: a right one over a wrong one, as the tasks' checks say."""

    gives: ClassVar[str] = "rows"
    kind: Literal["sample"]
    model: str
    tasks: list[str]
    prompts: int = Field(200, gt=0)
    """Training prompts of each task."""
    answers: int = Field(4, gt=1)
    """Answers sampled for each prompt."""
    temperature: float = Field(1.0, gt=0)
    max_tokens: int = Field(48, gt=0)
    pairs_per_prompt: int = Field(2, gt=0)

    def wants(self) -> list[tuple[str, str]]:
        return [(self.model, "model")]


class Evaluate(_Stage):
    """Held-out task accuracy with intervals, held-out loss and held-out preference accuracy, for some models."""

    kind: Literal["evaluate"]
    models: list[str]
    tasks: list[str] = []
    items: int = Field(100, gt=0)
    """Held-out items of each task."""
    samples: int = Field(0, ge=0)
    """Answers to each item sampled at temperature 1 as well; their accuracy over all tasks is one figure."""
    max_tokens: int = Field(48, gt=0)
    text: list[str] = []
    """Stages whose held-out rows are scored by loss: text as bits per byte, conversations as loss per answer token."""
    preferences: list[str] = []
    """Stages whose held-out pairs are scored by the share where the chosen answer is likelier than at `reference`."""
    reference: str | None = None
    row_tokens: int = Field(256, gt=1)

    def wants(self) -> list[tuple[str, str]]:
        models = [(name, "model") for name in self.models]
        rows = [(name, "rows") for name in (*self.text, *self.preferences)]
        return [*models, *rows, *([(self.reference, "model")] if self.reference else [])]


class Publish(_Stage):
    """Registers a model as a version of a line and makes it the line's champion."""

    gives: ClassVar[str] = "model"
    kind: Literal["publish"]
    line: str
    model: str

    def wants(self) -> list[tuple[str, str]]:
        return [(self.model, "model")]


class Serve(_Stage):
    """Starts the server for the stages that follow; it stays open at the end unless told otherwise."""

    gives: ClassVar[str] = "server"
    kind: Literal["serve"]
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, lt=65536)
    """0 takes any free port."""
    after: list[str] = []
    """The stages that must have been published first."""

    def wants(self) -> list[tuple[str, str]]:
        return [(name, "") for name in self.after]


class Users(_Strict):
    """Simulated people. Their hidden preference decides their votes; training never sees it."""

    count: int = Field(24, gt=0)
    prompts: int = Field(12, gt=0)
    """Questions that each asks."""
    noise: float = Field(0.1, ge=0, le=1)
    """Share of votes cast by a coin."""
    poisoned: float = Field(0.0, ge=0, le=1)
    """Share of users who vote at random or against."""
    preference: str = "sentence"
    """The wording that they like best among right answers."""


class GateRules(_Strict):
    """When a candidate is promoted."""

    users: int = Field(200, gt=1)
    """The most held-out users who compare candidate and champion; fewer when the verdict is certain before. With 8
    prompts each, 192 find a candidate that truly wins 55% in at least 80% of turns."""
    prompts: int = Field(8, gt=0)
    """Held-out questions that each compares; where a model judges, pairs of answers to each question."""
    temperature: float = Field(1.0, ge=0, le=2)
    """Of the answers that are compared: what people are served with."""
    margin: float = Field(0.05, ge=0, lt=1)
    """The most that a task's accuracy may fall, beyond its noise."""
    items: int = Field(60, gt=0)
    """Held-out items of each task in the frozen suite."""


class Replay(_Strict):
    """Earlier conversations that a candidate goes over again, as supervised rows, while it learns from votes."""

    share: float = Field(1.0, gt=0)
    """How many for each row of votes, in each epoch."""
    weight: float = Field(1.0, gt=0)
    """What the loss of one, averaged over its tokens, counts."""
    sources: list[Literal["data", "votes"]] = Field(["data"], min_length=1)
    """data: what the stages before the champion were trained on; votes: what people preferred in earlier turns."""


class VoteLearning(Learning):
    """How a candidate learns from votes."""

    objective: Literal["dpo", "kto"] = "dpo"
    """dpo: from answers preferred to others; kto: from thumbs, one answer at a time."""
    replay: Replay | None = None
    """Earlier data that is mixed in, so that old skills stay."""


class Turn(_Stage):
    """One turn of the wheel: people vote, a candidate learns, the gate judges, the champion changes or stays."""

    gives: ClassVar[str] = "model"
    kind: Literal["turn"]
    line: str
    start: str
    """The stage that made the champion: a publish or an earlier turn."""
    server: str
    tasks: list[str]
    users: Users = Users()
    learn: VoteLearning
    gate: GateRules = GateRules()

    def wants(self) -> list[tuple[str, str]]:
        return [(self.start, "model"), (self.server, "server")]


class NewTower(_Stage):
    """A convolutional net for Go on boards of one size, which knows nothing yet or what it learned on another size."""

    gives: ClassVar[str] = "model"
    kind: Literal["tower"]
    size: int = Field(ge=2, le=19)
    """Lines of the board."""
    blocks: int = Field(4, gt=0)
    width: int = Field(32, ge=8)
    """Channels of the trunk."""
    start: str | None = None
    """A stage whose net goes on with this board; its blocks and width are its own."""

    def wants(self) -> list[tuple[str, str]]:
        return [(self.start, "model")] if self.start else []

    @model_validator(mode="after")
    def _shape(self) -> NewTower:
        if self.start and {"blocks", "width"} & self.model_fields_set:
            raise ValueError("leave `blocks` and `width` out where a net goes on from `start`: it has its own")
        return self


class GoGames(_Stage):
    """Games of others as positions: records in SGF, or an engine that plays itself over GTP."""

    gives: ClassVar[str] = "positions"
    kind: Literal["games"]
    size: int = Field(ge=2, le=19)
    """Lines of the board; games on others are left out, counted."""
    path: str | None = None
    """An SGF file, a folder or a zip of them."""
    engine: str | None = None
    """The command of an engine, as `gnugo --mode gtp --chinese-rules --never-resign`."""
    games: int = Field(200, gt=0)
    """engine: how many games."""
    komi: float = 0.5
    """engine: of each game."""
    opening_moves: int = Field(3, ge=0)
    """engine: random moves at the beginning, so that no two games are alike."""

    @model_validator(mode="after")
    def _origin(self) -> GoGames:
        if (self.path is None) == (self.engine is None):
            raise ValueError("give `path` or `engine`, one of them")
        return self


class Imitate(_Stage):
    """A net that learns to play as recorded games were played: the start of a line that need not begin from nothing."""

    gives: ClassVar[str] = "model"
    kind: Literal["imitate"]
    start: str
    """The stage whose net is trained."""
    games: list[str]
    """Stages that give positions."""
    epochs: float = Field(6.0, gt=0)
    batch: int = Field(128, gt=0)
    lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.03, ge=0)

    def wants(self) -> list[tuple[str, str]]:
        return [(self.start, "model"), *((name, "positions") for name in self.games)]


class GoPlay(_Strict):
    """How a net plays itself."""

    games: int = Field(192, gt=0)
    """Games of a turn."""
    visits: int = Field(64, ge=4)
    """Of a move that becomes a row."""
    fast_visits: int = Field(12, ge=2)
    """Of the others."""
    full_share: float = Field(0.3, gt=0, le=1)
    """Share of the moves that become rows (playout-cap randomisation, arXiv 1902.10565)."""
    gumbel: int = Field(0, ge=0)
    """Moves that a search's root considers, halved in turn: for few visits (Danihelka et al., ICLR 2022); 0: PUCT."""
    slots: int = Field(64, gt=0)
    """Games at the same time, which is the net's batch."""
    komi_spread: float = Field(3.0, ge=0)
    """Standard deviation of komi around the mean score of the turn before."""
    temperature: float = Field(1.0, ge=0)
    """Of the first moves; it halves every `size` moves."""
    opening_moves: int = Field(0, ge=0)
    """Each game begins with 0 to so many random moves."""
    play_out: bool = False
    """Nobody passes while there is anything to play but own eyes: games end without dead stones."""
    decided: float = Field(1.0, gt=0, le=1)
    """From this value of the search on, four searches in a row, a game is ended with four visits a move (1: never)."""
    score_weight: float = Field(0.1, ge=0, lt=1)
    """How much of a value in the search is points instead of winning; with more of it dead stones are taken."""
    score_reach: float = Field(1.0, gt=0)
    """The lead, in widths of the board, from which more points begin to count less."""


class GoLearning(_Strict):
    """How a candidate is trained on positions."""

    passes: float = Field(4.0, gt=0)
    """Training passes for each new row: the steps of a turn are this many times its rows, over `batch`."""
    window: int = Field(8, gt=0)
    """Turns whose positions are drawn from."""
    batch: int = Field(128, gt=0)
    lr: float = Field(2e-3, gt=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "constant"
    weight_decay: float = Field(0.03, ge=0)
    owner: float = Field(0.15, ge=0)
    """Weight of the ownership in the loss; the policy's is 1."""
    begin: Literal["champion", "newest"] = "champion"
    """Whose weights a candidate begins from: the champion's, or the last candidate's, refused or not."""


class GoMatch(_Strict):
    """The match that a candidate must win."""

    games: int = Field(480, ge=12, multiple_of=2)
    """At most; the sequential test ends most matches much sooner."""
    visits: int = Field(12, ge=2)
    opening_moves: int = Field(3, ge=0)
    """Random moves at the beginning; each opening is played twice, with colours exchanged."""
    wanted: float = Field(0.6, gt=0.5, lt=1)
    """The win rate worth finding (0.6 is 70 Elo): the match is given up once less is certain."""


class GoTurns(_Stage):
    """Turns of a Go line's wheel: self-play, a candidate, a match, promotion or not."""

    gives: ClassVar[str] = "model"
    kind: Literal["selfplay"]
    line: str
    start: str
    """The stage that made the champion: a publish or earlier turns."""
    turns: int = Field(10, gt=0)
    play: GoPlay = GoPlay()
    learn: GoLearning = GoLearning()
    match: GoMatch = GoMatch()

    def wants(self) -> list[tuple[str, str]]:
        return [(self.start, "model")]


class Report(_Stage):
    """`report.html`: every figure, plots, samples, lineage."""

    kind: Literal["report"]
    of: list[str]
    samples: int = Field(12, ge=0)

    def wants(self) -> list[tuple[str, str]]:
        return [(name, "") for name in self.of]


Stage = Annotated[
    Prepare
    | TrainTokenizer
    | Import
    | Train
    | Sample
    | Evaluate
    | Publish
    | Serve
    | Turn
    | NewTower
    | GoGames
    | Imitate
    | GoTurns
    | Report,
    Field(discriminator="kind"),
]
KINDS: dict[str, type[_Stage]] = {
    "prepare": Prepare,
    "tokenizer": TrainTokenizer,
    "import": Import,
    "train": Train,
    "sample": Sample,
    "evaluate": Evaluate,
    "publish": Publish,
    "serve": Serve,
    "turn": Turn,
    "tower": NewTower,
    "games": GoGames,
    "imitate": Imitate,
    "selfplay": GoTurns,
    "report": Report,
}
AnyStage = (
    Prepare | TrainTokenizer | Import | Train | Sample | Evaluate | Publish | Serve | Turn | NewTower | GoGames
    | Imitate | GoTurns | Report
)  # fmt: skip


_ARTICLES = {
    "rows": "rows", "tokenizer": "a tokenizer", "model": "a model", "positions": "positions", "server": "a server",
}  # fmt: skip


class Recipe(_Strict):
    """A whole run. `params` are the knobs a user is meant to turn; `${name}` in a stage stands for one."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    about: str = ""
    seed: int = 0
    params: dict[str, Any] = {}
    stages: dict[str, Stage]

    def order(self) -> list[str]:
        """Stage names so that each comes after those it reads, otherwise as written.

        Raises RecipeError on a circle, on an unknown stage and on one that does not give what is read from it.
        """
        done: list[str] = []
        waiting: list[str] = []

        def visit(name: str, asked_by: str) -> None:
            if name in done:
                return
            if name not in self.stages:
                raise RecipeError(
                    f"stage `{asked_by}` of recipe `{self.name}` reads an unknown stage",
                    got=f"`{name}`",
                    wanted=_known(name, self.stages),
                )
            if name in waiting:
                raise RecipeError(
                    f"stages of recipe `{self.name}` wait for each other", got=" -> ".join([*waiting, name])
                )
            waiting.append(name)
            for beside in self.together(name):
                for read, what in self.stages[beside].wants():
                    visit(read, beside)
                    self._check_gives(read, what, beside)
            waiting.pop()
            done.append(name)

        for name in self.stages:
            visit(name, name)
        return done

    def together(self, name: str) -> list[str]:
        """Names of the stages that are carried out in the same steps as this one, itself among them.

        Raises RecipeError if they do not stand on one model or do not compute in one dtype.
        """
        stage = self.stages[name]
        group = stage.together if isinstance(stage, Train) else None
        if not group:
            return [name]
        found = {other: s for other, s in self.stages.items() if isinstance(s, Train) and s.together == group}
        for key in ("start", "dtype"):
            values = {str(getattr(other, key)) for other in found.values()}
            if len(values) > 1:
                raise RecipeError(
                    f"the stages of `together: {group}` in recipe `{self.name}` differ in `{key}`",
                    got=", ".join(sorted(values)), wanted=f"one {key}",
                )  # fmt: skip
        return list(found)

    def _check_gives(self, read: str, what: str, asked_by: str) -> None:
        if what and self.stages[read].gives != what:
            fit = [name for name, stage in self.stages.items() if stage.gives == what and name != asked_by]
            raise RecipeError(
                f"stage `{asked_by}` of recipe `{self.name}` needs a stage that gives {_ARTICLES[what]}",
                got=f"`{read}`, a `{self.stages[read].kind}`",
                wanted=_known(read, fit),
            )

    def hash(self) -> str:
        """sha256 of the resolved recipe."""
        return hashlib.sha256(canonical(self.model_dump(mode="json", by_alias=True)).encode()).hexdigest()


def canonical(value: Any) -> str:
    """JSON that is equal for equal values: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies `key=value` overrides.

    Raises RecipeError: no such file, not YAML, an unknown key, a value of the wrong type, a `${param}` without a value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError("no such recipe", got=str(path), wanted="a YAML file of stages") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read", got=str(error)) from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not YAML", got=" ".join(str(error).split())) from None
    return resolve_recipe(tree, overrides, where=str(path))


def resolve_recipe(tree: object, overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """A recipe from parsed YAML. Raises RecipeError as `load_recipe` does."""
    if not isinstance(tree, dict) or not isinstance(tree.get("stages"), dict):
        raise RecipeError(
            f"{where} is not a recipe", got=type(tree).__name__, wanted="a mapping with `name` and `stages`"
        )
    for override in overrides:
        _apply(tree, override, where)
    params = tree.get("params") or {}
    for name, stage in tree["stages"].items():
        if not isinstance(stage, dict) or stage.get("kind") not in KINDS:
            kind = stage.get("kind") if isinstance(stage, dict) else stage
            raise RecipeError(
                f"{where}: stage `{name}` has an unknown kind", got=repr(kind), wanted=_known(str(kind), KINDS)
            )
    tree = {**tree, "stages": _substitute(tree["stages"], params, where)}
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_first(error, tree)}") from None


def _apply(tree: dict[str, Any], override: str, where: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError("an override is not `key=value`", got=repr(override), wanted="for example sft.lr=0.001")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text
    path = key.split(".")
    top: dict[str, Any]
    if len(path) == 1 and path[0] in ("name", "seed", "about"):
        top = tree
    elif len(path) == 1:
        top = tree.setdefault("params", {})
        if path[0] not in top:
            raise RecipeError(f"{where}: no parameter `{key}`", wanted=_known(key, [*top, "seed", "name"]))
    else:
        top = tree["stages"]
        if path[0] not in top:
            raise RecipeError(f"{where}: no stage `{path[0]}`", wanted=_known(path[0], top))
    for part in path[:-1]:
        below = top.setdefault(part, {})
        if not isinstance(below, dict):
            raise RecipeError(f"{where}: `{key}` goes through a value that has no keys", got=repr(below))
        top = below
    top[path[-1]] = value


def _substitute(value: Any, params: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, dict):
        return {k: _substitute(v, params, where) for k, v in value.items()}
    if isinstance(value, list):
        return [_substitute(v, params, where) for v in value]
    if not isinstance(value, str):
        return value
    whole = re.fullmatch(r"\$\{(\w+)\}", value)
    if whole:
        return _param(whole[1], params, where)
    return re.sub(r"\$\{(\w+)\}", lambda m: str(_param(m[1], params, where)), value)


def _param(name: str, params: Mapping[str, Any], where: str) -> Any:
    if name not in params:
        raise RecipeError(f"{where}: `${{{name}}}` is not a parameter", wanted=_known(name, params))
    if params[name] is None:
        raise RecipeError(f"{where} needs a value for `{name}`", mend=f"add {name}=VALUE to the command")
    return params[name]


def _known(name: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listing = "one of " + ", ".join(f"`{n}`" for n in names) if names else "nothing, there are none"
    return listing + (f" (did you mean `{near[0]}`?)" if near else "")


def _first(error: ValidationError, tree: dict[str, Any]) -> str:
    """The first complaint of pydantic as one sentence of ours."""
    fault = error.errors()[0]
    where = [str(part) for part in fault["loc"]]
    if where[:1] == ["stages"]:
        kind = where[2] if len(where) > 2 and where[2] in KINDS else None
        path = [where[1], *where[3:]] if kind else where[1:]
    else:
        kind, path = None, where
    dotted = ".".join(path)
    if fault["type"] == "extra_forbidden":
        keys = _keys_beside(kind, path)
        return f"unknown key `{dotted}`, wanted {_known(path[-1], keys)}"
    if fault["type"] == "missing":
        return f"`{dotted}` is missing"
    message = fault["msg"].removeprefix("Value error, ")
    got = "" if isinstance(fault.get("input"), dict) else f", got {fault.get('input')!r}"
    return f"`{dotted}`: {message}{got}"


def _keys_beside(kind: str | None, path: list[str]) -> list[str]:
    model: type[BaseModel] = KINDS[kind] if kind else Recipe
    for part in path[1:-1]:
        field = model.model_fields.get(part)
        inner = [t for t in _types_in(field.annotation if field else None) if issubclass(t, BaseModel)]
        if not inner:
            break
        model = inner[0]
    return list(model.model_fields)


def _types_in(annotation: Any) -> list[type]:
    if isinstance(annotation, type):
        return [annotation]
    return [t for part in getattr(annotation, "__args__", ()) for t in _types_in(part)]


def json_schema() -> dict[str, Any]:
    """The recipe's JSON schema, for editors and checks."""
    return Recipe.model_json_schema(by_alias=True)
