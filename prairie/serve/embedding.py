"""What POST /v1/embeddings computes and says: OpenAI's embedding list, vectors as numbers or as base64.

Not here: admission and threads (`choices`), how a text becomes a vector (`engine.embedding`).

Legend: B texts, D width.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prairie.errors import RequestError
from prairie.serve.answers import to_json
from prairie.serve.worker import EngineFault

if TYPE_CHECKING:
    from torch import Tensor

    from prairie.serve.models import Resident
    from prairie.serve.schema import EmbeddingRequest

PIECE_TOKENS = 1024
"""Tokens computed between two steps of the engines: as many as a step of theirs may take."""


def token_rows(resident: Resident, body: EmbeddingRequest) -> list[list[int]]:
    """Token ids of each text. Raises RequestError, ContextLengthError; RequestError for another width than D."""
    embedder = resident.base.model.embedder
    width = embedder.model.config.dim
    if body.dimensions not in (None, width):
        raise RequestError(
            "the vectors of this model cannot be cut", got=f"dimensions {body.dimensions}", wanted=f"{width}",
            mend="leave dimensions out", param="dimensions",
        )  # fmt: skip
    return [embedder.ids(text) if isinstance(text, str) else embedder.checked(text) for text in body.inputs()]


def pieces(rows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Rows that are computed in one go."""
    from prairie.engine.embedding import parts_of

    return parts_of(rows, PIECE_TOKENS)


def vectors_of(resident: Resident, rows: Sequence[Sequence[int]]) -> Tensor:
    """(B, D) of one piece. For the engines' thread."""
    hash = resident.adapter_hash
    return resident.base.model.embedder.vectors(rows, None if hash is None else resident.engine.adapters[hash])


def embedding_list(
    resident: Resident, body: EmbeddingRequest, rows: Sequence[Sequence[int]], vectors: Sequence[Tensor]
) -> bytes:
    """The answer as JSON. Raises EngineFault if a number is not finite, which JSON cannot say."""
    import numpy as np

    table_BD = np.concatenate([part.cpu().numpy() for part in vectors]).astype("<f4")
    if not np.isfinite(table_BD).all():
        raise EngineFault("the model gave numbers that are not finite", mend="promote another version")
    coded = body.encoding_format == "base64"
    data: list[dict[str, Any]] = []
    for index, row in enumerate(table_BD):
        vector = base64.b64encode(row.tobytes()).decode() if coded else row.tolist()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    tokens = sum(map(len, rows))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return to_json(
        {"object": "list", "data": data, "model": body.model, "usage": usage, "prairie": resident.identity()}
    )
