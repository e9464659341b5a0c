"""What a LoRA adapter is (`LoRAConfig`), and PEFT's files for it: `adapter_config.json`, `adapter_model.safetensors`.

A setting of PEFT that changes the arithmetic and is not computed here is refused, never ignored.
Not here: the arithmetic (`lora`).

Legend: I input columns, O output columns, R rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from prairie.errors import AdapterError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before each path of the base model."""

SCORE = f"{PREFIX}score.weight"
"""The head of scores of a decoder, which PEFT saves whole."""

REFUSED_SETTINGS = {
    "use_qalora": False,
    "lora_bias": False,
    "bias": "none",
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
    "arrow_config": None,
    "monteclora_config": None,
    "velora_config": None,
}
"""Settings of PEFT that change the arithmetic, with the only value that is computed here."""

ENDINGS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
"""How the names of PEFT's tensors end, and which of an adapter's tensors that is."""


@dataclass(frozen=True)
class LoRAConfig:
    """`targets` are names of layers ("q_proj", "down_proj", "embed_tokens", "lm_head"), or "all-linear": those of the
    blocks."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732) instead of alpha / rank."""
    dora: bool = False
    """Learn the length of each row of a weight apart from its direction (arXiv 2402.09353)."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Ranks of the layers whose path ends so (a regular expression, as PEFT's `rank_pattern`)."""
    alphas: Mapping[str, float] = field(default_factory=dict)
    """The same for alpha."""

    def rank_of(self, path: str) -> int:
        return int(_of_pattern(self.ranks, path, self.rank))

    def scale_of(self, path: str) -> float:
        """What B A is multiplied with in the layer `path`."""
        rank = self.rank_of(path)
        return _of_pattern(self.alphas, path, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def arithmetic(self) -> list[Any]:
        """All that turns tensors into an output; part of an adapter's hash."""
        ranks = sorted((key, int(rank)) for key, rank in self.ranks.items())
        alphas = sorted((key, float(alpha)) for key, alpha in self.alphas.items())
        return [int(self.rank), float(self.alpha), self.rslora, self.dora, ranks, alphas]


class Pair(NamedTuple):
    """The tensors of one layer: A (R, I), B (O, R) and for DoRA the lengths of the rows (O,). `embedded`: the layer is
    an embedding, whose I is the vocabulary."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None
    embedded: bool = False


def config_from_peft(raw: Mapping[str, Any], folder: Path) -> LoRAConfig:
    """The meaning of an `adapter_config.json`. AdapterError for what is not LoRA or not computed here."""
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} is no LoRA adapter", got=raw.get("peft_type"), wanted="peft_type LORA")
    for key, only in REFUSED_SETTINGS.items():
        if raw.get(key) not in (None, only, [], {}):
            raise AdapterError(f"the adapter in {folder} sets {key}, which is not supported", got=raw[key], wanted=only)
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    ranks, alphas = raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}
    numbers: list[Any] = [rank, *ranks.values()] if isinstance(ranks, dict) else [None]
    scales: list[Any] = [alpha, *alphas.values()] if isinstance(alphas, dict) else [None]
    if not all(_whole(n) for n in numbers) or not all(_number(n) for n in scales):
        raise AdapterError(
            f"{folder / ADAPTER_CONFIG} lacks a usable r or lora_alpha",
            got=f"r {rank}, lora_alpha {alpha}, rank_pattern {ranks}, alpha_pattern {alphas}",
        )
    for pattern in (*ranks, *alphas):
        _check_pattern(pattern, folder)
    targets = raw.get("target_modules")
    return LoRAConfig(
        rank=int(numbers[0]),
        alpha=float(scales[0]),
        dropout=float(raw.get("lora_dropout") or 0.0),
        targets=tuple(targets) if isinstance(targets, list) else "all-linear",
        rslora=bool(raw.get("use_rslora", False)),
        dora=bool(raw.get("use_dora", False)),
        ranks=ranks,
        alphas=alphas,
    )


def config_to_peft(
    config: LoRAConfig, targets: Sequence[str], base_name: str | None, *, scores: bool = False
) -> dict[str, Any]:
    """PEFT's own settings. `targets`: PEFT's `target_modules`; `scores`: there is a head of scores beside the pairs."""
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scores else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "rank_pattern": dict(config.ranks),
        "alpha_pattern": dict(config.alphas),
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": ["score"] if scores else None,
    }


def state_to_peft(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """The tensors under PEFT's names."""
    state: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        letters = ("lora_embedding_A", "lora_embedding_B") if pair.embedded else ("lora_A.weight", "lora_B.weight")
        named = dict(zip((*letters, "lora_magnitude_vector"), pair[:3], strict=True))
        state |= {
            f"{PREFIX}{path}.{name}": tensor.detach().cpu().contiguous()
            for name, tensor in named.items()
            if tensor is not None
        }
    return state


def score_from_peft(state: Mapping[str, Tensor], raw: Mapping[str, Any], folder: Path) -> Tensor | None:
    """(C, D) the head of scores in the file; None if it saves no module. AdapterError for other saved modules."""
    named = raw.get("modules_to_save") or []
    if not (isinstance(named, list) and set(named) <= {"score", "classifier"} and ("score" in named or not named)):
        raise AdapterError(
            f"the adapter in {folder} sets modules_to_save to what is not read here", got=named, wanted="none, or score"
        )
    score_CD = state.get(SCORE)
    if bool(named) != (score_CD is not None) or (score_CD is not None and score_CD.ndim != 2):
        raise AdapterError(
            f"the adapter in {folder} does not hold what its settings name",
            got=f"modules_to_save {named or 'none'}, score.weight " + ("missing" if score_CD is None else "there"),
        )
    return score_CD


def pairs_from_peft(state: Mapping[str, Tensor], config: LoRAConfig, folder: Path) -> dict[str, Pair]:
    """The tensors by layer. AdapterError for an unknown name, half a pair or another rank than the config's."""
    found: dict[str, dict[str, Tensor]] = {}
    embedded = set()
    for name, tensor in state.items():
        ending = next((end for end in ENDINGS if name.endswith(end)), None)
        if ending is None or not name.startswith(PREFIX):
            raise AdapterError(f"{folder} holds a tensor that is no part of a LoRA adapter", got=name)
        path = name.removeprefix(PREFIX).removesuffix(ending)
        found.setdefault(path, {})[ENDINGS[ending]] = tensor
        if "embedding" in ending:
            embedded.add(path)
    if not found:
        raise AdapterError(f"the adapter in {folder} is empty")
    pairs = {}
    for path, tensors in sorted(found.items()):
        a_RI, b_OR, lengths_O = (tensors.get(key) for key in ("a", "b", "magnitude"))
        if a_RI is None or b_OR is None:
            raise AdapterError(f"the adapter in {folder} has only half of its pair for {path}", got=sorted(tensors))
        rank = config.rank_of(path)
        if a_RI.ndim != 2 or b_OR.ndim != 2 or len(a_RI) != rank or b_OR.shape[1] != rank:
            raise AdapterError(
                f"the adapter in {folder} has a pair of another rank for {path}",
                got=f"A {tuple(a_RI.shape)}, B {tuple(b_OR.shape)}",
                wanted=f"rank {rank}",
            )
        if (lengths_O is not None) != config.dora or (lengths_O is not None and lengths_O.numel() != len(b_OR)):
            raise AdapterError(
                f"the adapter in {folder} does not fit its own settings for {path}",
                got="no magnitude" if lengths_O is None else f"a magnitude of {lengths_O.numel()}",
                wanted=f"one of {len(b_OR)}" if config.dora else "none, as use_dora is false",
            )
        if not all(t.is_floating_point() for t in tensors.values()):
            raise AdapterError(f"the adapter in {folder} has an unsupported dtype for {path}", got=a_RI.dtype)
        pairs[path] = Pair(a_RI, b_OR, None if lengths_O is None else lengths_O.flatten(), path in embedded)
    return pairs


def read_state(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. AdapterError when it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except FileNotFoundError:
        raise AdapterError(f"{path} does not exist", wanted="an adapter folder in PEFT's format") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} is damaged or cut short", got=error, mend="copy it again from where it came"
        ) from error


def _of_pattern(patterns: Mapping[str, float], path: str, otherwise: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), otherwise)


def _check_pattern(pattern: str, folder: Path) -> None:
    """Patterns come from outside: one that repeats a group could be matched for hours."""
    try:
        re.compile(pattern)
        sound = not re.search(r"\)\s*[*+?{]", pattern) and len(pattern) < 500
    except (re.error, RecursionError):
        sound = False
    if not sound:
        raise AdapterError(
            f"the adapter in {folder} sets ranks by a pattern that is not matched here", got=repr(pattern)[:80],
            wanted="the end of a path, or a regular expression without repeated groups",
        )  # fmt: skip


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
