"""`config.json` in and out, by the rows of the table of families.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`; both are read, the first is
written because both versions read it. Not here: the rows (`families`), what the numbers do (`transformer`, `rope`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prairie.errors import ModelError
from prairie.models.config import MOST_LAYERS, HeadConfig, ModelConfig, RopeScaling
from prairie.models.families import FAMILIES
from prairie.models.family import DEFAULTS, ONLY, Family, HeadRow, Key, whole


def read_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The meaning of a `config.json`. ModelError for an unknown family, a setting that we would get wrong, or a value
    that is none."""
    try:
        return _read_config(raw, where)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"{where} cannot be understood", got=f"{type(error).__name__}: {error}") from error


def _read_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    name, family, head_row = _family_of(raw, where)
    given = {usual: raw[own] for usual, own in family.aliases.items() if own in raw}
    values = {**DEFAULTS, **family.defaults, **raw, **given}
    values = {key: value for key, value in values.items() if value is not None}  # an explicit null undoes a default
    for key, only in ONLY.items():
        if values.get(key, only) != only:
            raise ModelError(f"{where} sets {key}, which is not computed here", got=values[key], wanted=only)
    fields: dict[str, Any] = {**family.fixed, "family": name}
    for key, meaning in family.all_keys().items():
        if key not in values:
            continue
        try:
            if isinstance(meaning, Key):
                fields |= dict.fromkeys(meaning.fields, meaning.read(values[key]))
            else:
                fields[meaning] = _KINDS[ModelConfig.__annotations__[meaning]](values[key])
        except (TypeError, ValueError):
            raise ModelError(f"{where} has no usable {key}", got=repr(values[key])) from None
    fields.setdefault("kv_heads", fields.get("heads"))
    own = {meaning: key for key, meaning in family.all_keys().items() if isinstance(meaning, str)}
    for needed in ("vocab_size", "dim", "layers", "heads", "max_context"):
        if needed not in fields:
            raise ModelError(f"{where} has no usable {own[needed]}", got="None", wanted="a whole number")
    if not 0 < fields["layers"] <= MOST_LAYERS:
        raise ModelError(
            f"{where} has no usable {own['layers']}", got=fields["layers"], wanted=f"1 to {MOST_LAYERS} layers"
        )
    if family.read is not None:
        fields |= family.read(values, fields)
    if head_row is not None:
        head = fields["head"] = _head_of(head_row, values, fields)
        masked = head.kind == "mlm"
        fields |= {"logit_bias": masked and head.bias, "tie_embeddings": not masked or fields["tie_embeddings"]}
    if "ffn_dim" not in fields:
        raise ModelError(f"{where} has no usable {own['ffn_dim']}", got="None", wanted="a whole number")
    fields["windows"] = _windows_of(family, values, fields["layers"], where)
    if fields.get("positions", "rotary") == "rotary":
        fields |= _rope_of(family, values, fields, where)
    eos = values.get("eos_token_id")
    return ModelConfig(
        **fields,
        bos_id=values.get("bos_token_id"),
        eos_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_id=values.get("pad_token_id"),
    )


def write_config(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` that `read_config` and transformers (4 and 5) read back to the same model."""
    c, family = config, FAMILIES[config.family]
    row = None if c.head is None else family.head_row(c.head.kind)
    architecture = family.architecture if row is None else row.architecture
    raw: dict[str, Any] = {"architectures": [architecture], "model_type": c.family}
    for key, meaning in family.all_keys().items():
        if isinstance(meaning, Key):
            raw[key] = meaning.write(getattr(c, meaning.fields[0]))
        else:
            raw[key] = getattr(c, meaning)
    raw |= {
        "attention_dropout": 0.0,
        "bos_token_id": c.bos_id,
        "eos_token_id": list(c.eos_id) if isinstance(c.eos_id, tuple) else c.eos_id,
        "pad_token_id": c.pad_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if c.positions == "rotary":
        raw |= _written_rope(c, family)
    if family.windows is not None:
        window = max(c.windows, default=0)
        raw[family.windows.key] = family.windows.written(window) if window else None
        if family.windows.types:
            raw["layer_types"] = ["sliding_attention" if c.window(i) else "full_attention" for i in range(c.layers)]
        if family.windows.switch:
            raw[family.windows.switch] = bool(c.windows)
    if c.labels:
        raw["id2label"] = {str(number): name for number, name in enumerate(c.labels)}
        raw["label2id"] = {name: number for number, name in enumerate(c.labels)}
    if c.head is not None and row is not None and row.write is not None:
        raw |= row.write(c.head)
    if family.write is not None:
        raw |= family.write(c)
    for usual, own in family.aliases.items():
        if usual in raw:
            raw[own] = raw[usual]
    return raw


_KINDS: dict[str, Callable[[Any], Any]] = {"int": whole, "int | None": whole, "float": float, "bool": bool}
"""Readers by the annotation of a field of `ModelConfig`."""


def _family_of(raw: Mapping[str, Any], where: str) -> tuple[str, Family, HeadRow | None]:
    """A family's name, its row, and the head that stands in for next-token logits."""
    names = raw.get("architectures") or []
    for key, family in FAMILIES.items():
        for row in family.all_heads:
            if row.architecture in names:
                return key, family, row
        if family.architecture in names or (not names and raw.get("model_type") == key):
            return key, family, None
    raise ModelError(
        f"{where} is of a family that is not known here",
        got=", ".join(names) or repr(raw.get("model_type")),
        wanted="one of " + ", ".join(family.architecture for family in FAMILIES.values()),
    )


def _head_of(row: HeadRow, values: Mapping[str, Any], fields: Mapping[str, Any]) -> HeadConfig:
    head = row.head if row.read is None else replace(row.head, **row.read(values))
    if head.activation == "own":
        head = replace(head, activation=fields["activation"])
    if not row.out:
        return head
    return replace(head, labels=_labels_of(values))


def _labels_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in `id2label`, in the order of their numbers; two when it says nothing, as transformers has it."""
    named = values.get("id2label") or {str(n): f"LABEL_{n}" for n in range(int(values.get("num_labels") or 2))}
    return tuple(str(named[number]) for number in sorted(named, key=int))


def with_head(config: ModelConfig, kind: str, labels: Sequence[str]) -> ModelConfig:
    """The same body under another head, as its family has it. Raises ModelError if it has none of that kind."""
    row = FAMILIES[config.family].head_row(kind)
    head = _head_of(row, {"id2label": dict(enumerate(labels))}, {"activation": config.activation})
    masked = kind == "mlm"
    tied = config.tie_embeddings or not masked
    return replace(config, head=head, logit_bias=masked and head.bias, tie_embeddings=tied)


def _windows_of(family: Family, values: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...]:
    """The window of each layer, 0 where there is none."""
    rule, types = family.windows, values.get("layer_types")
    if types is not None and (len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}):
        raise ModelError(
            f"{where} has layer_types that are not computed here",
            got=f"{len(types)} of {', '.join(sorted(set(types)))}",
            wanted=f"{layers} of full_attention, sliding_attention",
        )
    if rule is None:
        if "sliding_attention" in (types or ()) or (values.get("use_sliding_window") and values.get("sliding_window")):
            raise ModelError(f"{where} asks for sliding window attention, which this family does not have")
        return ()
    window = values.get(rule.key)
    if not window or (rule.switch is not None and not values.get(rule.switch)):
        return ()
    if not rule.types and "full_attention" in (types or ()):
        raise ModelError(f"{where} mixes kinds of attention, which this family does not", got=", ".join(types or ()))
    if types is None:
        types = ["sliding_attention" if rule.layers(values, i) else "full_attention" for i in range(layers)]
    window = rule.seen(whole(window))
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


# ---- rotary positions

ROPE_KINDS = ("linear", "dynamic", "llama3", "yarn", "longrope")


def _rope_of(family: Family, values: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of rotary positions; a kind of scaling that we cannot compute is refused, never ignored."""
    spec: Mapping[str, Any] = values.get("rope_parameters") or values.get("rope_scaling") or {}
    found: dict[str, Any] = {}
    local = values.get("rope_local_base_freq")
    if "full_attention" in spec or "sliding_attention" in spec:  # transformers 5, where kinds of layers differ
        near = spec.get("sliding_attention") or {}
        if near.get("rope_type", "default") != "default":
            raise ModelError(
                f"{where} scales rotary positions inside a window", got=near["rope_type"], wanted="default"
            )
        local = near.get("rope_theta", local)
        spec = spec.get("full_attention") or {}
    if local is not None:
        found["window_rope_theta"] = float(local)
    found["rope_theta"] = float(spec.get("rope_theta") or values["rope_theta"])
    share = float(spec.get("partial_rotary_factor") or values.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        if not family.partial_rotary:
            raise ModelError(f"{where} turns only part of each head", got=share, wanted="partial_rotary_factor 1.0")
        found["rotary_dim"] = int((fields.get("head_dim") or fields["dim"] // fields["heads"]) * share)
    kind = spec.get("rope_type", spec.get("type", "default"))
    if "short_factor" in spec:  # older files call it su or yarn
        kind = "longrope"
    if kind == "default":
        return found
    if kind not in ROPE_KINDS:
        raise ModelError(
            f"{where} scales rotary positions in an unknown way",
            got=kind,
            wanted=f"default, {', '.join(ROPE_KINDS)}",
        )
    try:
        scaling = _scaling_of(kind, spec, values, fields["max_context"])
    except KeyError as missing:
        raise ModelError(f"rope_scaling of {where} lacks {missing}", got=dict(spec)) from None
    found["rope_scaling"] = scaling
    if kind in ("dynamic", "yarn"):  # their max_position_embeddings may be the context before the stretch
        found["max_context"] = max(fields["max_context"], int(scaling.factor * scaling.original_max_context))
    return found


def _scaling_of(kind: str, spec: Mapping[str, Any], values: Mapping[str, Any], max_context: int) -> RopeScaling:
    """KeyError for a number that is missing."""
    given = values.get("original_max_position_embeddings") or spec.get("original_max_position_embeddings")
    original = int(given or max_context)
    match kind:
        case "linear":
            return RopeScaling(kind, float(spec["factor"]))
        case "dynamic":
            return RopeScaling(kind, float(spec["factor"]), original_max_context=max_context)
        case "llama3":
            low, high = float(spec["low_freq_factor"]), float(spec["high_freq_factor"])
            return RopeScaling(kind, float(spec["factor"]), low, high, original)
        case "yarn":
            factor = float(spec.get("factor") or max_context / original)
            return RopeScaling(
                kind,
                factor,
                original_max_context=original,
                beta_fast=float(spec.get("beta_fast") or 32),
                beta_slow=float(spec.get("beta_slow") or 1),
                truncate=bool(spec.get("truncate", True)),
                magnitude=_yarn_magnitude(spec, factor),
            )
        case _:
            factor = float(spec.get("factor") or max_context / original)
            magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
            return RopeScaling(
                kind,
                factor,
                original_max_context=original,
                magnitude=float(spec.get("attention_factor") or magnitude),
                short_factors=tuple(map(float, spec["short_factor"])),
                long_factors=tuple(map(float, spec["long_factor"])),
            )


def _yarn_magnitude(spec: Mapping[str, Any], factor: float) -> float:
    if spec.get("attention_factor") is not None:
        return float(spec["attention_factor"])

    def grown(share: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0

    if spec.get("mscale") and spec.get("mscale_all_dim"):
        return grown(spec["mscale"]) / grown(spec["mscale_all_dim"])
    return grown()


def _written_rope(c: ModelConfig, family: Family) -> dict[str, Any]:
    raw: dict[str, Any] = {"rope_theta": c.rope_theta, "rope_scaling": None}
    if family.partial_rotary:
        raw["partial_rotary_factor"] = c.rotary_dim / c.head_dim
    s = c.rope_scaling
    if s is None:
        return raw
    spec: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind not in ("linear", "dynamic"):
        spec["original_max_position_embeddings"] = s.original_max_context
    if s.kind == "dynamic":
        raw["max_position_embeddings"] = s.original_max_context
    if s.kind == "llama3":
        spec |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if s.kind in ("yarn", "longrope"):
        spec["attention_factor"] = s.magnitude
    if s.kind == "yarn":
        spec |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
    if s.kind == "longrope":
        spec |= {"short_factor": list(s.short_factors), "long_factor": list(s.long_factors)}
    return {**raw, "rope_scaling": spec}
