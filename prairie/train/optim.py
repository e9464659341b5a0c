"""The optimisers and the learning rate: fused AdamW (arXiv 1711.05101), decay on matrices only; Muon; four schedules.

Not here: when a step is taken (trainer). State goes in and out as named tensors, so a checkpoint needs no pickle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from prairie.errors import CheckpointError, TrainingError

OptimizerName = Literal["adamw", "muon"]
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)
Schedule = Literal["cosine", "linear", "constant", "wsd"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)

WSD_DECAY_SHARE = 0.2
"""The last share of the steps in which `wsd` comes down (arXiv 2404.06395 finds 10 to 20 % enough)."""


MUON_MOST = 1.0
"""An orthogonalised step has singular values near 1: at this rate it is as large as a fresh matrix."""


def rates_for(parameters: Iterable[Tensor]) -> tuple[float, float]:
    """The learning rates between which Adam can train these weights at all.

    Its first steps move every weight by about the rate. Above the weights' own size (root mean square of the matrices
    that are not all zero) such a step replaces them; below that size times float32's last bit it changes nothing.
    """
    squares = count = 0.0
    for parameter in parameters:
        if parameter.ndim >= 2:
            found = float(torch.linalg.vector_norm(parameter.detach(), dtype=torch.float32)) ** 2
            squares += found
            count += parameter.numel() if found else 0
    size = math.sqrt(squares / count) if count and math.isfinite(squares) else 1.0
    return size * torch.finfo(torch.float32).eps / 2, size


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


class Optimizer(Protocol):
    """What the trainer asks of an optimiser."""

    def gradient_norm(self) -> GradientNorm: ...

    def step(self, lr: float) -> None: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def load(self, tensors: Mapping[str, Tensor]) -> None: ...


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
        _copy_state(self.tensors(), tensors)

    def _moments(self) -> tuple[tuple[str, dict[str, Tensor]], ...]:
        return ("first", self._first), ("second", self._second)


class Muon:
    """Momentum, orthogonalised, for the matrices inside the blocks; AdamW for embeddings, head, norms and biases.

    https://kellerjordan.github.io/posts/muon, arXiv 2502.16982. A small model needs fewer tokens with it: after the
    same 300 k tokens of numerals its loss is 1.00 where AdamW's is 1.24 (docs/log.md).
    Equal to `torch.optim.Muon` but for the precision of the iteration (float32 here, where bfloat16 is no gain) and its
    shape: matrices of one size are orthogonalised together in one batched product.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        rate: float,
        momentum: float = 0.95,
    ) -> None:
        """`rate`: what `lr` of a step is multiplied with for the matrices. Raises TrainingError without matrices."""
        hidden = {name: p for name, p in named.items() if p.ndim == 2 and name.startswith("layers.")}
        if not hidden:
            raise TrainingError("muon finds no matrix of a block to train", mend="use adamw for adapters")
        others = {name: p for name, p in named.items() if name not in hidden}
        self.others = AdamW(others, betas=betas, eps=eps, weight_decay=weight_decay)
        self.hidden, self.rate, self.momentum, self.weight_decay = hidden, rate, momentum, weight_decay
        self._buffers = {name: torch.zeros_like(p, requires_grad=False) for name, p in hidden.items()}
        self._shapes: dict[torch.Size, list[str]] = {}
        for name, p in hidden.items():
            self._shapes.setdefault(p.shape, []).append(name)

    def gradient_norm(self) -> GradientNorm:
        """Over all parameters that have a gradient."""
        parameters = (*self.hidden.values(), *self.others.named.values())
        gradients = [p.grad for p in parameters if p.grad is not None]
        return GradientNorm(gradients, torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at rate `lr` (matrices: `lr * rate`); the gradients are gone afterwards."""
        self.others.step(lr)
        for (rows, columns), names in self._shapes.items():
            learning = [(self.hidden[name], grad, self._buffers[name])
                        for name in names if (grad := self.hidden[name].grad) is not None]  # fmt: skip
            if not learning:
                continue
            parameters, gradients, buffers = (list(column) for column in zip(*learning, strict=True))
            torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
            nesterov_MRC = torch.stack(torch._foreach_lerp(gradients, buffers, self.momentum))
            update_MRC = orthogonalised(nesterov_MRC)
            torch._foreach_mul_(parameters, 1 - lr * self.rate * self.weight_decay)
            scale = lr * self.rate * math.sqrt(max(1.0, rows / columns))
            torch._foreach_add_(parameters, list(update_MRC.unbind()), alpha=-scale)
            for parameter in parameters:
                parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The state: AdamW's, and `momentum/PARAMETER`."""
        return {**self.others.tensors(), **{f"momentum/{name}": value for name, value in self._buffers.items()}}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`. Raises CheckpointError if the names or shapes are not those of our parameters."""
        _copy_state(self.tensors(), tensors)


def orthogonalised(matrices_MRC: Tensor, iterations: int = 5) -> Tensor:
    """Newton-Schulz: each matrix with its singular values moved to about 1 (0.7 to 1.2), singular vectors kept."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices_MRC.shape[1] > matrices_MRC.shape[2]
    x_MRC = matrices_MRC.mT if tall else matrices_MRC
    x_MRC = x_MRC / torch.linalg.matrix_norm(x_MRC, keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram_MRR = x_MRC @ x_MRC.mT
        x_MRC = torch.baddbmm(x_MRC, torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=b, alpha=c), x_MRC, beta=a)
    return x_MRC.mT if tall else x_MRC


def _copy_state(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    unlike = {name for name in {**mine, **theirs} if _shape(mine, name) != _shape(theirs, name)}
    if unlike:
        name = min(unlike)
        raise CheckpointError(
            "a checkpoint's optimiser state does not fit the model",
            got=f"{name} {_shape(theirs, name)}",
            wanted=_shape(mine, name),
        )
    for name, value in mine.items():
        value.copy_(theirs[name])


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(tensors[name].shape) if name in tensors else "missing"
