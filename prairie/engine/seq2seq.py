"""The Python face of an encoder-decoder (T5, BART, Marian): a text in, another text out.

    model = prairie.load("DIR")
    model.generate("translate English to German: The house is wonderful.", temperature=0).text

A plain loop with a cache: texts that are answered together are encoded in one pass and grow by a token a step each.
Not here: the engine that batches decoders continuously (`engine`), HTTP (no route serves encoder-decoders).

Legend: B rows, N = B query tokens of a step, M tokens that the encoder read, T tokens written so far, H query heads,
K key/value heads, D size of a head, W width, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prairie.data.records import Message
from prairie.data.tokenizer import Tokenizer
from prairie.engine.language_model import check_vocabulary, conversation, items_of, params_of
from prairie.engine.request import Completion, FinishReason, Request, SamplingParams, Sequence, TextStream
from prairie.engine.sampler import Sampler
from prairie.errors import ContextLengthError, ModelError, RequestError
from prairie.models.config import ModelConfig
from prairie.models.transformer import Transformer
from prairie.models.weights import hash_of, load_model
from prairie.ops.attention import CAUSAL, PackedDocuments, Sight
from prairie.ops.cross_attention import Memory
from prairie.ops.relative import RelativeBias
from prairie.runtime import Runtime


class GrowingRows:
    """`ops.attention.Attend` of rows that have one length and grow by one token a step; keys and values are kept."""

    def __init__(self, rows: int, limit: int, device: torch.device) -> None:
        self.rows, self.limit, self.device = rows, limit, device
        self.length = 0
        """Tokens of each row, the step's included."""
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def step(self) -> GrowingRows:
        """Each row brings one more token."""
        self.length += 1
        return self

    @property
    def positions_N(self) -> Tensor:
        return torch.full((self.rows,), self.length - 1, device=self.device)

    @property
    def row_lengths_N(self) -> Tensor:
        return torch.full((self.rows,), self.length, device=self.device)

    def __call__(
        self,
        layer: int,
        q_NHD: Tensor,
        k_NKD: Tensor,
        v_NKD: Tensor,
        sight: Sight = CAUSAL,
        bias: RelativeBias | None = None,
    ) -> Tensor:
        """o_NHD; with a window or a cap on the scores it would have to know more, so these are refused."""
        if sight != CAUSAL:
            raise ModelError("an encoder-decoder is decoded only with plain causal attention", got=sight)
        if layer not in self.kept:
            shape = (self.rows, k_NKD.shape[1], self.limit, k_NKD.shape[2])
            self.kept[layer] = k_NKD.new_empty(shape), v_NKD.new_empty(shape)
        keys_BKTD, values_BKTD = self.kept[layer]
        keys_BKTD[:, :, self.length - 1], values_BKTD[:, :, self.length - 1] = k_NKD, v_NKD
        o_BH1D = F.scaled_dot_product_attention(
            q_NHD[:, :, None], keys_BKTD[:, :, : self.length], values_BKTD[:, :, : self.length],
            attn_mask=None if bias is None else bias(self.length - 1, self.length, self.length),
            enable_gqa=q_NHD.shape[1] != k_NKD.shape[1],
        )  # fmt: skip
        return o_BH1D[:, :, 0]


class Seq2Seq:
    """A model that answers a text by a text. Use it from one thread at a time."""

    adapter_hash: None = None

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, name: str = "model", folder: Path | None = None
    ) -> None:
        """Raises TokenizerError if the tokenizer has ids that the model has not, ModelError if the config does not say
        by which token an answer begins."""
        check_vocabulary(tokenizer, model.config)
        self.name, self.folder = name, folder
        self.model, self.tokenizer = model.eval(), tokenizer
        self.config: ModelConfig = model.config
        if self.config.start_id is None:
            raise ModelError(
                "the config does not say by which token an answer begins",
                wanted="decoder_start_token_id in config.json or generation_config.json",
            )
        self.weights_hash = hash_of(model)

    @classmethod
    def load(cls, folder: Path | str, runtime: Runtime | None = None) -> Seq2Seq:
        """Reads a model folder. Raises ModelError or TokenizerError for files that are missing or damaged."""
        folder, runtime = Path(folder), runtime or Runtime()
        model = load_model(folder, runtime.torch_dtype()).to(runtime.device)
        return cls(model, Tokenizer.load(folder), name=folder.name, folder=folder)

    def generate(self, messages_or_prompt: Any, **sampling: Any) -> Completion | list[Completion]:
        """Answers a text, or a list of texts in one batch. `sampling` are the fields of SamplingParams.

        A conversation of one user message is its text; a longer one is refused, as these models know no turns.
        Raises RequestError, ContextLengthError.
        """
        items, single = items_of(messages_or_prompt)
        params = params_of(sampling)
        first = secrets.randbits(62) if params.seed is None else params.seed
        rows = [self.ids(_text_of(item)) for item in items]
        sequences = [self._sequence(str(i), row, params, first + i) for i, row in enumerate(rows)]
        completions = self._write(sequences, rows, lambda text: None) if sequences else []
        return completions[0] if single else completions

    def answer(self, messages: Any, params: SamplingParams, on_text: Callable[[str], object]) -> Completion:
        """One text answered, told piece by piece."""
        row = self.ids(_text_of(messages))
        seed = secrets.randbits(62) if params.seed is None else params.seed
        return self._write([self._sequence("0", row, params, seed)], [row], on_text)[0]

    def ids(self, text: str) -> list[int]:
        """What the encoder reads. Raises RequestError for nothing, ContextLengthError for too much."""
        ids = self.tokenizer.encode_input(text).ids
        if not text or not ids:
            raise RequestError("the prompt is empty", wanted="at least one token", param="prompt")
        assert self.config.encoder is not None
        if len(ids) > self.config.encoder.max_context:
            raise ContextLengthError(
                "the text is longer than the model reads",
                got=f"{len(ids)} tokens",
                wanted=f"at most {self.config.encoder.max_context}",
                mend="cut it into several texts",
                param="prompt",
            )
        return ids

    def _sequence(self, id: str, row: list[int], params: SamplingParams, seed: int) -> Sequence:
        """The answer under way: what stands before its first token is the start token, not the prompt."""
        c = self.config
        eos = c.eos_id if isinstance(c.eos_id, tuple) else (c.eos_id,)
        stops = (
            params.stop_ids if params.ignore_eos else (*params.stop_ids, *(each for each in eos if each is not None))
        )
        sequence = Sequence(
            Request(id, [c.start_id or 0], params),
            arrival=int(id),
            seed=seed & (2**64 - 1),
            max_length=min(1 + params.max_tokens, c.max_context),
            stop_ids=frozenset(stops),
            stream=TextStream(self.tokenizer, params.stop, continuation=False),
            root_hash=b"",
            lora=None,
        )
        sequence.row = int(id)
        return sequence

    @torch.inference_mode()
    def _write(
        self, sequences: list[Sequence], rows: list[list[int]], on_text: Callable[[str], object]
    ) -> list[Completion]:
        """All rows take every step together; what a row that has ended draws is thrown away. `on_text` hears the text
        of the first row as it grows."""
        c, device = self.config, self.model.embed.device
        lengths = [len(row) for row in rows]
        tokens_M = torch.tensor([token for row in rows for token in row], device=device)
        hidden_MW = self.model.encode(tokens_M, PackedDocuments(lengths, device))
        memory = Memory(hidden_MW, lengths, [1] * len(rows), keep=True)
        sampler = Sampler(len(rows), min(self.tokenizer.vocab_size, c.vocab_size), device)
        for sequence in sequences:
            sampler.seat(sequence)
        attend = GrowingRows(len(rows), max(sequence.max_length for sequence in sequences), device)
        places = np.arange(len(rows))
        ended: dict[int, FinishReason] = {}
        tokens_N = torch.full((len(rows),), c.start_id or 0, device=device)
        while len(ended) < len(sequences):
            logits_NV = self.model.logits(self.model(tokens_N, attend.step(), memory=memory)).float()
            written = attend.length - 1
            sampled = sampler(self._allowed(logits_NV, written), places, np.full(len(rows), written))
            if sampled.broken:
                raise ModelError("the model gave logits that are not finite", mend="check the weights")
            for place, sequence in enumerate(sequences):
                if place not in ended:
                    tops = sampled.tops[place] if sampled.tops else None
                    reason, text = _take(sequence, sampled.tokens[place], sampled.logprobs[place], tops)
                    if reason is not None:
                        ended[place] = reason
                    if place == 0:
                        on_text(text)
            tokens_N = torch.tensor(sampled.tokens, device=device)
        completions = []
        for place, sequence in enumerate(sequences):
            assert sequence.stream is not None
            rest = sequence.stream.finish()
            if place == 0:
                on_text(rest)
            completion = sequence.completion(sequence.stream.text, ended[place])
            completions.append(_of_prompt(completion, lengths[place]))
        return completions

    def _allowed(self, logits_NV: Tensor, written: int) -> Tensor:
        """The logits of what may be written next, by the rules of the folder."""
        c = self.config
        if c.never_ids:
            logits_NV[:, list(c.never_ids)] = float("-inf")
        if written == 0 and c.first_id is not None:
            only_NV = torch.full_like(logits_NV, float("-inf"))
            only_NV[:, c.first_id] = logits_NV[:, c.first_id]
            return only_NV
        return logits_NV

    def embed(self, texts: str | Seq[str]) -> Tensor:
        """Raises RequestError: no vector of a text was ever trained in such a model."""
        raise RequestError(
            f"{self.name} is an encoder-decoder, which gives no vectors of texts", mend="take an encoder", param="model"
        )

    def __repr__(self) -> str:
        return f"<Seq2Seq {self.name}: {self.config.parameters():,} parameters>"


def _take(
    sequence: Sequence, token: int, logprob: float, tops: list[tuple[int, float]] | None
) -> tuple[FinishReason | None, str]:
    """One more token of an answer: why it has ended, if it has, and the text that is certain now."""
    sequence.ids.append(token)
    sequence.logprobs.append(logprob)
    if tops is not None:
        sequence.top_logprobs.append(tops)
    if token in sequence.stop_ids:
        return "stop", ""
    assert sequence.stream is not None
    text = sequence.stream.push(token)
    if sequence.stream.stopped:
        return "stop", text
    return ("length" if len(sequence.ids) >= sequence.max_length else None), text


def _of_prompt(completion: Completion, tokens: int) -> Completion:
    return replace(completion, prompt_tokens=tokens)


def _text_of(item: Any) -> str:
    if isinstance(item, str):
        return item
    messages: tuple[Message, ...] = conversation(item)
    if len(messages) != 1 or messages[0].role != "user":
        raise RequestError(
            "an encoder-decoder answers a text and knows no conversation",
            got=f"{len(messages)} messages",
            wanted="one user message",
            param="messages",
        )
    return messages[0].content
