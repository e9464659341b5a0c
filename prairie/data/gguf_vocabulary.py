"""A tokenizer as GGUF files hold it, for llama.cpp: a list of tokens, and one of its own programs to split text.

Byte-level BPE becomes its kind "gpt2", BPE over sentencepiece's pieces its kind "llama". Before the merges, a
byte-level tokenizer cuts text by a pattern of its own; llama.cpp knows a fixed list of patterns by name and takes no
other. The one that gives the same ids on the most of `PROBES` is named, and how many that are is said.
Not here: the weights (`models.gguf`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import tokenizers

from prairie.data.chat_template import ChatTemplate
from prairie.data.tokenizer import Tokenizer
from prairie.errors import TokenizerError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_WORDS,),
    "llama-bpe": (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",),
    "qwen2": (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",),
    "starcoder": (r"\p{N}", _WORDS),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _WORDS, "[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
}
"""Names that llama.cpp knows, with the patterns that it cuts by, one after the other."""
IGNORING_MERGES = ("llama-bpe",)
"""Under these names a whole word that is a token is taken as that token."""

PROBES = (
    "The quick brown fox jumps over the lazy dog.", "It's what they'd've wanted, isn't it? WE'LL SEE.",
    "In 2024, 3.14159 and 1,000,000 were numbers; 50% of them.", "for (int i = 0; i < 10; i++) {\n    x[i] += 2;\n}\n",
    "def f(a, b):\n\treturn a * b  # no comment\n\n\n", "https://example.org/a_b?c=d&e=%20f",
    "  leading,   and trailing   ", "草原上的马跑得很快。", "十七加八等于二十五。",
    "我们在2024年7月一起学习，hello世界！",
    "你好world，这是test。", "人工智能（AI）模型的参数有一亿两千万个。", "東京は日本の首都です。カタカナも。",
    "한국어 문장도 있습니다.", "Привет, как дела?", "naïve café déjà vu — “quoted” …", "🐎 runs 🏞️ fast 👩‍🚀",
    "What is seven plus twelve?\n\n19\r\n", "a\n\n b\n  c\t\td", "x=1;y=2;z=x+y", "Hello", " Hello", "12", "一", "...",
    "\n",
)  # fmt: skip


class Fidelity(NamedTuple):
    """How near llama.cpp's ids come to ours."""

    name: str
    """Of the pre-tokenizer; empty where there is none."""
    same: int
    of: int

    def __str__(self) -> str:
        if self.same == self.of:
            return f"cut as {self.name}" if self.name else "no pre-tokenizer"
        return f"cut as {self.name}, which gives the same ids on {self.same} of {self.of} probes"


def add_vocabulary(writer: GGUFWriter, tokenizer: Tokenizer, template: ChatTemplate, embeddings: int) -> Fidelity:
    """Adds tokens, marks and chat template to an open file; `embeddings` is how many tokens the model has room for.

    TokenizerError for a tokenizer that llama.cpp has no program for.
    """
    spec = tokenizer.spec
    model = spec["model"]
    bytes_level = tokenizer._kind == "bytes"
    if model.get("type") != "BPE" or not (bytes_level or model.get("byte_fallback")):
        raise TokenizerError(
            "this tokenizer cannot be written as GGUF",
            got=model.get("type"),
            wanted="BPE over bytes, or with byte_fallback",
        )
    texts, types = _tokens(tokenizer, spec, embeddings)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_tokenizer_model("gpt2" if bytes_level else "llama")
    writer.add_token_list(texts)
    writer.add_token_types(types)
    if bytes_level:
        fidelity = closest_pre_tokenizer(tokenizer)
        writer.add_tokenizer_pre(fidelity.name)
        writer.add_token_merges(merges)
    else:
        fidelity = Fidelity("", 1, 1)
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(texts, merges))
        writer.add_add_space_prefix(tokenizer._bare is not tokenizer._backend)
    _add_marks(writer, tokenizer, template)
    writer.add_chat_template(without_generation_marks(template.source))
    return fidelity


def closest_pre_tokenizer(tokenizer: Tokenizer) -> Fidelity:
    """The name in `PRE_TOKENIZERS` under which the most probes get the ids that the tokenizer gives them."""
    wanted = tokenizer.encode_batch(PROBES, place="after_text")
    found = []
    for name, patterns in PRE_TOKENIZERS.items():
        peer = _cut_by(tokenizer.spec, patterns, name in IGNORING_MERGES)
        ids = [encoding.ids for encoding in peer.encode_batch(list(PROBES), add_special_tokens=False)]
        found.append(Fidelity(name, sum(a == b for a, b in zip(wanted, ids, strict=True)), len(PROBES)))
    return max(found, key=lambda each: each.same)


def without_generation_marks(source: str) -> str:
    """The template without `{% generation %}`, which other renderers do not know; a comment trims as the mark did."""
    return re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", source)


def _cut_by(spec: dict[str, Any], patterns: Sequence[str], ignore_merges: bool) -> tokenizers.Tokenizer:
    """The same vocabulary behind other patterns, as llama.cpp has it: no normaliser, no space before the first word."""
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    changed = {
        "normalizer": None,
        "post_processor": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "model": {**spec["model"], "ignore_merges": ignore_merges},
    }
    peer = tokenizers.Tokenizer.from_str(json.dumps(spec | changed))
    peer.encode_special_tokens = True
    return peer


def _tokens(tokenizer: Tokenizer, spec: dict[str, Any], embeddings: int) -> tuple[list[str], list[int]]:
    """Text and type of every id; ids that the tokenizer does not use are named and marked so."""
    from gguf import TokenType

    texts = [f"[UNUSED{id}]" for id in range(embeddings)]
    types = [int(TokenType.UNUSED)] * embeddings
    for text, id in spec["model"]["vocab"].items():
        texts[id] = text
        is_byte = tokenizer._kind != "bytes" and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text)
        types[id] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in spec["added_tokens"]:
        texts[added["id"]] = added["content"]
        unknown = added["content"] == spec["model"].get("unk_token")
        special = TokenType.UNKNOWN if unknown else TokenType.CONTROL
        types[added["id"]] = int(special if added["special"] else TokenType.USER_DEFINED)
    return texts, types


def _scores(texts: Sequence[str], merges: Sequence[str]) -> list[float]:
    """llama.cpp joins the pair whose whole has the highest score: the earlier a merge, the higher."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), number)
    return [-float(rank.get(text, len(merges))) for text in texts]


def _add_marks(writer: GGUFWriter, tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """Which tokens begin and end a text. An answer's end that is not the text's end is named apart."""
    stops = [*template.stop_ids]
    end = tokenizer.eos_id if tokenizer.eos_id is not None else (stops[0] if stops else None)
    marks = {
        writer.add_bos_token_id: tokenizer.bos_id,
        writer.add_eos_token_id: end,
        writer.add_pad_token_id: tokenizer.pad_id,
        writer.add_unk_token_id: tokenizer.special_tokens.get(tokenizer.unk_token or ""),
        writer.add_eot_token_id: next((stop for stop in stops if stop != end), None),
    }
    for add, id in marks.items():
        if id is not None:
            add(id)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)
