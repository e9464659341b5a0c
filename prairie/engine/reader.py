"""The Python face of a model that reads and does not write: an encoder, or any body under a head of scores.

    model = prairie.load("DIR")
    model.embed(["a text", "another"])      # vectors
    model.scores(["a text"])                # of a classifier, by label
    model.fill("Paris is the [MASK] of France.")

Not here: how a row becomes a vector (`models.pooling`), texts to packed rows (`embedding`).

Legend: B texts, D width, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

import torch
from torch import Tensor

from prairie.data.tokenizer import Tokenizer
from prairie.engine.embedding import Embedder
from prairie.engine.language_model import check_vocabulary
from prairie.errors import ModelError, RequestError
from prairie.models.config import ModelConfig
from prairie.models.lora import AdapterRows, LoRA
from prairie.models.transformer import Transformer
from prairie.models.weights import hash_of, load_model
from prairie.ops.attention import PackedDocuments
from prairie.runtime import Runtime


class Reader:
    """A model that gives vectors and scores. Use it from one thread at a time."""

    engine: None = None
    """It writes nothing, so it needs none."""
    template: None = None

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        name: str = "model",
        folder: Path | None = None,
        lora: LoRA | None = None,
    ) -> None:
        """`lora`: an adapter that brings a head of scores. Raises TokenizerError if the tokenizer has ids that the
        model has not, ModelError if the folder pools its embeddings in a way that is not computed here, AdapterError
        if the adapter stands on another base."""
        check_vocabulary(tokenizer, model.config)
        self.name, self.folder = name, folder
        self.model, self.tokenizer = model.eval(), tokenizer
        self.config: ModelConfig = model.config
        self.weights_hash = hash_of(model)
        self.embedder = Embedder.of_folder(folder, self.model, tokenizer)
        self.adapters: list[AdapterRows] = []
        self.adapter_hash: str | None = None
        if lora is not None:
            lora.require_base(model, name)
            self.adapters, self.adapter_hash = [AdapterRows(lora.eval())], lora.hash

    @classmethod
    def load(cls, folder: Path | str, runtime: Runtime | None = None, adapter: Path | str | None = None) -> Reader:
        """Reads a model folder, and an adapter folder with a head of scores. Raises ModelError, AdapterError or
        TokenizerError for files that are missing or damaged."""
        folder, runtime = Path(folder), runtime or Runtime()
        model = load_model(folder, runtime.torch_dtype()).to(runtime.device)
        lora = None if adapter is None else LoRA.load(adapter).to(runtime.device)
        name = folder.name if adapter is None else Path(adapter).name
        return cls(model, Tokenizer.load(folder), name=name, folder=folder, lora=lora)

    def embed(self, texts: str | Seq[str]) -> Tensor:
        """(B, D) float32: a vector of each text, pooled as the folder's sentence-transformers files say; without them
        the mean of the final hidden states. Raises RequestError, ContextLengthError, ModelError with an adapter."""
        if self.adapters:
            raise ModelError(f"{self.name} is an adapter that scores and gives no vectors", mend="load its base alone")
        return self.embedder([texts] if isinstance(texts, str) else texts)

    @torch.no_grad()
    def scores(self, texts: str | Seq[str] | Seq[tuple[str, str]]) -> list[dict[str, float]]:
        """Of each text, or pair of texts, the score of every label (before any softmax), by a head that classifies.

        Raises ModelError for a model without one, RequestError, ContextLengthError.
        """
        head = self.config.head
        labels = self.adapters[0].lora.labels if self.adapters else head.labels if head is not None else ()
        if not self.adapters and (head is None or head.kind != "classify"):
            raise ModelError(
                f"{self.name} classifies no texts",
                got="no head" if head is None else f"the head {head.kind}",
                wanted="a sequence classifier",
            )
        found = []
        for given in [texts] if isinstance(texts, str) else texts:
            text, pair = (given, None) if isinstance(given, str) else given
            ids, segments = self.embedder.marked(text, pair)
            scores_1L = self.model.scores(self._hidden(ids, segments), [len(ids)], self.adapters)
            found.append(dict(zip(labels, scores_1L[0].float().tolist(), strict=True)))
        return found

    @torch.no_grad()
    def fill(self, text: str, top: int = 5) -> list[list[tuple[str, float]]]:
        """For each mask token in the text its `top` likeliest tokens, as text, with their probabilities.

        Raises ModelError for a model without a head for it, RequestError for a text without a mask.
        """
        ids, segments = self.embedder.marked(text, special=True)
        places = [place for place, token in enumerate(ids) if token == self.tokenizer.mask_id]
        if not places:
            raise RequestError("the text has nothing to fill", wanted=f"the mask token in it: {self.tokenizer.mask_id}")
        hidden_ND = self._hidden(ids, segments)[torch.tensor(places)]
        probs_MV = self.model.logits(hidden_ND).float().softmax(-1)
        best = probs_MV.topk(min(top, probs_MV.shape[1]), -1)
        return [
            [(self.tokenizer.decode([token]).strip(), p) for token, p in zip(tokens, probs, strict=True)]
            for tokens, probs in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def _hidden(self, ids: list[int], segments: list[int]) -> Tensor:
        device = self.model.embed.device
        tokens_N, segments_N = torch.tensor(ids, device=device), torch.tensor(segments, device=device)
        attend = PackedDocuments([len(ids)], device)
        hidden_ND: Tensor = self.model(tokens_N, attend, self.adapters, segments_N=segments_N)
        return hidden_ND

    def __repr__(self) -> str:
        return f"<Reader {self.name}: {self.config.parameters():,} parameters>"
