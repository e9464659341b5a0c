"""What may be asked of a server's engines, by the command line and by a deployment alike; imports nothing heavy."""

from __future__ import annotations

from enum import StrEnum


class Quantize(StrEnum):
    """How weights are kept."""

    int8 = "int8"
    int4 = "int4"
    nf4 = "nf4"
    bf16 = "bf16"


class Dtype(StrEnum):
    """In what the weights are kept."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Speculate(StrEnum):
    """Where drafts of answers come from."""

    ngram = "ngram"
