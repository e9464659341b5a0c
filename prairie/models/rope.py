"""Rotary frequencies and the five ways of stretching them for a longer context.

Two of them (dynamic, longrope) turn a token differently in a longer row; `alike` says which lengths are turned alike.
Not here: the rotation itself (`ops.attention`), how a config names these (`families`).

Legend: D size of a head, N tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prairie.models.config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig, length: int = 0, window: bool = False) -> Tensor:
    """(D/2,) turns per token in radians, 0 for pairs that do not turn, in a row of `length` tokens.

    `window` asks for those of layers with a window, where they differ.
    """
    size = config.rotary_dim
    own = window and config.window_rope_theta > 0
    theta = config.window_rope_theta if own else config.rope_theta
    with torch.device("cpu"):  # also under "meta", where this would import torch's compiler and hold nothing
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        frequencies = 1.0 / theta**exponents
        if config.rope_scaling is not None and not own:
            frequencies = _stretched(frequencies, exponents, theta, config.rope_scaling, length)
        still = torch.zeros((config.head_dim - size) // 2)
    return torch.cat([frequencies, still])


def rope_magnitudes(config: ModelConfig, window: bool = False) -> Tensor | None:
    """(D/2,) how much longer turning makes each pair; None: it keeps all lengths."""
    scaling = config.rope_scaling
    if scaling is None or scaling.magnitude == 1.0 or (window and config.window_rope_theta > 0):
        return None
    with torch.device("cpu"):
        magnitudes = torch.ones(config.head_dim // 2)
        magnitudes[: config.rotary_dim // 2] = scaling.magnitude
    return magnitudes


def depends_on_length(config: ModelConfig) -> bool:
    """Whether a token turns differently in a longer row."""
    scaling = config.rope_scaling
    return config.positions == "rotary" and scaling is not None and scaling.kind in ("dynamic", "longrope")


def alike(config: ModelConfig, length: int) -> int:
    """The shortest length whose rows are turned as rows of `length` tokens are; always 0 where length is no matter."""
    scaling = config.rope_scaling
    if scaling is None or not depends_on_length(config) or length <= scaling.original_max_context:
        return 0
    return length if scaling.kind == "dynamic" else scaling.original_max_context + 1


def _stretched(frequencies: Tensor, exponents: Tensor, theta: float, scaling: RopeScaling, length: int) -> Tensor:
    original = scaling.original_max_context
    match scaling.kind:
        case "linear":  # arXiv 2306.15595
            return frequencies / scaling.factor
        case "dynamic":  # NTK-aware, by the length at hand: arXiv 2309.00071, section 3.3 and appendix
            size = 2 * len(frequencies)
            stretch = scaling.factor * max(length, original) / original - (scaling.factor - 1)
            return 1.0 / (theta * stretch ** (size / (size - 2))) ** exponents
        case "llama3":  # arXiv 2407.21783
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            blend = (original / (2 * math.pi / frequencies) - low) / (high - low)
            return _blended(frequencies, scaling.factor, blend.clamp(0.0, 1.0))
        case "yarn":  # arXiv 2309.00071
            return _blended(frequencies, scaling.factor, 1 - _yarn_ramp(2 * len(frequencies), theta, scaling))
        case "longrope":  # arXiv 2402.13753
            factors = scaling.long_factors if length > original else scaling.short_factors
            return frequencies / torch.tensor(factors)
    raise AssertionError(scaling.kind)


def _blended(frequencies: Tensor, factor: float, kept: Tensor) -> Tensor:
    """Frequencies divided by the factor where `kept` is 0, as they are where it is 1."""
    return (1 - kept) * frequencies / factor + kept * frequencies


def _yarn_ramp(size: int, theta: float, scaling: RopeScaling) -> Tensor:
    """(size/2,) 0 for pairs that turn more than beta_fast times in the original context, 1 below beta_slow times."""

    def pair_of(turns: float) -> float:
        return size * math.log(scaling.original_max_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    return ramp.clamp(0, 1)
