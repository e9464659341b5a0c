"""What rows share at their beginning stands once in a batch: the prompt of a pair, of all pairs that answer it, of all
conversations under one system prompt.

A token's hidden state depends on what stands before it and on nothing behind it, so the rows that begin alike have the
same states there. The row that comes first holds them, the others go on from it; nothing is approximated.
Not here: the attention that lets several rows see one beginning (`ops.attention`).

Shapes: N tokens of all rows as the data has them, M <= N tokens that are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prairie.data.loader import Batch
from prairie.ops.attention import NO_PREFIX, Prefix

LEAST_SHARED = 16
"""Fewer tokens cost more to share than to compute."""


@dataclass(frozen=True)
class Layout:
    """What a model is given for a batch."""

    tokens: Tensor
    """(M,) int64."""
    lengths: Sequence[int]
    """Tokens that each row adds."""
    prefixes: Sequence[Prefix] = ()
    places_N: Tensor | None = None
    """Where each token of the batch is computed; None: every token at its own place."""


def layout_of(batch: Batch) -> Layout:
    """Rows that begin like the last row that stands whole go on from it. The same batch gives the same layout."""
    tokens_N, lengths = batch.tokens_N.numpy(), batch.lengths
    starts = np.cumsum([0, *lengths]).tolist()
    whole, prefixes = 0, [NO_PREFIX]
    for row in range(1, len(lengths)):
        alike = _common(tokens_N[starts[whole] : starts[whole + 1]], tokens_N[starts[row] : starts[row + 1] - 1])
        if alike >= LEAST_SHARED:
            prefixes.append(Prefix(whole, alike))
        else:
            whole = row
            prefixes.append(NO_PREFIX)
    if not any(prefix.tokens for prefix in prefixes):
        return Layout(batch.tokens_N, lengths)
    own_N = np.ones(len(tokens_N), np.bool_)
    for start, prefix in zip(starts, prefixes, strict=False):
        own_N[start : start + prefix.tokens] = False
    places_N = np.cumsum(own_N) - 1
    for start, prefix in zip(starts, prefixes, strict=False):
        places_N[start : start + prefix.tokens] = places_N[starts[prefix.row] :][: prefix.tokens]
    own = [length - prefix.tokens for length, prefix in zip(lengths, prefixes, strict=True)]
    return Layout(batch.tokens_N[torch.from_numpy(own_N)], own, prefixes, torch.from_numpy(places_N))


def joined(layouts: Sequence[Layout]) -> Layout:
    """The layouts one behind the other, as one; `places_N` is left out."""
    prefixes: list[Prefix] = []
    lengths: list[int] = []
    for layout in layouts:
        mine = layout.prefixes or [NO_PREFIX] * len(layout.lengths)
        prefixes += [prefix._replace(row=prefix.row + len(lengths)) for prefix in mine]
        lengths += layout.lengths
    shared = any(prefix.tokens for prefix in prefixes)
    return Layout(torch.cat([layout.tokens for layout in layouts]), lengths, prefixes if shared else ())


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two rows begin with alike."""
    size = min(len(one), len(other))
    unlike = one[:size] != other[:size]
    first = int(unlike.argmax()) if size else 0
    return first if size and unlike[first] else size
