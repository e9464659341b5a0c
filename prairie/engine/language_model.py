"""The Python face of a model: what `prairie.load` returns.

    model = prairie.load("spark")
    model.generate("What is 2 + 3?", temperature=0).text
    model.logits([[1, 2, 3]])

Base, tokenizer, template and adapter are checked against each other when they are loaded; what does not belong together
is refused in one sentence. Not here: names of a registry (`prairie.load` resolves them), batching (`engine`).

Shapes: B rows, T tokens of each, V vocabulary, D width.
"""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from prairie.data.chat_template import ChatTemplate, Options
from prairie.data.records import Message, Tools, message_from_json, tools_from_json
from prairie.data.tokenizer import Tokenizer
from prairie.engine.embedding import Embedder
from prairie.engine.engine import Engine
from prairie.engine.request import Completion, Request, SamplingParams
from prairie.errors import AdapterError, ContextLengthError, ModelError, RequestError, TokenizerError
from prairie.models.config import ModelConfig
from prairie.models.lora import AdapterRows, LoRA
from prairie.models.quantized import Quantization
from prairie.models.quantized import quantize as pack
from prairie.models.transformer import Transformer
from prairie.models.weights import hash_of, load_model, read_manifest
from prairie.ops.attention import PackedDocuments
from prairie.ops.packed import Bits
from prairie.runtime import Runtime

Conversation = Seq[Message | Mapping[str, Any]]
SAMPLING_KEYS = tuple(field.name for field in fields(SamplingParams))


QUANTIZATION_SAMPLE = (
    "Once upon a time there was a little horse at the edge of the prairie. One day she asked: what is 7 + 12?",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "从前有一匹小马，住在草原边上。有一天她问：七加十二等于多少？",
)
"""What the error of quantised weights is measured on."""


class LanguageModel:
    """A model that answers. Use it from one thread at a time."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        lora: LoRA | None = None,
        name: str = "model",
        folder: Path | None = None,
        weights_hash: str | None = None,
        **engine_settings: Any,
    ) -> None:
        """`engine_settings` go to `Engine`; `weights_hash` is given of weights that were read just now and hashed
        then. Raises ModelError for a model that does not continue text, TokenizerError
        if the tokenizer has ids that the model has not, AdapterError if `lora` stands on another base."""
        if model.config.kind != "decoder" or not model.config.writes:
            raise ModelError(
                f"{name} gives scores, not text" if model.config.labels else f"{name} does not continue text",
                got=f"an {model.config.kind}" if model.config.head is None else f"the head {model.config.head.kind}",
                wanted="a decoder with a vocabulary",
                mend="prairie.load(DIR) gives the face that fits",
            )
        if lora is not None and lora.score is not None:
            raise AdapterError(
                f"{name} gives scores, not text",
                got=", ".join(lora.labels),
                mend="prairie.load gives the face that fits",
            )
        check_vocabulary(tokenizer, model.config)
        self.name, self.folder = name, folder
        self.model, self.tokenizer, self.template, self.lora = model.eval(), tokenizer, template, lora
        self.config: ModelConfig = model.config
        self.weights_hash = weights_hash or hash_of(model)
        self.adapter_hash: str | None = None
        self.engine = Engine(model, tokenizer, template, weights_hash=self.weights_hash, **engine_settings)
        if lora is not None:
            self.adapter_hash = lora.eval().hash
            self.engine.add_adapter(self.adapter_hash, lora)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        adapter: Path | str | None = None,
        runtime: Runtime | None = None,
        quantize: Bits | None = None,
        dtype: Literal["auto", "float32", "bfloat16"] = "float32",
        verified: bool = False,
        **engine_settings: Any,
    ) -> LanguageModel:
        """Reads a model folder, and an adapter folder to answer with. `quantize` keeps the matrices of the blocks in
        fewer bits; `quantization` then says what that changed. `dtype` auto: in bfloat16 where the weights are such
        numbers and a probe finds it faster (of `quantize` it changes nothing); bfloat16: as `quantize` bf16. For
        `verified` see `load_model`.

        Raises ModelError, TokenizerError, TemplateError or AdapterError if a file is missing or damaged, or if
        tokenizer, base, template and adapter were not made for each other.
        """
        folder, runtime = Path(folder), runtime or Runtime()
        if dtype == "bfloat16" and quantize is not None:
            raise ModelError(
                "two ways are asked for in which weights shall be kept", got=f"dtype {dtype}, quantize {quantize}",
                mend="leave out one of them",
            )  # fmt: skip
        if dtype == "bfloat16":
            quantize = "bf16"
        if not folder.is_dir():
            raise ModelError("no such model folder", got=folder, wanted="a folder with config.json and safetensors")
        if read_manifest(folder).get("kind") == "adapter":
            raise ModelError(f"{folder} is an adapter", wanted="the base it stands on, and this folder as `adapter`")
        model = load_model(folder, runtime.torch_dtype(), verified=verified).to(runtime.device)
        hashed = model.loaded_hashes[0] if model.loaded_hashes is not None else None
        tokenizer = Tokenizer.load(folder)
        template = ChatTemplate.load(folder, tokenizer)
        if quantize is not None:
            sample = [tokenizer.encode(text) for text in QUANTIZATION_SAMPLE]
            pack(model, quantize, sample, head=True)  # reading it is a third of a small model's step
        lora = None
        if adapter is not None:
            check_adapter(Path(adapter), template, tokenizer)
            lora = LoRA.load(adapter).to(runtime.device)
        name = Path(adapter).name if adapter is not None else folder.name
        return cls(
            model, tokenizer, template, lora=lora, name=name, folder=folder, weights_hash=hashed,
            dtype="auto" if dtype == "auto" else "float32", **engine_settings,
        )  # fmt: skip

    @property
    def quantization(self) -> Quantization | None:
        """How the weights were packed and what that changed; None: they were not."""
        return self.model.quantization

    @property
    def adapters(self) -> list[AdapterRows]:
        """What the forward pass takes."""
        return [AdapterRows(self.lora)] if self.lora is not None else []

    # ---- answers

    @overload
    def generate(self, messages_or_prompt: str | Conversation, **options: Any) -> Completion: ...
    @overload
    def generate(self, messages_or_prompt: Seq[str] | Seq[Conversation], **options: Any) -> list[Completion]: ...
    def generate(
        self,
        messages_or_prompt: Any,
        *,
        prompt: bool = False,
        tools: Seq[Mapping[str, Any]] = (),
        template_options: Options | None = None,
        on_done: Callable[[Completion], object] | None = None,
        **sampling: Any,
    ) -> Completion | list[Completion]:
        """Answers a conversation, or a list of them in one batch.

        A conversation is a list of messages (`Message` or `{"role", "content"}`); a plain string is one user message,
        with `prompt=True` a raw text to be continued. `sampling` are the fields of SamplingParams. With a seed, item i
        of a list is sampled with seed + i, so that one prompt many times gives different answers, each reproducible.
        `tools` are functions that it may call, `template_options` what its chat template may be told.
        Raises RequestError for unknown or impossible sampling, ContextLengthError for a prompt that is too long.
        """
        items, single = items_of(messages_or_prompt)
        params = params_of(sampling)
        first = secrets.randbits(62) if params.seed is None else params.seed
        requests = [
            self._request(
                str(i), item, replace(params, seed=first + i), prompt, tools_from_json(tools), template_options
            )
            for i, item in enumerate(items)
        ]
        completions = self.engine.generate(requests, on_done=on_done)
        return completions[0] if single else completions

    @overload
    def generate_text(self, prompts: str, **sampling: Any) -> Completion: ...
    @overload
    def generate_text(self, prompts: Seq[str], **sampling: Any) -> list[Completion]: ...
    def generate_text(self, prompts: Any, **sampling: Any) -> Completion | list[Completion]:
        """Continues raw text; `Completion.text` is the continuation alone."""
        return self.generate(prompts, prompt=True, **sampling)

    # ---- numbers

    @torch.no_grad()
    def logits(self, token_ids_BT: Tensor | Seq[Seq[int]]) -> Tensor:
        """(B, T, V) float32: what follows each token, rows independent. Raises ContextLengthError, RequestError."""
        tokens_BT = torch.as_tensor(token_ids_BT, dtype=torch.long, device=self.model.embed.device)
        if tokens_BT.ndim != 2 or not tokens_BT.numel():
            raise RequestError("token ids must be rows of one length", got=tuple(tokens_BT.shape), wanted="(B, T)")
        B, T = tokens_BT.shape
        self._check_ids(tokens_BT, T)
        hidden_ND = self._hidden(tokens_BT.flatten(), [T] * B)
        return self.model.logits(hidden_ND, self.adapters).float().view(B, T, -1)

    @torch.no_grad()
    def logprobs(self, messages: Conversation) -> list[float]:
        """log p of each token that an assistant says in the conversation, stop tokens included."""
        rendered = self.template.encode(conversation(messages))
        tokens_T = torch.tensor(rendered.ids, device=self.model.embed.device)
        learnt = [i for i, said in enumerate(rendered.mask) if said and i > 0]
        if not learnt:
            raise RequestError("the conversation has no assistant turn to score", param="messages")
        self._check_ids(tokens_T, len(rendered.ids))
        places = torch.tensor(learnt, device=tokens_T.device)
        hidden_ND = self._hidden(tokens_T, [len(rendered.ids)])[places - 1]
        values: list[float] = self.model.logprobs(hidden_ND, tokens_T[places], self.adapters).tolist()
        return values

    def embed(self, texts: str | Seq[str]) -> Tensor:
        """(B, D) float32: a vector of each text, pooled as the folder's sentence-transformers files say; without them
        the mean of the final hidden states. Raises RequestError, ContextLengthError; ModelError for unknown pooling."""
        return self.embedder([texts] if isinstance(texts, str) else texts, self.lora)

    @cached_property
    def embedder(self) -> Embedder:
        return Embedder.of_folder(self.folder, self.model, self.tokenizer)

    def _hidden(self, tokens_N: Tensor, lengths: list[int]) -> Tensor:
        hidden_ND: Tensor = self.model(tokens_N, PackedDocuments(lengths, tokens_N.device), self.adapters)
        return hidden_ND

    def _check_ids(self, tokens: Tensor, length: int) -> None:
        if length > self.config.max_context:
            raise ContextLengthError(
                "a row is longer than the model's context",
                got=f"{length} tokens",
                wanted=f"at most {self.config.max_context}",
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.config.vocab_size:
            raise RequestError("there are unknown token ids", wanted=f"0 to {self.config.vocab_size - 1}")

    def _request(
        self,
        request_id: str,
        item: Any,
        params: SamplingParams,
        raw: bool,
        tools: Tools,
        options: Options | None,
    ) -> Request:
        if raw:
            if not isinstance(item, str):
                raise RequestError("a raw prompt must be text", got=type(item).__name__, wanted="a string")
            return self.engine.text_request(request_id, item, params, adapter=self.adapter_hash)
        return self.engine.chat_request(
            request_id, conversation(item), params, adapter=self.adapter_hash, tools=tools, options=options
        )

    def __repr__(self) -> str:
        size = f"{self.config.parameters():,} parameters"
        return f"<LanguageModel {self.name}: {size}{', adapter' if self.lora is not None else ''}>"


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raises TokenizerError if the tokenizer has ids that the model has not."""
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            "the tokenizer does not fit the model",
            got=f"{tokenizer.vocab_size} tokens for {config.vocab_size} embeddings",
            wanted="at most as many tokens as embeddings",
            mend="take the tokenizer that the model was trained with",
        )


def check_adapter(folder: Path, template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Raises AdapterError if the adapter says that it was trained with another template or tokenizer."""
    manifest = read_manifest(folder)
    for what, own in (("template", template.hash), ("tokenizer", tokenizer.hash)):
        claimed = manifest.get(f"{what}_hash")
        if claimed is not None and claimed != own:
            raise AdapterError(
                f"the adapter {folder.name} was trained with another {what}",
                got=f"{what} {claimed[:12]}",
                wanted=own[:12],
                mend="load it on the base folder it was trained from",
            )


def items_of(given: Any) -> tuple[list[Any], bool]:
    """The conversations or prompts in what was given, and whether it was a single one."""
    if isinstance(given, str):
        return [given], True
    if not isinstance(given, Seq):
        raise RequestError("nothing to answer", got=type(given).__name__, wanted="text, messages, or a list of them")
    if given and isinstance(given[0], Message | Mapping):
        return [given], True
    return list(given), False


def conversation(item: Any) -> tuple[Message, ...]:
    if isinstance(item, str):
        return (Message("user", item),)
    return tuple(m if isinstance(m, Message) else message_from_json(m) for m in item)


def params_of(sampling: dict[str, Any]) -> SamplingParams:
    for key in sampling:
        if key not in SAMPLING_KEYS:
            near = difflib.get_close_matches(key, SAMPLING_KEYS, 1)
            raise RequestError(
                f"`{key}` is no sampling parameter",
                wanted=" | ".join(SAMPLING_KEYS),
                mend=f"did you mean `{near[0]}`?" if near else None,
                param=key,
            )
    return SamplingParams(**sampling)
