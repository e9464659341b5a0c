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
    """torch's fused AdamW over named parameters."""

    def __init__(
        self, named: Mapping[str, nn.Parameter], *, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.named = dict(named)
        matrices = [p for p in self.named.values() if p.ndim >= 2]
        others = [p for p in self.named.values() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._torch = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=betas, eps=eps, fused=True
        )

    def gradient_norm(self) -> GradientNorm:
        """Over all parameters that have a gradient."""
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        return GradientNorm(gradients, torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))

    def step(self, lr: float) -> None:
        """One update at rate `lr`; the gradients are gone afterwards."""
        for group in self._torch.param_groups:
            group["lr"] = lr
        self._torch.step()
        # The fused kernel writes without telling autograd, and whoever keeps something made from the weights (a hash,
        # a fused adapter) asks for their version.
        increment_version(self.named.values())
        self._torch.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state as `KEY/PARAMETER` -> tensor; empty before the first step."""
        return {
            f"{key}/{name}": value
            for name, parameter in self.named.items()
            for key, value in self._torch.state.get(parameter, {}).items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`. Raises CheckpointError for a parameter that is not ours or of another shape."""
        self._torch.state.clear()
        for full_name, value in tensors.items():
            key, _, name = full_name.partition("/")
            parameter = self.named.get(name)
            if parameter is None or (value.ndim and value.shape != parameter.shape):
                raise CheckpointError(
                    "a checkpoint's optimiser state does not fit the model",
                    got=f"{full_name} {tuple(value.shape)}",
                    wanted=tuple(parameter.shape) if parameter is not None else "a parameter that is trained",
                )
            # Into memory of our own: what a file is mapped to may lie at another alignment.
            mine = torch.empty(value.shape, dtype=value.dtype, device=parameter.device)
            self._torch.state[parameter][key] = mine.copy_(value)
