"""One Trainer for every objective: it owns time. Steps, accumulation, the optimiser, checkpoints, signals, figures.

It knows no loss, no tokenizer and no store. What a step means is an `Objective`; where rows come from is a `Loader`.

The promises:
- the gradient is the sum over all micro-batches divided by the count of the whole step, however the step was split;
- a killed run that is started again ends with the bits of an undisturbed run, wherever its checkpoints fell;
- what is not finite never reaches a weight.

In the work folder: `checkpoints/`, `metrics.jsonl` (one object per log line or evaluation), `bad-step-*.jsonl`, `lock`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prairie.data.loader import Batch, Loader, TokenDataset
from prairie.errors import BusyError, CheckpointError, TrainingError
from prairie.models.lora import AdapterRows, LoRA
from prairie.models.transformer import Transformer
from prairie.runtime import Bar, Progress, Runtime
from prairie.train.checkpoint import (
    Checkpoint,
    Checkpoints,
    generator_states,
    generators_apart,
    replace_text,
    restore_generators,
    writing,
)
from prairie.train.config import TrainConfig
from prairie.train.memory import keep_freed_memory, return_freed_memory
from prairie.train.objective import Learner, Objective, computing_in, for_step, judging
from prairie.train.optim import MUON_MOST, AdamW, Muon, Optimizer, rates_for
from prairie.train.progress import MetricsFile, RunState, Step, places_of
from prairie.train.ranks import ALONE, Ranks, share_of_step
from prairie.train.sharding import Keeping, Replicas, Shards
from prairie.train.tracking import Tracker

SAVING_SHARE = 0.05
"""Time given to checkpoints at most: a slow disk makes them rarer, not the training slower."""


@dataclass(frozen=True)
class StepSums:
    """What one step added up, still on the device. `loss` and `figures` are sums over `count`."""

    loss: Tensor
    count: float
    figures: dict[str, Tensor]


def accumulate_gradients(
    model: Learner,
    objective: Objective,
    batches: Sequence[Batch],
    adapters: Sequence[AdapterRows] = (),
    *,
    dtype: torch.dtype = torch.float32,
    ranks: Ranks = ALONE,
    draw: str = "",
    idle: Sequence[Batch] = (),
) -> StepSums:
    """Adds the gradients of one step to `.grad`: SUM of the loss over all `batches` of all ranks / their common count.

    `ranks`: the processes that share the step, each with `batches` of its own; `.grad` is not yet summed over them.
    `idle` batches are computed for the sake of the other ranks and count nothing.
    `draw` names the step where something is drawn (dropout): what a micro-batch draws then depends on this name and its
    place in the step, not on who computes it. Raises TrainingError if nothing in the step is supervised.
    """
    count = count_of(objective, batches, ranks)
    counted = [1.0] * len(batches) + [0.0] * len(idle)
    batches = [*batches, *idle]
    objective = for_step(objective, model, batches, adapters, dtype=dtype, total=ranks.total, counted=counted)
    losses: list[Tensor] = []
    figures: dict[str, Tensor] = {}
    for index, (batch, counts) in enumerate(zip(batches, counted, strict=True)):
        seed_draw(draw, index * ranks.count + ranks.rank)
        with computing_in(dtype, model):
            loss, sums = objective.loss(model, batch, adapters)
        if not counts:
            loss, sums = loss * 0.0, {name: value * 0.0 for name, value in sums.items()}
        (loss / count).backward()
        losses.append(loss.detach())
        for name, value in sums.items():
            figures[name] = figures[name] + value if name in figures else value
    total = torch.stack(losses).sum() if len(losses) > 1 else losses[0]
    if ranks.count > 1:
        whole = ranks.add(torch.stack([total, *figures.values()]).double())
        total, figures = whole[0], dict(zip(figures, whole[1:], strict=True))
    return StepSums(total, count, figures)


def count_of(objective: Objective, batches: Sequence[Batch], ranks: Ranks = ALONE) -> float:
    """What the loss of one step is divided by. Raises TrainingError if nothing in the step is supervised."""
    (count,) = ranks.total([sum(objective.count(batch) for batch in batches)])
    if count <= 0:
        raise TrainingError(
            "a step has nothing to learn from",
            got=f"rows {[row for batch in batches for row in batch.rows][:8]} without a supervised token",
            wanted="at least one",
        )
    return count


def seed_draw(draw: str, index: int) -> None:
    """What micro-batch `index` of the step that is called `draw` draws; an empty name leaves the generator alone."""
    if draw:
        torch.manual_seed(zlib.crc32(f"{draw} {index}".encode()))


class Trainer:
    """Trains `model`, or with `adapter` only that (the base is frozen then), on what `loader` gives.

    `evaluate` is called every `eval_every` steps and at the end; its figures go to metrics.jsonl. It may use the model,
    and whatever it draws from the random generators does not change the training. With `keep_best` or `patience` its
    figure `score` says how good the model is, higher is better. With `runtime.world_size` above 1 each rank calls this
    with the same arguments; the rows of a step are shared among them, and with `config.shard` the weights, gradients
    and moments too: `model` is whole inside `whole_model()` then. `evaluate` is called on rank 0.
    Raises TrainingError for settings that the data or the model cannot take, AdapterError for another base's adapter.
    """

    def __init__(
        self,
        model: Learner,
        objective: Objective,
        loader: Loader,
        config: TrainConfig,
        *,
        runtime: Runtime,
        folder: Path,
        adapter: LoRA | None = None,
        evaluate: Callable[[], dict[str, Any]] | None = None,
        tracker: Tracker | None = None,
        title: str = "train",
    ) -> None:
        self.model, self.objective, self.loader, self.config = model, objective, loader, config
        self.runtime, self.folder, self.adapter, self.evaluate, self.title = runtime, folder, adapter, evaluate, title
        _check_settings(model, objective, loader, config, runtime)
        _check_ranks(adapter, config, runtime)
        self.ranks = Ranks.join(runtime, alone=config.shard)
        if not self.ranks.leads:
            self.runtime = replace(runtime, progress=Progress(quiet=True))
        model.to(runtime.device)
        model.requires_grad_(adapter is None)
        model.recomputes = config.activation_checkpointing
        self.adapters: list[AdapterRows] = []
        if adapter is not None:
            assert isinstance(model, Transformer), "adapters stand on Transformers"
            adapter.require_base(model)
            adapter.to(runtime.device).requires_grad_(True)
            self.adapters = [AdapterRows(adapter, None)]
        learner: nn.Module = model if adapter is None else adapter
        trained = {name: p for name, p in learner.named_parameters() if p.requires_grad}
        _check_learner(trained)
        _check_rate(trained, config)
        self.trained = sum(p.numel() for p in trained.values())
        self.identity = self._identity()
        self.ranks.require_same(json.dumps(self.identity, sort_keys=True), "thing")
        self.keeping: Keeping = Replicas(trained, self.ranks)
        if config.shard:
            self.keeping = Shards(model, self.ranks, runtime.device)
        (return_freed_memory if config.shard else keep_freed_memory)()
        self.parameters = self.keeping.own
        """What this process moves of what is trained: all of it, or its shard."""
        self.optimizer = _optimizer(self.parameters, config)
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=config.keep)
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.best = Checkpoints(folder / "best", keep=2)
        """Weights of the best evaluations: the one before stays until a checkpoint knows of the new one."""
        self.tracker = tracker
        self.state = RunState()
        self._asked: int | None = None  # the signal that reached this process
        self._stop: int | None = None  # the one that all ranks have agreed on
        self._save_due_s = math.inf

    def fit(self) -> dict[str, Any]:
        """Trains to the last step and returns the figures; goes on from the newest sound checkpoint by itself.

        On SIGTERM or Ctrl-C the step is finished and saved, then SystemExit. Raises TrainingError (not finite),
        CheckpointError (the folder holds another run), StorageFullError, BusyError (another process trains there).
        """
        with self.running() as bar:
            while not self.over():
                self._train()
                self.tell(bar)
                if self.save_is_due():
                    self.save()
            return self.finish()

    @contextmanager
    def running(self, at_most: int | None = None, listens: bool = True) -> Iterator[Bar]:
        """The run is this process's own, its state is that of the newest sound checkpoint (with `at_most`, of none
        later than that step), and if it `listens`, signals ask for a stop. Gives the progress bar."""
        with self._alone(), self._catching_signals(listens), self._resumed(at_most) as bar:
            self._evaluate()  # due here only if a stop came between a step and its evaluation
            yield bar

    def finish(self) -> dict[str, Any]:
        """The figures of a run that is over; with `keep_best` its weights are the best ones from here on."""
        self._take_best()
        return self._figures()

    def _train(self) -> None:
        """One step."""
        started = time.perf_counter()
        config, ranks = self.config, self.ranks
        share = share_of_step(self.loader, config.micro_batches, ranks, even=self.keeping.even)
        with self.keeping.computing():
            sums = accumulate_gradients(
                self.model, self.objective, share.batches, self.adapters, dtype=self.runtime.torch_dtype(),
                ranks=ranks, draw=f"{config.seed} {self.state.step}", idle=share.idle,
            )  # fmt: skip
        self.keeping.collect()
        self.update(share.batches, sums, started)

    def update(self, batches: Sequence[Batch], sums: StepSums, started: float) -> None:
        """From gradients to new weights. The only place that waits for the device: one transfer of a few numbers."""
        config, state = self.config, self.state
        gradients = self.optimizer.gradient_norm()
        whole_norm = self.keeping.norm(gradients.norm)
        norm, loss, *values = torch.stack([whole_norm, sums.loss, *sums.figures.values()]).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._not_finite(batches, loss / sums.count, norm)
        gradients.clip(norm, config.clip_norm)
        self.optimizer.step(config.lr_at(state.step))
        counts = [(b.size, b.supervised, places_of(b.lengths)) for b in batches] or [(0, 0, 0)]
        tokens, supervised, places = map(int, self.ranks.total([sum(column) for column in zip(*counts, strict=True)]))
        state.add(
            Step(
                loss=loss,
                count=sums.count,
                figures=dict(zip(sums.figures, values, strict=True)),
                grad_norm=norm,
                tokens=tokens,
                supervised=supervised,
                places=places,
                room=config.tokens_per_batch * config.micro_batches,
                seconds=time.perf_counter() - started,
            )
        )

    def tell(self, bar: Bar) -> None:
        """What is said after a step: the log, and the evaluation where it is due."""
        self._log(bar)
        self._evaluate()

    def _log(self, bar: Bar) -> None:
        """A line of metrics.jsonl every `log_every` steps; the bar every step."""
        state = self.state
        if state.step % self.config.log_every and state.step < self.config.steps:
            bar.update(1)
            return
        line = state.line(
            lr=self.config.lr_at(state.step - 1),
            epoch=float(self.loader.epoch),
            flops_per_token=self._flops_per_token(),
            peak_flops=self.runtime.peak_flops,
        )
        self._tell(line)
        shown = {name: line[name] for name in ("loss", "accuracy", "margin", "lr", "grad_norm") if name in line}
        bar.update(1, **shown, **{"tok/s": line["tokens_per_s"]})

    def _tell(self, line: dict[str, Any]) -> None:
        """A line to metrics.jsonl, and to whatever else follows the run."""
        if self.ranks.leads:
            self.metrics.write(line)
            if self.tracker is not None:
                self.tracker.write(line)

    def _evaluate(self) -> None:
        """Calls `evaluate` where it is due and has not been done yet; remembers the best."""
        state, config = self.state, self.config
        last = state.step == config.steps
        due = last or (config.eval_every and state.step and state.step % config.eval_every == 0)
        evaluate = self.evaluate
        if evaluate is None or not due or state.evaluated == state.step:
            return
        self._agree()
        if self._stop is not None:
            return
        with generators_apart(), self.whole_model(), judging(self.model, self.adapters):
            figures: dict[str, Any] = dict(self.ranks.first_says(lambda: dict(evaluate())))
        state.judge(figures, patience=config.patience)
        if config.keep_best and state.best_step == state.step:
            weights = self.keeping.whole(self.parameters)
            if self.ranks.leads:
                self.best.save(state.step, {"weights": weights}, {"identity": self.identity})
        self._tell({"step": state.step, "evaluation": state.evaluation})

    def whole_model(self) -> AbstractContextManager[None]:
        """Inside this context `model` has all its weights on every rank, also where they are sharded. All ranks enter
        it together; each may do there what it likes, alone."""
        return self.keeping.gathered()

    @property
    def asked_to_stop(self) -> int | None:
        """The signal that asked for it."""
        return self._stop or self._asked

    def stop(self, number: int) -> None:
        """Stop after this step, as signal `number` would have it."""
        self._asked = number

    def over(self) -> bool:
        """Whether no further step is to be taken."""
        state = self.state
        return state.step >= self.config.steps or state.ended != "" or self._stop is not None

    def _agree(self) -> None:
        """A signal that reached one rank stops all of them."""
        self._stop = int(self.ranks.most([self._asked or 0])[0]) or None

    def save_is_due(self) -> bool:
        """By steps or by time, with a new best, at the end, and at a signal: one that comes later than this question
        is for the next step, which is saved in its turn."""
        state, config = self.state, self.config
        by_step = config.save_every and state.step % config.save_every == 0
        self._agree()
        by_time = bool(self.ranks.most([time.monotonic() >= self._save_due_s])[0])
        best = config.keep_best and state.best_step == state.step
        last = state.ended != "" or state.step == config.steps
        return bool(by_step or by_time or best or last or self._stop is not None)

    def _take_best(self) -> None:
        """At the end of a run that keeps its best: the weights of that evaluation."""
        state = self.state
        finished = state.step == self.config.steps or state.ended
        if not (self.config.keep_best and finished and 0 < state.best_step < state.step):
            return
        self._set_weights(self.best.read(state.best_step))
        self.runtime.progress.say(
            f"{self.title}: the weights of step {state.best_step} are kept, their score {state.best:.4g} was the best."
        )

    @torch.no_grad()
    def _set_weights(self, checkpoint: Checkpoint) -> None:
        kept = self.keeping.parts(checkpoint.tensors["weights"])
        for name, parameter in self.parameters.items():
            parameter.copy_(kept[name])

    def save(self) -> None:
        """A checkpoint of the run as it stands. Raises StorageFullError."""
        started = time.monotonic()
        held: dict[str, Mapping[str, Tensor]] = {"weights": self.parameters, "optimizer": self.optimizer.tensors()}
        tensors = {name: self.keeping.whole(named) for name, named in held.items()}
        state = {
            "identity": self.identity,
            "machine": _machine(self.ranks, self.config.shard),
            "progress": asdict(self.state),
            "loader": self.loader.state_dict(),
            "generators": generator_states(),
        }
        if self.ranks.leads:
            self.checkpoints.save(self.state.step, tensors, state)
        self._plan_save(cost_s=time.monotonic() - started)

    def _plan_save(self, cost_s: float) -> None:
        """When the next checkpoint by time is due: a slow disk may take `SAVING_SHARE` of the time, not more."""
        pause_s = self.config.save_every_s
        self._save_due_s = math.inf if pause_s is None else time.monotonic() + max(pause_s, cost_s / SAVING_SHARE)

    @contextmanager
    def _resumed(self, at_most: int | None = None) -> Iterator[Bar]:
        """Sets everything as the newest sound checkpoint says, or as a new run begins; gives the progress bar."""
        say = self.runtime.progress.say
        checkpoint = self._newest(at_most)
        if checkpoint is None:
            self._check_untouched()
            self.state = RunState()
            self.runtime.seed_all(self.config.seed)
        else:
            self._restore(checkpoint)
            say(f"{self.title}: goes on from step {self.state.step} of {self.config.steps} in {self.folder}.")
        if self.ranks.leads:
            self.metrics.forget_after(self.state.step, self.state.evaluated)
        self._plan_save(cost_s=0.0)
        for parameter in self.parameters.values():
            parameter.grad = None
        modes = [(module, module.training) for module in (self.model, self.adapter) if module is not None]
        try:
            for module, _ in modes:
                module.train()
            with self.runtime.progress.bar(self.title, self.config.steps, start=self.state.step) as bar:
                yield bar
        finally:
            for module, mode in modes:
                module.train(mode)

    def _newest(self, at_most: int | None) -> Checkpoint | None:
        """The newest sound checkpoint; rank 0 looks for it, the others read the same one."""
        found = self.checkpoints.newest(self.runtime.progress.say, at_most) if self.ranks.leads else None
        step = self.ranks.first_says(lambda: found.step if found else None)
        return found if self.ranks.leads or step is None else self.checkpoints.read(step)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError if it is of another run."""
        saved, machine = checkpoint.state, _machine(self.ranks, self.config.shard)
        self._check_identity(saved["identity"], checkpoint.path)
        if saved["machine"] != machine:
            self.runtime.progress.say(
                f"{self.title}: the checkpoint was written under {saved['machine']}, now it is {machine}; "
                "the last bits of the result may differ."
            )
        self._set_weights(checkpoint)
        self.optimizer.load(self.keeping.parts(checkpoint.tensors["optimizer"]))
        self.loader.load_state_dict(saved["loader"])
        restore_generators(saved["generators"])
        self.state = RunState.from_json(saved["progress"])
        self.state.resumed += 1

    def _identity(self) -> dict[str, Any]:
        """What makes two runs the same run. A checkpoint of another identity is refused."""
        modules = [self.model, *([self.adapter] if self.adapter is not None else [])]
        return {
            **{f"config.{name}": value for name, value in _as_json(self.config.deciding()).items()},
            "config_hash": _hash_of(self.config.deciding()),
            "objective": self.objective.name,
            **{f"objective.{name}": value for name, value in _as_json(dict(self.objective.settings)).items()},
            "data": self.loader.dataset.fingerprint,
            "starting weights": _fingerprint(modules),
            "trains": "the model" if self.adapter is None else "an adapter",
            "dtype": self.runtime.dtype,
        }

    def _check_identity(self, theirs: dict[str, Any], path: Path) -> None:
        """Raises CheckpointError naming what differs."""
        mine = self.identity
        keys = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key) and key != "config_hash"]
        if keys:
            raise CheckpointError(
                f"{path} belongs to another run",
                got="this run's " + ", ".join(f"{key} {_short(mine.get(key))}" for key in keys),
                wanted=", ".join(_short(theirs.get(key)) for key in keys),
                mend=f"set it back to go on, or remove {self.folder} to start anew",
            )

    def _check_untouched(self) -> None:
        """Raises CheckpointError if this object has trained before and nothing of that was saved."""
        if self.state.step:
            raise CheckpointError(
                f"{self.folder} holds no checkpoint, and the model in memory has already been trained",
                got=f"{self.state.step} steps", wanted="the weights that the run starts from", mend="load it anew",
            )  # fmt: skip

    def _not_finite(self, batches: Sequence[Batch], loss: float, norm: float) -> TrainingError:
        """Saves the rows of the step with the loss of each group alone, and makes the error. The weights are whole."""
        step = self.state.step + 1
        mark = f"-rank{self.ranks.rank}" if self.ranks.rank else ""
        path = self.folder / f"bad-step-{step:06d}{mark}.jsonl"
        rows = [row for batch in batches for row in batch.rows]
        epochs = {row: batch.epoch for batch in batches for row in batch.rows}
        group = self.objective.group
        lines: list[str] = []
        guilty: list[int] = []
        with self.whole_model(), judging(self.model, self.adapters):
            for start in range(0, len(rows), group):
                batch = self.loader.dataset.batch(rows[start : start + group], epochs[rows[start]])
                value = float(self.objective.loss(self.model, batch, self.adapters)[0])
                if not math.isfinite(value):
                    guilty += batch.rows
                for row, content in zip(batch.rows, batch.described(), strict=True):
                    entry = {
                        "step": step,
                        "row": row,
                        "loss_alone": value if math.isfinite(value) else str(value),
                        **content,
                    }
                    lines.append(json.dumps(entry) + "\n")
        replace_text(path, "".join(lines))
        named = guilty or rows
        listed = ", ".join(map(str, named[:8])) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
        what = "loss" if not math.isfinite(loss) else "gradient"
        return TrainingError(
            f"the {what} of step {step} is not finite, rows {listed}",
            got=f"loss {loss}, gradient norm {norm}, lr {self.config.lr_at(self.state.step):.3g}",
            wanted="finite numbers",
            mend=f"the step was not taken, its rows are in {path}; lower lr or warm up longer",
        )

    def _figures(self) -> dict[str, Any]:
        """What `fit` returns."""
        return {**self.state.figures(flops_per_token=self._flops_per_token()), "trained_parameters": self.trained}

    def _flops_per_token(self) -> float:
        """Forward and backward; a frozen base needs no gradient of its weights: 4 operations a weight instead of 6."""
        rows = max(1, len(self.loader.dataset.offsets) - 1)
        context = max(1, int(self.loader.dataset.offsets[-1]) // rows)
        return self.model.config.flops_per_token(context) * (1 if self.adapter is None else 4 / 6)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one training may work in a folder; its first rank holds it. Raises BusyError."""
        if not self.ranks.leads:
            yield
            return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            stream = (self.folder / "lock").open("a+")
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                stream.seek(0)
                raise BusyError(
                    f"another process trains in {self.folder}", got=f"process {stream.read().strip() or 'unknown'}",
                    mend="wait for it or stop it",
                ) from error  # fmt: skip
            stream.truncate(0)
            stream.write(str(os.getpid()))
            stream.flush()
            yield

    @contextmanager
    def _catching_signals(self, listens: bool) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C ask for a stop after the step (SystemExit); a second Ctrl-C stops at once."""
        self._asked = self._stop = None
        if not listens or threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self._asked = number
            signal.signal(signal.SIGINT, before[signal.SIGINT])

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for number in before:
                signal.signal(number, ask)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if (stop := self.asked_to_stop) is not None:
            self.runtime.progress.say(
                f"{self.title}: stopped by {signal.Signals(stop).name} after step {self.state.step} of "
                f"{self.config.steps}, all is saved in {self.folder}; "
                f"go on with: {self.runtime.command or 'the same command'}"
            )
            raise SystemExit(0 if stop == signal.SIGTERM else 128 + stop)


def _check_settings(
    model: Learner, objective: Objective, loader: Loader, config: TrainConfig, runtime: Runtime
) -> None:
    """Raises TrainingError for what would fail, or be silently wrong, later."""
    dataset = loader.dataset
    longest = int(np.diff(dataset.offsets).max())
    if dataset.group != objective.group:
        kinds = {1: "single rows", 2: "(chosen, rejected) pairs"}
        raise TrainingError(
            f"objective {objective.name} does not fit the data", got=kinds.get(dataset.group, dataset.group),
            wanted=kinds.get(objective.group, objective.group),
        )  # fmt: skip
    if longest > config.tokens_per_batch:
        raise TrainingError(
            "the longest row does not fit into a batch", got=f"tokens_per_batch {config.tokens_per_batch}",
            wanted=f"at least {longest}", mend="raise tokens_per_batch or lower max_tokens", param="tokens_per_batch",
        )  # fmt: skip
    if loader.tokens_per_batch != config.tokens_per_batch:
        raise TrainingError(
            "the loader was made for another tokens_per_batch", got=loader.tokens_per_batch,
            wanted=config.tokens_per_batch, param="tokens_per_batch",
        )  # fmt: skip
    if runtime.dtype not in ("float32", "bfloat16"):
        raise TrainingError("training cannot run in this dtype", got=runtime.dtype, wanted="float32 | bfloat16")
    if not 0 <= runtime.rank < runtime.world_size:
        raise TrainingError("this rank is none of the ranks", got=runtime.rank, wanted=f"0 to {runtime.world_size - 1}")
    if (config.keep_best or config.patience) and not config.eval_every:
        raise TrainingError("a best checkpoint needs evaluations", got="eval_every 0", wanted="1 or more")
    if isinstance(dataset, TokenDataset):
        _check_tokens(model, dataset, longest)


def _check_tokens(model: Any, dataset: TokenDataset, longest: int) -> None:
    """The same of rows of tokens."""
    highest = int(dataset.ids.max())
    if longest > model.config.max_context:
        raise TrainingError(
            "the longest row does not fit into the model's context", got=f"{longest} tokens",
            wanted=f"at most {model.config.max_context}", mend="lower max_tokens",
        )  # fmt: skip
    if highest >= model.config.vocab_size:
        raise TrainingError(
            "the data was made with another tokenizer than the model's", got=f"token id {highest}",
            wanted=f"below {model.config.vocab_size}",
        )  # fmt: skip
    bare = dataset.rows_without_label()
    if len(bare):
        listed = ", ".join(map(str, bare[:8])) + (f" and {len(bare) - 8} more" if len(bare) > 8 else "")
        raise TrainingError(
            f"{len(bare)} of {len(dataset.offsets) - 1} rows have no supervised token", got=f"rows {listed}",
            wanted="at least one in each", mend="TokenDataset.from_chats and its like list and drop such rows",
        )  # fmt: skip


def _optimizer(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> Optimizer:
    if config.optimizer == "adamw":
        return AdamW(parameters, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    return Muon(
        parameters, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay,
        rate=config.muon_lr / config.lr,
    )  # fmt: skip


def _check_rate(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
    """Raises TrainingError for a rate whose steps would replace the weights, or be lost in their rounding."""
    low, high = rates_for(parameters.values())
    if not low <= config.lr <= high:
        moved = "moves each weight by more than it is" if config.lr > high else "is lost in the rounding of float32"
        raise TrainingError(
            f"the learning rate cannot train these weights: a step of it {moved}", got=f"lr {config.lr:g}",
            wanted=f"{low:.1g} to {high:.2g}, for weights of size {high:.2g}",
            mend="most runs want a hundredth of the upper end or less", param="lr",
        )  # fmt: skip
    if config.optimizer == "muon" and config.muon_lr > MUON_MOST:
        raise TrainingError(
            "muon_lr cannot train these weights: a step of it replaces the matrices", got=config.muon_lr,
            wanted=f"at most {MUON_MOST}", param="muon_lr",
        )  # fmt: skip


def _check_ranks(adapter: LoRA | None, config: TrainConfig, runtime: Runtime) -> None:
    """Raises TrainingError for what cannot be shared among ranks, or would make another run of it."""
    if adapter is not None and adapter.config.dropout and config.micro_batches < runtime.world_size:
        raise TrainingError(
            "dropout is drawn for whole micro-batches, and a step has too few for the ranks that share it",
            got=f"micro_batches {config.micro_batches} for {runtime.world_size} ranks",
            wanted=f"at least {runtime.world_size}", mend="or dropout 0", param="micro_batches",
        )  # fmt: skip
    if config.shard and adapter is not None:
        raise TrainingError("`shard` is for whole models", got="an adapter", mend="leave `shard` out", param="shard")
    if config.shard and config.optimizer != "adamw":
        raise TrainingError(
            "`shard` moves weights element by element, and muon turns whole matrices", got=config.optimizer,
            wanted="adamw", param="optimizer",
        )  # fmt: skip


def _check_learner(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises TrainingError if there is nothing to train or no float32 to train in."""
    if not parameters:
        raise TrainingError("there is no parameter to train", wanted="at least one")
    other = {str(p.dtype) for p in parameters.values()} - {"torch.float32"}
    if other:
        raise TrainingError(
            "the trained weights are not float32", got=", ".join(sorted(other)), wanted="torch.float32",
            mend="load the model in float32; dtype bfloat16 of the runtime computes in bfloat16",
        )  # fmt: skip


def _machine(ranks: Ranks, shard: bool) -> dict[str, Any]:
    """What may change the last bits of a sum without changing its meaning."""
    return {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "numpy": np.__version__, "ranks": ranks.count,
        **({"shard": True} if shard else {}),
    }  # fmt: skip


def _fingerprint(modules: Sequence[nn.Module]) -> str:
    """sha256 over names, shapes and up to 1024 values of each parameter: cheap, and no two models share it."""
    digest = hashlib.sha256()
    for module in modules:
        for name, parameter in module.named_parameters():
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(sample.tobytes())
    return digest.hexdigest()


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """As it reads back from a file: tuples are lists."""
    read: dict[str, Any] = json.loads(json.dumps(value))
    return read


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
