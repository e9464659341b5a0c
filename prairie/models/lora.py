"""Low-rank adapters (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353) as objects outside the base model.

The base is never changed: many adapters can stand on one base, each given to `Transformer.forward` with the rows it
serves. An adapter may stand on another one (a DPO adapter on an SFT adapter) and then brings it along as its `parent`.
On disk it is a PEFT folder with the parent's folder inside, and a `prairie.json` that names the base and the adapters
it was trained on; on another base, or with another parent, it is refused.
Not here: PEFT's files (`peft_format`), which adapter a request wants (engine), training (train).

Legend: N tokens, I input columns, O output columns, R rank, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from prairie.errors import AdapterError, ModelError
from prairie.models.names import Part
from prairie.models.peft_format import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    SCORE,
    LoRAConfig,
    Pair,
    config_from_peft,
    config_to_peft,
    pairs_from_peft,
    read_state,
    score_from_peft,
    state_to_peft,
)
from prairie.models.transformer import FusedLinear, Transformer
from prairie.models.weights import MANIFEST, hash_of, not_written, read_json, read_manifest, weights_hash, write_json
from prairie.ops.attention import PackedDocuments
from prairie.ops.linear import Addition, LowRank, adapt, adapt_embedding, adapted_weight, row_lengths
from prairie.ops.packed import IN_PANELS, PackedWeight

__all__ = ["AdapterRows", "LoRA", "LoRAConfig"]

PARENT = "parent"
"""The folder inside an adapter's folder that holds the adapter it stands on."""
MERGE_TOLERANCE = {torch.float32: 1e-3}
"""The most that merging may change a logit, as a share of the largest one; other dtypes round more: 5%."""


class AdapterRows(NamedTuple):
    """An adapter and the tokens it serves; `rows` None means all N."""

    lora: LoRA
    rows: slice | None = None


class LoRA(nn.Module):
    """Pairs A (R, I), B (O, R), with DoRA lengths (O,), keyed by the path of the layer they change:
    model.layers.0.self_attn.q_proj. `parent` is the adapter below this one; it is frozen."""

    def __init__(
        self,
        config: LoRAConfig,
        pairs: Mapping[str, Pair],
        base_hash: str | None = None,
        merged: Sequence[str] = (),
        parent: LoRA | None = None,
        score_CD: Tensor | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.config = config
        self.score = None if score_CD is None else nn.Parameter(score_CD)
        """(C, D) a head of scores that learns with the adapter (PEFT's `modules_to_save`), read at a row's last token;
        None: the base's own head is used."""
        self.labels = tuple(labels)
        """Names of its C scores."""
        self.paths = sorted(pairs)
        self.embedded = frozenset(path for path, pair in pairs.items() if pair.embedded)
        self.a, self.b, self.magnitude = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for path in self.paths:
            for kept, tensor in zip((self.a, self.b, self.magnitude), pairs[path][:3], strict=True):
                if tensor is not None:
                    kept[path.replace(".", "/")] = nn.Parameter(tensor)
        self.base_hash = base_hash
        """Hash of the base this adapter was made on; None for a foreign adapter that does not say."""
        self.merged = tuple(merged)
        """Hashes of the adapters that were merged into that base, in their order."""
        self._below = () if parent is None else (parent.requires_grad_(False).eval(),)  # a tuple: no part of the module
        self._served: dict[tuple[int | None, str], tuple[int, LowRank | None]] = {}

    @property
    def parent(self) -> LoRA | None:
        return self._below[0] if self._below else None

    @classmethod
    def create(
        cls,
        model: Transformer,
        config: LoRAConfig | None = None,
        seed: int = 0,
        parent: LoRA | None = None,
        labels: Sequence[str] = (),
    ) -> LoRA:
        """A fresh adapter that changes nothing yet: A kaiming uniform from `seed`, B zero (PEFT's start), DoRA's
        lengths those that the rows have. With `parent` it stands on that adapter; with `labels` it brings a head of
        scores, a copy of the one below if that has these labels. AdapterError for unknown targets."""
        config = config or LoRAConfig()
        if config.rank < 1:
            raise AdapterError("an adapter needs a rank above 0", got=config.rank)
        if parent is not None:
            parent.require_base(model, "the parent")
        generator = torch.Generator().manual_seed(seed)
        wanted = _targets_of(model, config.targets)
        pairs: dict[str, Pair] = {}
        for at in model.linears():
            lengths_O = None
            if config.dora and any(part.name in wanted for part in at.parts):
                weight_OI = at.dense().float() if parent is None else parent.weight_under(at).float()
                lengths_O = row_lengths(weight_OI.detach()).cpu()
            for part, rows in at.rows():
                if (path := part.name) in wanted:
                    pairs[path] = _fresh(part, config.rank_of(path), at.group == "embed", generator)
                    if lengths_O is not None:
                        pairs[path] = pairs[path]._replace(magnitude=part.to_files(lengths_O[rows]).clone())
        score_CD = _score_of(model, parent, labels, generator) if labels else None
        return cls(config, pairs, hash_of(model), model.merged, parent, score_CD, labels).to(model.embed.device)

    @classmethod
    def load(cls, folder: Path | str) -> LoRA:
        """Reads a PEFT folder, and the parent inside it. AdapterError when anything is damaged, is not what its
        manifest names, or uses a setting that is not computed here."""
        folder = Path(folder)
        try:
            raw, manifest = read_json(folder / ADAPTER_CONFIG), read_manifest(folder)
        except ModelError as error:
            raise AdapterError(error.what, got=error.got, wanted=error.wanted, mend=error.mend) from error
        config = config_from_peft(raw, folder)
        state = read_state(folder / ADAPTER_WEIGHTS)
        score_CD = score_from_peft(state, raw, folder)
        pairs = pairs_from_peft({name: t for name, t in state.items() if name != SCORE}, config, folder)
        labels = manifest.get("labels") or [f"LABEL_{n}" for n in range(0 if score_CD is None else len(score_CD))]
        _check_claim(folder, "weights", manifest.get("weights_hash"), weights_hash(state))
        parent = _load_parent(folder, list(manifest.get("parents", ())))
        stands_on = manifest.get("base_hash"), manifest.get("merged", ())
        lora = cls(config, pairs, *stands_on, parent, score_CD, labels)
        _check_claim(folder, "settings", manifest.get("adapter_hash"), lora.hash)
        return lora.requires_grad_(False).eval()

    def save(self, folder: Path | str, base_name: str | None = None, **manifest: Any) -> str:
        """Writes a PEFT folder, `prairie.json` and the parent inside; returns the adapter's hash. `manifest` is added
        to `prairie.json`, here and in the parents."""
        folder = Path(folder)
        state = self._state()
        facts = {
            "kind": "adapter",
            **manifest,
            "weights_hash": weights_hash(state),
            "adapter_hash": self.hash,
            "base_hash": self.base_hash,
            "merged": list(self.merged),
            "parents": [below.hash for below in self.parents],
            **({"labels": list(self.labels)} if self.labels else {}),
        }
        settings = config_to_peft(self.config, self._peft_targets(), base_name, scores=self.score is not None)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / ADAPTER_CONFIG, settings)
            save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            write_json(folder / MANIFEST, facts)
        except (OSError, SafetensorError) as error:
            raise not_written(AdapterError, f"the adapter cannot be written to {folder}", error) from error
        if self.parent is not None:
            self.parent.save(folder / PARENT, base_name, **manifest)
        return self.hash

    @property
    def parents(self) -> list[LoRA]:
        """The adapters below this one, the lowest first."""
        return [] if self.parent is None else [*self.parent.parents, self.parent]

    @property
    def weights_hash(self) -> str:
        """sha256 over the names and tensors of the file."""
        return weights_hash(self._state())

    @property
    def hash(self) -> str:
        """What names this adapter: sha256 over its tensors, what it does with them, and the adapters below it."""
        below = self.parent.hash if self.parent is not None else None
        content = json.dumps([self.weights_hash, self.config.arithmetic(), below])
        return hashlib.sha256(content.encode()).hexdigest()

    def pair(self, path: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A (R, I) and B (O, R) of one layer."""
        key = path.replace(".", "/")
        return self.a[key], self.b[key]

    def require_base(self, model: Transformer, name: str = "adapter") -> None:
        """AdapterError unless this adapter was made on these very weights (a foreign one: unless shapes fit)."""
        base = hash_of(model)
        for lora in (*self.parents, self):
            if lora.base_hash is not None and lora.base_hash != base:
                raise AdapterError(
                    f"{name} stands on base {lora.base_hash[:12]}, this base is {base[:12]}",
                    got=f"a base with {len(model.merged)} merged adapters" if model.merged != lora.merged else None,
                    wanted=f"one with {len(lora.merged)}" if model.merged != lora.merged else None,
                    mend="load it on the base it was trained on, or train it again on this one",
                )
            lora._require_shapes(model, name)

    def _require_shapes(self, model: Transformer, name: str) -> None:
        known = _targets_of(model, None)
        if self.score is not None and self.score.shape != (len(self.labels), model.config.dim):
            raise AdapterError(
                f"the head of {name} does not fit this base", got=" x ".join(map(str, self.score.shape)),
                wanted=f"{len(self.labels)} x {model.config.dim}",
            )  # fmt: skip
        for path in self.paths:
            a_RI, b_OR = self.pair(path)
            part = known.get(path)
            if part is None:
                raise AdapterError(f"{name} adds to {path}, which this base does not have")
            if (a_RI.shape[1], b_OR.shape[0]) != (part.inputs, part.outputs):
                raise AdapterError(
                    f"{name} does not fit {path} of this base",
                    got=f"{b_OR.shape[0]} x {a_RI.shape[1]}",
                    wanted=f"{part.outputs} x {part.inputs}",
                )

    def merge_into(self, model: Transformer, name: str = "adapter", tolerance: float | None = None) -> float:
        """Adds what this adapter and those below it do to the model's own weights, in place: another base afterwards.

        Returns the largest change of a logit on probe tokens by the merging itself, as a share of the largest logit.
        AdapterError for another base; when that change is above `tolerance` (the model must then be loaded anew); when
        only one side of tied embeddings is adapted.
        """
        if (bits := model.packed) is not None:
            raise AdapterError(
                f"{name} cannot be merged into a quantised base",
                got=bits,
                mend="load it as it is",
            )
        if self.score is not None:
            raise AdapterError(f"{name} has a head of its own and cannot be merged", mend="use it as an adapter")
        self.require_base(model, name)
        stack = (*self.parents, self)
        if model.head is None and any(self.touches(model.linear(None, group)) for group in ("embed", "head")):
            raise AdapterError(
                f"{name} changes the embeddings or the head, which are one tensor in this base",
                mend="serve it as an adapter",
            )
        before = _logits_of_probe(model, [AdapterRows(self)])
        with torch.no_grad():
            for at in model.linears():
                at.dense().copy_(self.weight_under(at))
        model.merged = (*model.merged, *(lora.hash for lora in stack))
        error = float((_logits_of_probe(model, []) - before).abs().max() / before.abs().max())
        allowed = MERGE_TOLERANCE.get(model.embed.dtype, 0.05) if tolerance is None else tolerance
        if not error <= allowed:
            raise AdapterError(
                f"merging {name} would change its answers", got=f"{error:.2g} of the largest logit",
                wanted=f"at most {allowed:.2g}", mend="merge into the base in float32",
            )  # fmt: skip
        return error

    def add_to(self, y_NO: Tensor, x_NI: Tensor, at: FusedLinear, rows: slice | None) -> Tensor:
        """The output y of one fused linear layer as this adapter (on its parent) changes it; may write into `y_NO`."""
        if self.parent is not None:
            y_NO = self.parent.add_to(y_NO, x_NI, at, rows)
        change = self._change(at)
        if change is None:
            return y_NO
        if self.training and self.config.dropout > 0 and torch.is_grad_enabled():  # never while serving or judging
            x_NI = F.dropout(x_NI, self.config.dropout)
        return adapt(y_NO, x_NI, change, rows)

    def additions(self, at: FusedLinear) -> list[Addition] | None:
        """What this adapter (on its parent) adds to the parts of one fused linear layer in training, if it only adds:
        None with DoRA's gain or where dropout draws."""
        below = [] if self.parent is None else self.parent.additions(at)
        if below is None or self.config.dora or (self.training and self.config.dropout > 0):
            return None
        pairs = self._pairs_at(at)
        mine = [
            Addition(pair.a, pair.b, rows, self.config.scale_of(part.name), part.order and part.order.sources_O)
            for part, rows in at.rows()
            if (pair := pairs.get(part.name)) is not None
        ]
        return [*below, *mine]

    def plain_changes(self, at: FusedLinear) -> list[LowRank] | None:
        """What this adapter (on its parent) adds to one fused linear layer, if it only adds: None with DoRA's gain or
        where dropout draws."""
        below = [] if self.parent is None else self.parent.plain_changes(at)
        if below is None or self.config.dora or (self.training and self.config.dropout > 0):
            return None
        change = self._change(at)
        return below if change is None else [*below, change]

    def forget_changes(self) -> None:
        """Gives back what is kept of the changes, here and below; they are fused again when they are wanted."""
        self._served.clear()
        if self.parent is not None:
            self.parent.forget_changes()

    def add_to_embedding(self, x_NO: Tensor, tokens_N: Tensor, at: FusedLinear, rows: slice | None) -> Tensor:
        """The same for the embeddings x of tokens. PEFT knows no dropout here."""
        if self.parent is not None:
            x_NO = self.parent.add_to_embedding(x_NO, tokens_N, at, rows)
        change = self._change(at)
        return x_NO if change is None else adapt_embedding(x_NO, tokens_N, change, rows)

    def weight_under(self, at: FusedLinear) -> Tensor:
        """(O, I) the weight of one fused linear layer as this adapter (on its parent) changes it."""
        weight_OI = at.dense() if self.parent is None else self.parent.weight_under(at)
        change = self._change(at)
        return weight_OI if change is None else adapted_weight(weight_OI, change)

    def touches(self, at: FusedLinear) -> bool:
        """Whether this adapter or one below it changes the layer."""
        return bool(self._pairs_at(at)) or (self.parent is not None and self.parent.touches(at))

    def _apply(self, fn: Any, recurse: bool = True) -> LoRA:
        """`.to(device)` and its kin take the parent along."""
        for below in self._below:
            below._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def _change(self, at: FusedLinear) -> LowRank | None:
        """What this adapter alone does to one fused linear layer, its pairs as one; kept while nobody trains it."""
        pairs = self._pairs_at(at)
        if not pairs:
            return None
        tensors = [t for pair in pairs.values() for t in pair[:3] if t is not None]
        if any(t.requires_grad for t in tensors):
            self._served.clear()  # in training; fused optimisers do not count their changes in `_version`
            return self._fuse(at, pairs)
        version = sum(t._version for t in tensors)
        kept = self._served.get((at.layer, at.group))
        if kept is None or kept[0] != version:
            with torch.inference_mode(False), torch.no_grad():
                kept = self._served[at.layer, at.group] = (version, _served(self._fuse(at, pairs), at.weight))
        return kept[1]

    def _fuse(self, at: FusedLinear, pairs: Mapping[str, Pair]) -> LowRank:
        """A stacked, B block-diagonal and scaled; with DoRA the gain of every row."""
        stacked = [pair.a for pair in pairs.values()]
        width, left = sum(map(len, stacked)), 0
        columns: list[Tensor] = []
        for part in at.parts:
            pair = pairs.get(path := part.name)
            if pair is None:
                columns.append(stacked[0].new_zeros(part.outputs, width))
                continue
            b_OR = part.to_ours(pair.b) * self.config.scale_of(path)
            columns.append(F.pad(b_OR, (left, width - left - b_OR.shape[1])))
            left += b_OR.shape[1]
        change = LowRank(torch.cat(stacked), torch.cat(columns))
        return self._with_gain(at, pairs, change) if self.config.dora else change

    def _with_gain(self, at: FusedLinear, pairs: Mapping[str, Pair], change: LowRank) -> LowRank:
        """The length of W + B A is a constant of the backward pass, as the paper has it (section 4.3)."""
        with torch.no_grad():
            weight_OI = (at.dense() if self.parent is None else self.parent.weight_under(at)).float()
            lengths_O = row_lengths(adapted_weight(weight_OI, change))
        gains = []
        for part, rows in at.rows():
            pair = pairs.get(part.name)
            if pair is None or pair.magnitude is None:
                gains.append(torch.ones_like(lengths_O[rows]))
                continue
            gains.append(part.to_ours(pair.magnitude) / lengths_O[rows])
        gain_O = torch.cat(gains)
        shift_O = None if at.bias is None else at.bias * (1 - gain_O)
        return LowRank(change.a_RI, change.b_OR * gain_O[:, None], gain_O, shift_O)

    def _pairs_at(self, at: FusedLinear) -> dict[str, Pair]:
        """The pairs of one fused linear layer, in the order of its parts."""
        return {part.name: self._pair(part.name) for part in at.parts if part.name.replace(".", "/") in self.a}

    def _pair(self, path: str) -> Pair:
        key = path.replace(".", "/")
        return Pair(self.a[key], self.b[key], self.magnitude[key] if self.config.dora else None, path in self.embedded)

    def _state(self) -> dict[str, Tensor]:
        """The tensors of the file."""
        score = {} if self.score is None else {SCORE: self.score.detach().cpu().contiguous()}
        return {**state_to_peft(self._pairs()), **score}

    def _pairs(self) -> dict[str, Pair]:
        return {path: self._pair(path) for path in self.paths}

    def _peft_targets(self) -> list[str]:
        """The ends of paths ("self_attn.q_proj") when every layer has the same ones, else full paths."""
        numbered = [match for path in self.paths if (match := re.fullmatch(r"\D+\.(\d+)\.(.+)", path))]
        layers = {int(match[1]) for match in numbered}
        ends = {match[2] for match in numbered}
        if len(layers) * len(ends) != len(numbered) or layers != set(range(len(layers))):
            return self.paths
        outside = set(self.paths) - {match[0] for match in numbered}
        return sorted(ends | {path.rsplit(".", 1)[-1] for path in outside})


def _served(change: LowRank, weight: Tensor | PackedWeight) -> LowRank:
    """What is answered with: on a base that is rounded to bfloat16, 8 or 4 bits an adapter is rounded to bfloat16."""
    rounded = isinstance(weight, PackedWeight) and weight.bits in IN_PANELS and not weight.exact
    if not rounded or change.gain_O is not None:
        return change
    return LowRank(*(tensor.bfloat16().to(tensor.dtype) for tensor in (change.a_RI, change.b_OR)))


def _targets_of(model: Transformer, targets: Literal["all-linear"] | Sequence[str] | None) -> dict[str, Part]:
    """Paths of the layers that `targets` names; None: all that can carry an adapter."""
    known = {part.name: (at, part) for at in model.linears() for part in at.parts}
    inside = {path for path, (at, _) in known.items() if at.layer is not None}
    if targets is None:
        chosen = set(known)
    elif targets == "all-linear":
        chosen = inside
    else:
        chosen = {path for path in known if path in targets or path.rsplit(".", 1)[-1] in targets}
        if unknown := {t for t in targets if not any(path == t or path.endswith("." + t) for path in known)}:
            raise AdapterError(
                "an adapter was asked for layers that the model does not have",
                got=", ".join(sorted(unknown)),
                wanted="all-linear or some of " + ", ".join(sorted({path.rsplit(".", 1)[-1] for path in known})),
            )
    return {path: part for path, (_, part) in known.items() if path in chosen}


def _fresh(part: Part, rank: int, embedded: bool, generator: torch.Generator) -> Pair:
    """PEFT's start, whose product is zero. An embedding has it the other way round: A zero, B normal."""
    if embedded:
        b_OR = torch.empty(part.outputs, rank).normal_(generator=generator)
        return Pair(torch.zeros(rank, part.inputs), b_OR, embedded=True)
    bound = 1 / math.sqrt(part.inputs)  # kaiming_uniform_(a=sqrt(5)), as nn.Linear and PEFT start
    a_RI = torch.empty(rank, part.inputs).uniform_(-bound, bound, generator=generator)
    return Pair(a_RI, torch.zeros(part.outputs, rank))


def _score_of(model: Transformer, parent: LoRA | None, labels: Sequence[str], generator: torch.Generator) -> Tensor:
    """(C, D) the head of scores below where it has these labels, else a fresh one: normal, std 1/sqrt(width)."""
    if model.config.kind != "decoder":
        raise AdapterError("an adapter brings scores only to a decoder", got=f"an {model.config.kind}")
    if parent is not None and parent.score is not None and parent.labels == tuple(labels):
        return parent.score.detach().clone()
    if model.task is not None and model.task.out is not None and model.config.labels == tuple(labels):
        return model.task.out.detach().float().clone()
    width = model.config.dim
    return torch.empty(len(labels), width).normal_(generator=generator) / math.sqrt(width)


def _load_parent(folder: Path, parents: list[str]) -> LoRA | None:
    """The adapter in the folder inside, which must be the very one that this one was trained on."""
    if not parents:
        return None
    if not (folder / PARENT).is_dir():
        raise AdapterError(
            f"the adapter in {folder} stands on another adapter, which is not there",
            got=f"no folder {PARENT}",
            wanted=f"adapter {parents[-1][:12]} in it",
            mend="copy the whole folder",
        )
    parent = LoRA.load(folder / PARENT)
    if [below.hash for below in (*parent.parents, parent)] != parents:
        raise AdapterError(
            f"the adapter in {folder} was trained on another parent than the one in {folder / PARENT}",
            got=parent.hash[:12],
            wanted=parents[-1][:12],
            mend="restore the folder from where it was made",
        )
    return parent


def _check_claim(folder: Path, what: str, claimed: object, found: str) -> None:
    if claimed is not None and claimed != found:
        raise AdapterError(
            f"the adapter {what} in {folder} are not those its {MANIFEST} names",
            got=found[:12],
            wanted=str(claimed)[:12],
        )


def _logits_of_probe(model: Transformer, adapters: Sequence[AdapterRows]) -> Tensor:
    """(N, V) float32 on two rows of seeded random tokens."""
    lengths = [min(32, model.config.max_context)] * 2
    generator = torch.Generator().manual_seed(0)
    tokens_N = torch.randint(model.config.vocab_size, (sum(lengths),), generator=generator).to(model.embed.device)
    with torch.no_grad():
        hidden_ND = model(tokens_N, PackedDocuments(lengths, tokens_N.device), adapters)
        return model.logits(hidden_ND, adapters).float()
