"""Where a run stands, in numbers: what it has seen, how fast, how well; and the file that tells it.

Not here: the tensors of a run (checkpoint), the loop (trainer).
"""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prairie.ops.attention import buckets_of
from prairie.train.checkpoint import replace_text, writing

SMOOTHED_STEPS = 20
"""`loss_first` and `loss_last` are means over so many steps (fewer in a short run)."""


@dataclass(frozen=True)
class Step:
    """One step that was taken. `loss` and `figures` are sums over `count`."""

    loss: float
    count: float
    figures: dict[str, float]
    grad_norm: float
    tokens: int
    supervised: int
    seconds: float
    places: int = 0
    """Places that attention computes for the tokens, padding included."""
    room: int = 0
    """Tokens that the batches could have held."""


@dataclass
class Window:
    """Sums since the last line of metrics.jsonl."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    supervised: int = 0
    places: int = 0
    room: int = 0
    loss: float = 0.0
    count: float = 0.0
    grad_norm: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)

    def add(self, step: Step) -> None:
        self.steps += 1
        self.seconds += step.seconds
        self.tokens += step.tokens
        self.supervised += step.supervised
        self.places += step.places
        self.room += step.room
        self.loss += step.loss
        self.count += step.count
        self.grad_norm += step.grad_norm
        for name, value in step.figures.items():
            self.figures[name] = self.figures.get(name, 0.0) + value


@dataclass
class RunState:
    """Where a run stands, apart from its tensors; JSON in a checkpoint."""

    step: int = 0
    """Steps done."""
    evaluated: int = 0
    """The step of the last evaluation."""
    seconds: float = 0.0
    tokens: int = 0
    supervised: int = 0
    resumed: int = 0
    first_losses: list[float] = field(default_factory=list)
    last_losses: list[float] = field(default_factory=list)
    last_line: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    best: float | None = None
    """The highest `score` of an evaluation."""
    best_step: int = 0
    worse: int = 0
    """Evaluations since then."""
    ended: str = ""
    """Why the run ended before its last step."""
    window: Window = field(default_factory=Window)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RunState:
        return cls(**{**value, "window": Window(**value["window"])})

    def add(self, step: Step) -> None:
        """Counts one step that was taken."""
        self.step += 1
        self.tokens += step.tokens
        self.supervised += step.supervised
        self.seconds += step.seconds
        if len(self.first_losses) < SMOOTHED_STEPS:
            self.first_losses.append(step.loss / step.count)
        self.last_losses = [*self.last_losses[1 - SMOOTHED_STEPS :], step.loss / step.count]
        self.window.add(step)

    def judge(self, figures: dict[str, Any], *, patience: int) -> None:
        """Notes an evaluation of this step; with a `score`, whether it is the best and whether to end (`patience`)."""
        self.evaluation, self.evaluated = figures, self.step
        score = figures.get("score")
        if score is None:
            return
        if self.best is None or score > self.best:
            self.best, self.best_step, self.worse = float(score), self.step, 0
        else:
            self.worse += 1
        if patience and self.worse >= patience:
            self.ended = f"{self.worse} evaluations were no better than that of step {self.best_step}"

    def line(self, *, lr: float, epoch: float, flops_per_token: float, peak_flops: float = 0.0) -> dict[str, Any]:
        """The line of metrics.jsonl for the steps since the last one; a new window begins.

        `mfu` is the share of `peak_flops`, the machine's own matrix product, that the model's arithmetic reaches
        (arXiv 2204.02311); `padding` the share of attention's places that hold no token; `fill` that of the batches'
        room that is used.
        """
        window, self.window = self.window, Window()
        tokens_per_s = window.tokens / max(window.seconds, 1e-9)
        self.last_line = {
            "step": self.step,
            "loss": window.loss / window.count,
            **{name: value / window.count for name, value in window.figures.items()},
            "lr": lr,
            "grad_norm": window.grad_norm / window.steps,
            "epoch": round(epoch, 4),
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "supervised_share": round(window.supervised / max(window.tokens, 1), 4),
            "tokens_per_s": round(tokens_per_s, 1),
            "gflops": round(tokens_per_s * flops_per_token / 1e9, 3),
            **({"mfu": round(tokens_per_s * flops_per_token / peak_flops, 4)} if peak_flops else {}),
            "padding": round(1 - window.tokens / max(window.places, 1), 4),
            "fill": round(window.tokens / max(window.room, 1), 4),
            "seconds": round(self.seconds, 3),
        }
        return self.last_line

    def figures(self, *, flops_per_token: float) -> dict[str, Any]:
        """What is known at the end: the last line's figures, and those of the whole run."""
        smoothed = max(1, min(SMOOTHED_STEPS, self.step // 2))
        tokens_per_s = self.tokens / max(self.seconds, 1e-9)
        return {
            **{name: value for name, value in self.last_line.items() if name not in ("step", "loss", "lr")},
            "steps": self.step,
            "loss_first": _mean(self.first_losses[:smoothed]),
            "loss_last": _mean(self.last_losses[-smoothed:]),
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "seconds": round(self.seconds, 3),
            "tokens_per_s": round(tokens_per_s, 1),
            "gflops": round(tokens_per_s * flops_per_token / 1e9, 3),
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            "resumed": self.resumed,
            **({"evaluation": self.evaluation} if self.evaluation else {}),
            **({"best_step": self.best_step, "best_score": self.best} if self.best is not None else {}),
            **({"ended": self.ended} if self.ended else {}),
        }


class MetricsFile:
    """`metrics.jsonl`: one object a line, with `step`, and either figures of training or an `evaluation`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: dict[str, Any]) -> None:
        """Raises StorageFullError."""
        with writing(self.path), self.path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def forget_after(self, step: int, evaluated: int) -> None:
        """Drops the lines that a resumed run will write again, and a line torn by a kill."""
        if not self.path.exists():
            return
        kept: list[str] = []
        for text in self.path.read_text().splitlines():
            with suppress(ValueError, KeyError, TypeError):
                line = json.loads(text)
                if line["step"] <= (evaluated if "evaluation" in line else step):
                    kept.append(text + "\n")
        replace_text(self.path, "".join(kept))


def places_of(lengths: Sequence[int]) -> int:
    """How many places attention computes for rows of these lengths: rows of like length are padded to the longest."""
    if not lengths or len(set(lengths)) == 1:
        return sum(lengths)
    return sum(len(rows) * max(lengths[row] for row in rows) for rows in buckets_of(lengths))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
