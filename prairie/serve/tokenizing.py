"""What POST /tokenize and /detokenize say, in vLLM's shapes: the token ids that a request would be answered from.

Not here: the tokenizer and the templates (`prairie.data`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prairie.data.tool_calls import CallFormat
from prairie.errors import RequestError
from prairie.serve.answers import TokenText
from prairie.serve.choices import no_calls

if TYPE_CHECKING:
    from prairie.serve.models import Resident
    from prairie.serve.schema import DetokenizeRequest, TokenizeRequest


def tokenized(resident: Resident, body: TokenizeRequest) -> dict[str, Any]:
    """The ids of a text or a conversation. Raises RequestError for neither or both; TemplateError."""
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("one thing is tokenised at a time", wanted="`prompt` or `messages`", param="prompt")
    if body.messages is not None:
        tools = body.to_tools()
        if tools and CallFormat.of(resident.template) is None:
            raise no_calls()
        ids = resident.template.encode_prompt(body.to_messages(), tools, body.chat_template_kwargs or {})
    elif body.add_special_tokens is False:
        ids = resident.tokenizer.encode(body.prompt or "")
    elif resident.base.model.engine is not None:
        ids = resident.engine.prompt_ids(body.prompt or "")
    else:
        ids = resident.base.model.embedder.ids(body.prompt or "")
    names = TokenText(resident.tokenizer)
    return {
        "count": len(ids),
        "max_model_len": resident.max_context,
        "tokens": list(ids),
        "token_strs": [names.of(id)[0] for id in ids] if body.return_token_strs else None,
    }


def detokenized(resident: Resident, body: DetokenizeRequest) -> dict[str, Any]:
    """The text of token ids, special tokens included. Raises RequestError for ids outside the vocabulary."""
    size = resident.tokenizer.vocab_size
    wrong = next((id for id in body.tokens if not 0 <= id < size), None)
    if wrong is not None:
        raise RequestError("there is no such token", got=wrong, wanted=f"0..{size - 1}", param="tokens")
    return {"prompt": resident.tokenizer.decode(body.tokens, skip_special=False)}
