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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prairie.data.loader import Batch, Loader, batch_of
from prairie.errors import BusyError, CheckpointError, TrainingError
from prairie.models.lora import AdapterRows, LoRA
from prairie.models.transformer import Transformer
from prairie.runtime import Bar, Runtime
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
from prairie.train.objective import Objective, computing_in, judging
from prairie.train.optim import AdamW, Muon, Optimizer
from prairie.train.progress import MetricsFile, RunState, Step

SAVING_SHARE = 0.05
"""Time given to checkpoints at most: a slow disk makes them rarer, not the training slower."""


@dataclass(frozen=True)
class StepSums:
    """What one step added up, still on the device. `loss` and `figures` are sums over `count`."""

    loss: Tensor
    count: float
    figures: dict[str, Tensor]


def accumulate_gradients(
    model: Transformer,
    objective: Objective,
    batches: Sequence[Batch],
    adapters: Sequence[AdapterRows] = (),
    *,
    dtype: torch.dtype = torch.float32,
) -> StepSums:
    """Adds the gradients of one step to `.grad`: SUM of the loss over all `batches` / their common count.

    Raises TrainingError if nothing in the step is supervised.
    """
    count = sum(objective.count(batch) for batch in batches)
    if count <= 0:
        raise TrainingError(
            "a step has nothing to learn from",
            got=f"rows {[row for batch in batches for row in batch.rows][:8]} without a supervised token",
            wanted="at least one",
        )
    losses: list[Tensor] = []
    figures: dict[str, Tensor] = {}
    for batch in batches:
        with computing_in(dtype, model):
            loss, sums = objective.loss(model, batch, adapters)
        (loss / count).backward()
        losses.append(loss.detach())
        for name, value in sums.items():
            figures[name] = figures[name] + value if name in figures else value
    return StepSums(torch.stack(losses).sum() if len(losses) > 1 else losses[0], count, figures)


class Trainer:
    """Trains `model`, or with `adapter` only that (the base is frozen then), on what `loader` gives.

    `evaluate` is called every `eval_every` steps and at the end; its figures go to metrics.jsonl. It may use the model,
    and whatever it draws from the random generators does not change the training.
    Raises TrainingError for settings that the data or the model cannot take, AdapterError for another base's adapter.
    """

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        loader: Loader,
        config: TrainConfig,
        *,
        runtime: Runtime,
        folder: Path,
        adapter: LoRA | None = None,
        evaluate: Callable[[], dict[str, Any]] | None = None,
        title: str = "train",
    ) -> None:
        self.model, self.objective, self.loader, self.config = model, objective, loader, config
        self.runtime, self.folder, self.adapter, self.evaluate, self.title = runtime, folder, adapter, evaluate, title
        _check_settings(model, objective, loader, config, runtime)
        model.to(runtime.device)
        model.requires_grad_(adapter is None)
        self.adapters: list[AdapterRows] = []
        if adapter is not None:
            adapter.require_base(model)
            adapter.to(runtime.device).requires_grad_(True)
            self.adapters = [AdapterRows(adapter, None)]
        learner: nn.Module = model if adapter is None else adapter
        self.parameters = {name: p for name, p in learner.named_parameters() if p.requires_grad}
        _check_learner(self.parameters)
        self.optimizer = _optimizer(self.parameters, config)
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=config.keep)
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.identity = self._identity()
        self.state = RunState()
        self._stop: int | None = None
        self._save_due_s = math.inf

    def fit(self) -> dict[str, Any]:
        """Trains to the last step and returns the figures; goes on from the newest sound checkpoint by itself.

        On SIGTERM or Ctrl-C the step is finished and saved, then SystemExit. Raises TrainingError (not finite),
        CheckpointError (the folder holds another run), StorageFullError, BusyError (another process trains there).
        """
        with self._alone(), self._catching_signals(), self._resumed() as bar:
            self._evaluate()  # due here only if a stop came between a step and its evaluation
            while self.state.step < self.config.steps and self._stop is None:
                self._train()
                self._log(bar)
                self._evaluate()
                self._save()
            return self._figures()

    def _train(self) -> None:
        """One step."""
        started = time.perf_counter()
        batches = self.loader.next_step(self.config.micro_batches)
        dtype = self.runtime.torch_dtype()
        sums = accumulate_gradients(self.model, self.objective, batches, self.adapters, dtype=dtype)
        self._update(batches, sums, started)

    def _update(self, batches: Sequence[Batch], sums: StepSums, started: float) -> None:
        """From gradients to new weights. The only place that waits for the device: one transfer of a few numbers."""
        config, state = self.config, self.state
        gradients = self.optimizer.gradient_norm()
        norm, loss, *values = torch.stack([gradients.norm, sums.loss, *sums.figures.values()]).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._not_finite(batches, loss / sums.count, norm)
        gradients.clip(norm, config.clip_norm)
        self.optimizer.step(config.lr_at(state.step))
        state.add(
            Step(
                loss=loss,
                count=sums.count,
                figures=dict(zip(sums.figures, values, strict=True)),
                grad_norm=norm,
                tokens=sum(len(batch.tokens_N) for batch in batches),
                supervised=sum(batch.supervised for batch in batches),
                seconds=time.perf_counter() - started,
            )
        )

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
        )
        self.metrics.write(line)
        shown = {name: line[name] for name in ("loss", "accuracy", "margin", "lr", "grad_norm") if name in line}
        bar.update(1, **shown, **{"tok/s": line["tokens_per_s"]})

    def _evaluate(self) -> None:
        """Calls `evaluate` where it is due and has not been done yet."""
        state, config = self.state, self.config
        due = state.step == config.steps or (config.eval_every and state.step and state.step % config.eval_every == 0)
        if self.evaluate is None or not due or state.evaluated == state.step or self._stop is not None:
            return
        with generators_apart(), judging(self.model, self.adapters):
            state.evaluation = dict(self.evaluate())
        state.evaluated = state.step
        self.metrics.write({"step": state.step, "evaluation": state.evaluation})

    def _save(self) -> None:
        """A checkpoint when it is due by steps or by time, at the end, and when a signal asks to stop."""
        step, config = self.state.step, self.config
        by_step = config.save_every and step % config.save_every == 0
        by_time = time.monotonic() >= self._save_due_s
        if by_step or by_time or step == config.steps or self._stop is not None:
            self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        started = time.monotonic()
        tensors: dict[str, Mapping[str, Tensor]] = {"weights": self.parameters, "optimizer": self.optimizer.tensors()}
        state = {
            "identity": self.identity,
            "machine": _machine(),
            "progress": asdict(self.state),
            "loader": self.loader.state_dict(),
            "generators": generator_states(),
        }
        self.checkpoints.save(self.state.step, tensors, state)
        self._plan_save(cost_s=time.monotonic() - started)

    def _plan_save(self, cost_s: float) -> None:
        """When the next checkpoint by time is due: a slow disk may take `SAVING_SHARE` of the time, not more."""
        pause_s = self.config.save_every_s
        self._save_due_s = math.inf if pause_s is None else time.monotonic() + max(pause_s, cost_s / SAVING_SHARE)

    @contextmanager
    def _resumed(self) -> Iterator[Bar]:
        """Sets everything as the newest sound checkpoint says, or as a new run begins; gives the progress bar."""
        say = self.runtime.progress.say
        checkpoint = self.checkpoints.newest(say)
        if checkpoint is None:
            self._check_untouched()
            self.state = RunState()
            self.runtime.seed_all(self.config.seed)
        else:
            self._restore(checkpoint)
            say(f"{self.title}: goes on from step {self.state.step} of {self.config.steps} in {self.folder}.")
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

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError if it is of another run."""
        saved, machine = checkpoint.state, _machine()
        self._check_identity(saved["identity"], checkpoint.path)
        if saved["machine"] != machine:
            self.runtime.progress.say(
                f"{self.title}: the checkpoint was written under {saved['machine']}, now it is {machine}; "
                "the last bits of the result may differ."
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(checkpoint.tensors["weights"][name])
        self.optimizer.load(checkpoint.tensors["optimizer"])
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
        path = self.folder / f"bad-step-{step:06d}.jsonl"
        rows = [row for batch in batches for row in batch.rows]
        group = self.objective.group
        lines: list[str] = []
        guilty: list[int] = []
        with judging(self.model, self.adapters):
            for start in range(0, len(rows), group):
                batch = batch_of(self.loader.dataset, rows[start : start + group])
                value = float(self.objective.loss(self.model, batch, self.adapters)[0])
                if not math.isfinite(value):
                    guilty += batch.rows
                tokens = batch.tokens_N.split(list(batch.lengths))
                labels = batch.labels_N.split(list(batch.lengths))
                for row, ids, wanted in zip(batch.rows, tokens, labels, strict=True):
                    entry = {
                        "step": step,
                        "row": row,
                        "loss_alone": value if math.isfinite(value) else str(value),
                        "token_ids": ids.tolist(),
                        "label_ids": wanted.tolist(),
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
        trained = sum(p.numel() for p in self.parameters.values())
        return {**self.state.figures(flops_per_token=self._flops_per_token()), "trained_parameters": trained}

    def _flops_per_token(self) -> float:
        """Forward and backward; a frozen base needs no gradient of its weights: 4 operations a weight instead of 6."""
        rows = max(1, len(self.loader.dataset.offsets) - 1)
        context = max(1, int(self.loader.dataset.offsets[-1]) // rows)
        return self.model.config.flops_per_token(context) * (1 if self.adapter is None else 4 / 6)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one process may train in a folder. Raises BusyError."""
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
    def _catching_signals(self) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C ask for a stop after the step (SystemExit); a second Ctrl-C stops at once."""
        self._stop = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self._stop = number
            signal.signal(signal.SIGINT, before[signal.SIGINT])

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for number in before:
                signal.signal(number, ask)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._stop is not None:
            self.runtime.progress.say(
                f"{self.title}: stopped by {signal.Signals(self._stop).name} after step {self.state.step} of "
                f"{self.config.steps}, all is saved in {self.folder}; the same command goes on from there."
            )
            raise SystemExit(0 if self._stop == signal.SIGTERM else 128 + self._stop)


def _check_settings(
    model: Transformer, objective: Objective, loader: Loader, config: TrainConfig, runtime: Runtime
) -> None:
    """Raises TrainingError for what would fail, or be silently wrong, later."""
    dataset = loader.dataset
    longest = int(np.diff(dataset.offsets).max())
    highest = int(dataset.ids.max())
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
    if runtime.dtype not in ("float32", "bfloat16"):
        raise TrainingError("training cannot run in this dtype", got=runtime.dtype, wanted="float32 | bfloat16")
    if runtime.world_size != 1:
        raise TrainingError("training runs in one process so far", got=f"world_size {runtime.world_size}", wanted="1")


def _optimizer(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> Optimizer:
    if config.optimizer == "adamw":
        return AdamW(parameters, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    return Muon(
        parameters, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay,
        rate=config.muon_lr / config.lr,
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


def _machine() -> dict[str, Any]:
    """What may change the last bits of a sum without changing its meaning."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "numpy": np.__version__}


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
