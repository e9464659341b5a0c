"""How long, how fast and how often: the settings of a training.

Not here: what is learned (objective), from what (data).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from prairie.errors import TrainingError
from prairie.train.optim import OPTIMIZERS, SCHEDULES, schedule_factor


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast. Raises TrainingError for a value outside its range."""

    steps: int
    tokens_per_batch: int
    """Of one micro-batch; a step sees `micro_batches` times as many."""
    lr: float
    micro_batches: int = 1
    optimizer: str = "adamw"
    muon_lr: float = 0.02
    """muon: the rate of the matrices inside the blocks; `lr` is that of everything else."""
    warmup_steps: int = 0
    schedule: str = "cosine"
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float = 1.0
    activation_checkpointing: bool = False
    """Less memory for more time; does not change the result."""
    shard: bool = False
    """Processes that share the training keep a part of the weights, gradients and moments each (`train.sharding`),
    instead of all of them. Does not change the result."""
    log_every: int = 10
    save_every_s: float | None = 20.0
    """Seconds between checkpoints; None = only every `save_every` steps and at the end. Does not change the result."""
    save_every: int = 0
    """Steps between checkpoints, 0 = by time only."""
    eval_every: int = 0
    """Steps between evaluations; there is always one at the end."""
    keep_best: bool = False
    """The weights with the best `score` of an evaluation are those that the run ends with."""
    patience: int = 0
    """Evaluations without a better `score` after which the run ends early; 0 = it never does."""
    keep: int = 2
    seed: int = 0

    COSMETIC: ClassVar[tuple[str, ...]] = (
        "log_every", "save_every_s", "save_every", "eval_every", "keep", "activation_checkpointing", "shard"
    )  # fmt: skip
    """Keys that do not change the weights: a run may be resumed with other values."""

    def __post_init__(self) -> None:
        checks: dict[str, tuple[bool, str]] = {
            "steps": (self.steps >= 1, "1 or more"),
            "tokens_per_batch": (self.tokens_per_batch >= 1, "1 or more"),
            "micro_batches": (self.micro_batches >= 1, "1 or more"),
            "lr": (0 < self.lr < math.inf, "above 0"),
            "optimizer": (self.optimizer in OPTIMIZERS, " | ".join(OPTIMIZERS)),
            "muon_lr": (0 < self.muon_lr < math.inf, "above 0"),
            "warmup_steps": (0 <= self.warmup_steps <= self.steps, f"0 to steps ({self.steps})"),
            "schedule": (self.schedule in SCHEDULES, " | ".join(SCHEDULES)),
            "min_lr_ratio": (0 <= self.min_lr_ratio <= 1, "0 to 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "betas": (all(0 <= beta < 1 for beta in self.betas) and len(self.betas) == 2, "two values, 0 <= beta < 1"),
            "eps": (0 < self.eps < math.inf, "above 0"),
            "clip_norm": (self.clip_norm > 0, "above 0 (inf = no clipping)"),
            "log_every": (self.log_every >= 1, "1 or more"),
            "save_every_s": (self.save_every_s is None or self.save_every_s >= 0, "0 or more, or none"),
            "save_every": (self.save_every >= 0, "0 or more"),
            "eval_every": (self.eval_every >= 0, "0 or more"),
            "patience": (self.patience >= 0, "0 or more"),
            "keep": (self.keep >= 1, "1 or more"),
        }
        for name, (fine, wanted) in checks.items():
            if not fine:
                raise TrainingError(
                    f"`{name}` of a training cannot be used", got=repr(getattr(self, name)), wanted=wanted, param=name
                )

    def lr_at(self, step: int) -> float:
        """The learning rate of step `step` (0 .. steps-1)."""
        return self.lr * schedule_factor(
            step,
            steps=self.steps,
            warmup_steps=self.warmup_steps,
            schedule=self.schedule,
            min_ratio=self.min_lr_ratio,
        )

    def deciding(self) -> dict[str, Any]:
        """The keys that change the weights."""
        judged = self.keep_best or self.patience > 0
        idle = {*self.COSMETIC} - ({"eval_every"} if judged else set())
        return {name: value for name, value in asdict(self).items() if name not in idle}
