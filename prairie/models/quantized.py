"""A model whose blocks' matrices are kept in fewer bits, and what that changes in its answers.

Norms, biases and experts stay as they are, and embedding and head unless they are asked for. The weights can no longer
be trained, merged or written; adapters stand on them as on the model itself, whose hash they keep.
Not here: the forms (`ops.packed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from prairie.errors import ModelError
from prairie.models.transformer import Transformer
from prairie.models.weights import hash_of
from prairie.ops.attention import PackedDocuments
from prairie.ops.packed import FEW_ROWS, Bits, PackedWeight

LONGEST_SAMPLE = 512
HEAD: dict[Bits, Bits] = {"bf16": "bf16", "int8": "int8", "int4": "int8"}
"""The form of the vocabulary's matrix beside blocks in some form; llama.cpp's files of four bits keep theirs in six."""


@dataclass(frozen=True)
class Quantization:
    """How a model was quantised, and its logits against those before, over `tokens` sample tokens."""

    bits: Bits
    tokens: int
    max_abs: float
    """The largest change of a logit."""
    kl: float
    """Mean KL divergence (nats) of the next token's distribution from what it was."""
    same_argmax: float
    """Share of places where the likeliest token is the same."""
    bytes_before: int
    bytes_after: int
    """Of all weights, embeddings and norms included."""
    head: Bits | None = None
    """Embedding and head hold only numbers that this form has, too."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.bits}: {self.bytes_before / 1e6:.1f} -> {self.bytes_after / 1e6:.1f} MB; over {self.tokens} tokens "
            f"the largest change of a logit is {self.max_abs:.3g}, KL {self.kl:.2g} nats, "
            f"the likeliest token the same in {self.same_argmax:.1%}"
        )


def quantize(model: Transformer, bits: Bits, sample: Sequence[Sequence[int]], head: bool = False) -> Quantization:
    """Packs the matrices of the blocks in place and measures the change on the rows `sample` of token ids. With `head`
    embedding and head are rounded to a form of their own (`HEAD`), so that it may be packed for speed; nf4 has none.

    ModelError for a model that is quantised already, or a sample without tokens.
    """
    if model.quantization is not None:
        raise ModelError("the model is quantised already", got=model.quantization.bits)
    rows = [list(row[: min(LONGEST_SAMPLE, model.config.max_context)]) for row in sample if len(row)]
    if not rows:
        raise ModelError("quantising needs some tokens to measure its error on", got="none")
    model.loaded_hashes = (hash_of(model), "")
    before, bytes_before = _logits(model, rows), bytes_of(model)
    for at in model.linears():
        if at.layer is not None:
            block = model.layers[at.layer]
            packed = PackedWeight(at.dense(), bits)
            delattr(block, at.group)
            setattr(block, at.group, packed)
    of_head = HEAD.get(bits) if head else None
    if of_head is not None:
        with torch.no_grad():
            for weight in (weight for weight in (model.embed, model.head) if isinstance(weight, Tensor)):
                weight.copy_(PackedWeight(weight, of_head).dense())
    after = _logits(model, rows)
    lost = before.log_softmax(-1)
    kl = (lost.exp() * (lost - after.log_softmax(-1))).sum(-1).mean()
    model.quantization = Quantization(
        bits=bits,
        tokens=len(before),
        max_abs=float((after - before).abs().max()),
        kl=max(0.0, float(kl)),
        same_argmax=float((after.argmax(-1) == before.argmax(-1)).float().mean()),
        bytes_before=bytes_before,
        bytes_after=bytes_of(model),
        head=of_head,
    )
    return model.quantization


def bytes_of(model: Transformer) -> int:
    """Of all tensors that the model keeps."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _logits(model: Transformer, rows: Sequence[list[int]]) -> Tensor:
    """(N, V) float32: of the rows, and of their beginnings one by one, as generation computes them: few rows at once
    may go another way through the packed weights."""
    device = model.embed.device
    with torch.no_grad():
        batches = [rows, *([row[:FEW_ROWS]] for row in rows)]
        return torch.cat(
            [
                model.logits(
                    model(
                        torch.tensor([token for row in batch for token in row], device=device),
                        PackedDocuments([len(row) for row in batch], device),
                    )
                ).float()
                for batch in batches
            ]
        )
