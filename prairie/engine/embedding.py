"""Texts to vectors, with any kind of Transformer: rows packed one behind the other, pooled as the model's folder says.

Not here: how a row becomes one vector (`models.pooling`), HTTP (`serve.embedding`).

Legend: N tokens of all rows, B texts, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path

import torch
from torch import Tensor

from prairie.data.tokenizer import Tokenizer
from prairie.errors import ContextLengthError, RequestError
from prairie.models.lora import AdapterRows, LoRA
from prairie.models.pooling import Pooling, read_pooling
from prairie.models.transformer import Transformer
from prairie.ops.attention import PackedDocuments

ROWS_TOKENS = 8192
"""Tokens of one forward pass."""


class Embedder:
    """A model as a maker of vectors. Use it from one thread at a time."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, pooling: Pooling | None = None) -> None:
        """`pooling` None: the mean of the final hidden states, as they are."""
        self.model, self.tokenizer, self.given = model, tokenizer, pooling
        self.pooling = pooling or Pooling()
        context = model.config.max_context
        self.max_tokens = min(context, self.pooling.max_tokens or context)

    @classmethod
    def of_folder(cls, folder: Path | None, model: Transformer, tokenizer: Tokenizer) -> Embedder:
        """Pools as the folder's sentence-transformers files say. Raises ModelError if that is not computed here."""
        return cls(model, tokenizer, None if folder is None else read_pooling(folder))

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, with the marks the model was trained to see around it; never cut.

        Raises RequestError for a text without tokens, ContextLengthError for one that is too long.
        """
        if not text:
            raise RequestError("a text to embed is empty", wanted="at least one token", param="input")
        return self.marked(self.pooling.prefix + text)[0]

    def marked(self, text: str, pair: str | None = None, *, special: bool = False) -> tuple[list[int], list[int]]:
        """Token ids of a text or a pair of texts with the marks around them, and the number of the text of each.

        With `special`, literal special tokens are read as such. Raises what `ids` raises.
        """
        if self.pooling.lower_case:
            text, pair = text.lower(), None if pair is None else pair.lower()
        if self.given is None and self.model.config.causal:  # read as it was trained: as the beginning of a document
            if pair is not None:
                raise RequestError("a decoder reads one text, not a pair", param="input")
            bos = self.tokenizer.bos_id
            ids = self.tokenizer.encode(text, special=special)
            ids = [bos, *ids] if self.tokenizer.adds_bos and bos is not None else ids
            return self.checked(ids), [0] * len(ids)
        encoded = self.tokenizer.encode_input(text, pair, special=special)
        return self.checked(encoded.ids), encoded.type_ids

    def checked(self, ids: list[int]) -> list[int]:
        """The ids. Raises RequestError for none or unknown ones, ContextLengthError for too many."""
        if not ids:
            raise RequestError("a text to embed is empty", wanted="at least one token", param="input")
        if len(ids) > self.max_tokens:
            raise ContextLengthError(
                "a text to embed is longer than the model's context",
                got=f"{len(ids)} tokens",
                wanted=f"at most {self.max_tokens}",
                mend="cut it into several texts",
                param="input",
            )
        if min(ids) < 0 or max(ids) >= self.model.config.vocab_size:
            raise RequestError(
                "there are unknown token ids", wanted=f"0 to {self.model.config.vocab_size - 1}", param="input"
            )
        return ids

    def __call__(self, texts: Seq[str], lora: LoRA | None = None) -> Tensor:
        """(B, D) float32."""
        parts = [self.vectors(part, lora) for part in parts_of([self.ids(text) for text in texts])]
        return torch.cat(parts) if parts else torch.empty(0, self.model.config.dim)

    @torch.no_grad()
    def vectors(self, rows: Seq[Seq[int]], lora: LoRA | None = None) -> Tensor:
        """(B, D) float32 of rows of token ids, in one forward pass."""
        tokens_N = torch.tensor([token for row in rows for token in row], device=self.model.embed.device)
        lengths = [len(row) for row in rows]
        adapters = [AdapterRows(lora)] if lora is not None else []
        return self.pooling(self.model(tokens_N, PackedDocuments(lengths, tokens_N.device), adapters), lengths)


def parts_of(rows: Seq[list[int]], tokens: int = ROWS_TOKENS) -> Iterator[list[list[int]]]:
    """The rows, in order, in groups of at most so many tokens; a longer row is alone."""
    part: list[list[int]] = []
    size = 0
    for row in rows:
        if part and size + len(row) > tokens:
            yield part
            part, size = [], 0
        part.append(row)
        size += len(row)
    if part:
        yield part
