"""The optimiser and the learning rate: fused AdamW (arXiv 1711.05101) with decay on matrices only, and four schedules.

Not here: when a step is taken (trainer). State goes in and out as named tensors, so a checkpoint needs no pickle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from prairie.errors import CheckpointError

Schedule = Literal["cosine", "linear", "constant", "wsd"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)

WSD_DECAY_SHARE = 0.2
"""The last share of the steps in which `wsd` comes down (arXiv 2404.06395 finds 10 to 20 % enough)."""


def schedule_factor(step: int, *, steps: int, warmup_steps: int, schedule: str, min_ratio: float) -> float:
    """What the peak rate is multiplied with in step `step` (0 .. steps-1): up to 1 in `warmup_steps`, then by name.

    A pure function of its arguments: a resumed run needs only the step.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    past = (step - warmup_steps) / max(1, steps - warmup_steps)  # 0 <= past < 1
    match schedule:
        case "cosine":
            return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * past))
        case "linear":
            return 1 - (1 - min_ratio) * past
        case "wsd":
            return 1 - (1 - min_ratio) * max(0.0, (past - (1 - WSD_DECAY_SHARE)) / WSD_DECAY_SHARE)
        case _:
            return 1.0


@dataclass(frozen=True)
class GradientNorm:
    """The gradients of a step and their common 2-norm, still on the device."""

    gradients: list[Tensor]
    norm: Tensor

    def clip(self, norm: float, limit: float) -> None:
        """Scales the gradients in place so that their norm is at most `limit`; `norm` is `self.norm` as a number."""
        if norm > limit:
            torch._foreach_mul_(self.gradients, limit / norm)


class AdamW:
    """AdamW over named parameters, one fused kernel call for the matrices and one for the rest.

    The kernel is the one behind `torch.optim.AdamW(fused=True)`, called directly: that class imports torch's compiler,
    which costs each process a second and 70 MB, and spends as long as the kernel itself on small models.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], *, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.named = dict(named)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self._step = torch.zeros((), device=next(iter(self.named.values())).device)
        self._first = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.named.items()}
        self._second = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.named.items()}

    def gradient_norm(self) -> GradientNorm:
        """Over all parameters that have a gradient."""
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        return GradientNorm(gradients, torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at rate `lr`; the gradients are gone afterwards."""
        self._step += 1
        self._update([name for name, p in self.named.items() if p.ndim >= 2], lr, self.weight_decay)
        self._update([name for name, p in self.named.items() if p.ndim < 2], lr, 0.0)
        # The fused kernel writes without telling autograd, and whoever keeps something made from the weights (a hash,
        # a fused adapter) asks for their version.
        increment_version(self.named.values())
        for parameter in self.named.values():
            parameter.grad = None

    def _update(self, names: list[str], lr: float, weight_decay: float) -> None:
        learning = [(name, p, p.grad) for name in names if (p := self.named[name]).grad is not None]
        if not learning:
            return
        torch._fused_adamw_(
            [p for _, p, _ in learning],
            [grad for _, _, grad in learning],
            [self._first[name] for name, _, _ in learning],
            [self._second[name] for name, _, _ in learning],
            [],
            [self._step] * len(learning),
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The state: `step`, `first/PARAMETER` and `second/PARAMETER` (moments), the tensors themselves."""
        moments = {f"{key}/{name}": value for key, named in self._moments() for name, value in named.items()}
        return {"step": self._step, **moments}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`. Raises CheckpointError if the names or shapes are not those of our parameters."""
        mine = self.tensors()
        unlike = {name for name in {**mine, **tensors} if _shape(mine, name) != _shape(tensors, name)}
        if unlike:
            name = min(unlike)
            raise CheckpointError(
                "a checkpoint's optimiser state does not fit the model",
                got=f"{name} {_shape(tensors, name)}",
                wanted=_shape(mine, name),
            )
        for name, value in mine.items():
            value.copy_(tensors[name])

    def _moments(self) -> tuple[tuple[str, dict[str, Tensor]], ...]:
        return ("first", self._first), ("second", self._second)


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(tensors[name].shape) if name in tensors else "missing"
