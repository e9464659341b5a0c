"""Low-rank adapters (LoRA, arXiv 2106.09685) as objects outside the base model.

The base is never changed: many adapters can stand on one base, each given to `Transformer.forward` with the rows it
serves. On disk an adapter is a PEFT folder, plus `prairie.json` that names the base it was trained on; on another base
it is refused.
Not here: which adapter a request wants (engine), training (train).

Legend: N tokens, I input columns, O output columns, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prairie.errors import AdapterError, ModelError
from prairie.models.config import ModelConfig
from prairie.models.families import Part, fused_parts
from prairie.models.transformer import Transformer
from prairie.models.weights import MANIFEST, hash_of, not_written, read_json, read_manifest, weights_hash, write_json
from prairie.ops.linear import add_lora

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before each path of the base model."""

REFUSED_SETTINGS = {
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""Settings of PEFT that change the arithmetic, with the only value that is computed here."""


@dataclass(frozen=True)
class LoRAConfig:
    """`targets` are names of linear layers ("q_proj", "down_proj", ...), or "all-linear" for the seven of a block."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732) instead of alpha / rank."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class AdapterRows(NamedTuple):
    """An adapter and the tokens it serves; `rows` None means all N."""

    lora: LoRA
    rows: slice | None = None


class LoRA(nn.Module):
    """Pairs A (R, I), B (O, R) keyed by the path of the linear layer they add to: model.layers.0.self_attn.q_proj."""

    def __init__(
        self, config: LoRAConfig, pairs: dict[str, tuple[Tensor, Tensor]], base_hash: str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.paths = sorted(pairs)
        self.a = nn.ParameterDict({path.replace(".", "/"): nn.Parameter(pairs[path][0]) for path in self.paths})
        self.b = nn.ParameterDict({path.replace(".", "/"): nn.Parameter(pairs[path][1]) for path in self.paths})
        self.base_hash = base_hash
        """Hash of the base this adapter was made on; None for a foreign adapter that does not say."""
        self.chain: tuple[str, ...] = ()
        self._served: dict[tuple[int, str], tuple[int, tuple[Tensor, Tensor] | None]] = {}

    @classmethod
    def create(cls, model: Transformer, config: LoRAConfig | None = None, seed: int = 0) -> LoRA:
        """A fresh adapter whose delta is zero: A kaiming uniform from `seed`, B zero (PEFT's start)."""
        config = config or LoRAConfig()
        if config.rank < 1:
            raise AdapterError("an adapter needs a rank above 0", got=config.rank)
        generator = torch.Generator().manual_seed(seed)
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for path, part in _targets_of(model.config, config.targets).items():
            bound = 1 / math.sqrt(part.inputs)  # kaiming_uniform_(a=sqrt(5)), as nn.Linear and PEFT start
            a_RI = torch.empty(config.rank, part.inputs).uniform_(-bound, bound, generator=generator)
            pairs[path] = (a_RI, torch.zeros(part.outputs, config.rank))
        return cls(config, pairs, hash_of(model)).to(model.embed.device)

    @classmethod
    def load(cls, folder: Path | str) -> LoRA:
        """Reads a PEFT folder. AdapterError when it is damaged or uses a setting that is not computed here."""
        folder = Path(folder)
        try:
            raw, manifest = read_json(folder / ADAPTER_CONFIG), read_manifest(folder)
        except ModelError as error:
            raise AdapterError(error.what, got=error.got, wanted=error.wanted, mend=error.mend) from error
        config = _read_config(raw, folder)
        state = _read_state(folder / ADAPTER_WEIGHTS)
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for name in state:
            path = name.removeprefix(PREFIX).removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
            if name not in (_name_of(path, "A"), _name_of(path, "B")):
                raise AdapterError(f"{folder} holds a tensor that is no part of a LoRA adapter", got=name)
            a_RI, b_OR = state.get(_name_of(path, "A")), state.get(_name_of(path, "B"))
            if a_RI is None or b_OR is None:
                raise AdapterError(f"the adapter in {folder} has only half of its pair for {path}", got=name)
            if a_RI.ndim != 2 or b_OR.ndim != 2 or len(a_RI) != config.rank or b_OR.shape[1] != config.rank:
                raise AdapterError(
                    f"the adapter in {folder} has a pair of another rank for {path}",
                    got=f"A {tuple(a_RI.shape)}, B {tuple(b_OR.shape)}",
                    wanted=f"rank {config.rank}",
                )
            pairs[path] = (a_RI, b_OR)
        if not pairs:
            raise AdapterError(f"the adapter in {folder} is empty")
        claimed, found = manifest.get("weights_hash"), weights_hash(state)
        if claimed is not None and claimed != found:
            raise AdapterError(
                f"the adapter weights in {folder} are not those its {MANIFEST} names",
                got=found[:12],
                wanted=str(claimed)[:12],
            )
        lora = cls(config, pairs, manifest.get("base_hash"))
        lora.chain = tuple(manifest.get("chain", ()))
        return lora.requires_grad_(False).eval()

    def save(
        self,
        folder: Path | str,
        base_hash: str | None = None,
        chain: Sequence[str] | None = None,
        base_name: str | None = None,
        **manifest: Any,
    ) -> str:
        """Writes a PEFT folder and `prairie.json`; returns the adapter's hash. `chain`: hashes of earlier stages."""
        folder = Path(folder)
        state = self.peft_state()
        found = weights_hash(state)
        facts = {
            "kind": "adapter",
            **manifest,
            "weights_hash": found,
            "base_hash": base_hash or self.base_hash,
            "chain": list(self.chain if chain is None else chain),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / ADAPTER_CONFIG, self._peft_config(base_name))
            save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            write_json(folder / MANIFEST, facts)
        except (OSError, SafetensorError) as error:
            raise not_written(AdapterError, f"the adapter cannot be written to {folder}", error) from error
        return found

    @property
    def weights_hash(self) -> str:
        """sha256 over the names and tensors of the file."""
        return weights_hash(self.peft_state())

    def pair(self, path: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A (R, I) and B (O, R) of one linear layer."""
        key = path.replace(".", "/")
        return self.a[key], self.b[key]

    def peft_state(self) -> dict[str, Tensor]:
        """The tensors under PEFT's names."""
        state = {}
        for path in self.paths:
            for letter, tensor in zip("AB", self.pair(path), strict=True):
                state[_name_of(path, letter)] = tensor.detach().cpu().contiguous()
        return state

    def require_base(self, model: Transformer, name: str = "adapter") -> None:
        """AdapterError unless this adapter was made on these very weights (a foreign one: unless shapes fit)."""
        base = hash_of(model)
        if self.base_hash is not None and self.base_hash != base:
            raise AdapterError(
                f"{name} stands on base {self.base_hash[:12]}, this base is {base[:12]}",
                mend="load it on the base it was trained on, or train it again on this one",
            )
        known = _targets_of(model.config, "all-linear")
        for path in self.paths:
            a_RI, b_OR = self.pair(path)
            part = known.get(path)
            if part is None:
                raise AdapterError(f"{name} adds to {path}, which this base does not have")
            if (a_RI.shape[1], b_OR.shape[0]) != (part.inputs, part.outputs):
                raise AdapterError(
                    f"{name} does not fit {path} of this base",
                    got=f"{b_OR.shape[0]} x {a_RI.shape[1]}",
                    wanted=f"{part.outputs} x {part.inputs}",
                )

    def merge_into(self, model: Transformer, name: str = "adapter") -> Transformer:
        """Adds the deltas to the model's own weights, in place; returns the model. It is another base afterwards."""
        self.require_base(model, name)
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for weight in model.table:
                path = weight.name.removesuffix(".weight")
                if path in self.paths:
                    a_RI, b_OR = self.pair(path)
                    delta = (b_OR.float() @ a_RI.float()) * self.config.scale
                    delta = delta.T if weight.transposed else delta
                    weight.put(weight.take(weights[weight.parameter]).float() + delta, weights[weight.parameter])
        return model

    def add_to(
        self, y_NO: Tensor, x_NI: Tensor, layer: int, group: str, parts: Sequence[Part], rows: slice | None
    ) -> Tensor:
        """y plus this adapter's delta for one fused linear layer; may write into `y_NO`."""
        fused = self._fused(layer, group, parts)
        if fused is None:
            return y_NO
        if self.training and self.config.dropout > 0 and torch.is_grad_enabled():  # never while serving or judging
            x_NI = F.dropout(x_NI, self.config.dropout)
        return add_lora(y_NO, x_NI, *fused, rows)

    def _fused(self, layer: int, group: str, parts: Sequence[Part]) -> tuple[Tensor, Tensor] | None:
        """The pairs of a group as one pair: A stacked, B block-diagonal and scaled; kept while nobody trains it."""
        pairs = [self._maybe_pair(part.name) for part in parts]
        present = [pair for pair in pairs if pair is not None]
        if not present:
            return None
        if any(p.requires_grad for pair in present for p in pair):
            self._served.clear()  # in training; fused optimisers do not count their changes in `_version`
            return self._fuse(parts, pairs)
        version = sum(p._version for pair in present for p in pair)
        kept = self._served.get((layer, group))
        if kept is None or kept[0] != version:
            with torch.inference_mode(False), torch.no_grad():
                kept = self._served[layer, group] = (version, self._fuse(parts, pairs))
        return kept[1]

    def _fuse(self, parts: Sequence[Part], pairs: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
        stacked = [pair[0] for pair in pairs if pair is not None]
        columns, width = [], self.config.rank * len(stacked)
        left = 0
        for part, pair in zip(parts, pairs, strict=True):
            if pair is None:
                columns.append(stacked[0].new_zeros(part.outputs, width))
                continue
            columns.append(F.pad(part.to_ours(pair[1]), (left, width - left - self.config.rank)))
            left += self.config.rank
        b_OR = torch.cat(columns) if len(columns) > 1 else columns[0]
        return torch.cat(stacked) if len(stacked) > 1 else stacked[0], b_OR * self.config.scale

    def _maybe_pair(self, path: str) -> tuple[Tensor, Tensor] | None:
        return self.pair(path) if path.replace(".", "/") in self.a else None

    def _peft_config(self, base_name: str | None) -> dict[str, Any]:
        """PEFT's own settings; target_modules are short names when every layer has the same ones, else full paths."""
        short = {path.rsplit(".", 1)[-1] for path in self.paths}
        layers = {path.split(".")[2] for path in self.paths}
        uniform = len(short) * len(layers) == len(self.paths) and layers == {str(i) for i in range(len(layers))}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": self.config.dropout,
            "use_rslora": self.config.rslora,
            "target_modules": sorted(short) if uniform else self.paths,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": None,
            "use_dora": False,
        }


def _targets_of(config: ModelConfig, targets: Literal["all-linear"] | Sequence[str]) -> dict[str, Part]:
    """Paths of the linear layers that `targets` names, in layer order."""
    parts = [part for block in fused_parts(config) for group in block.values() for part in group]
    known = {part.name.rsplit(".", 1)[-1] for part in parts}
    names = known if targets == "all-linear" else set(targets)
    if unknown := names - known:
        raise AdapterError(
            "an adapter was asked for layers that the model does not have",
            got=", ".join(sorted(unknown)),
            wanted="all-linear or some of " + ", ".join(sorted(known)),
        )
    return {part.name: part for part in parts if part.name.rsplit(".", 1)[-1] in names}


def _name_of(path: str, letter: str) -> str:
    return f"{PREFIX}{path}.lora_{letter}.weight"


def _read_config(raw: dict[str, Any], folder: Path) -> LoRAConfig:
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} is no LoRA adapter", got=raw.get("peft_type"), wanted="peft_type LORA")
    for key, only in REFUSED_SETTINGS.items():
        if raw.get(key) not in (None, only, [], {}):
            raise AdapterError(f"the adapter in {folder} sets {key}, which is not supported", got=raw[key], wanted=only)
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise AdapterError(
            f"{folder / ADAPTER_CONFIG} lacks a usable r or lora_alpha", got=f"r {rank}, lora_alpha {alpha}"
        )
    targets = raw.get("target_modules")
    return LoRAConfig(
        rank=rank,
        alpha=float(alpha),
        dropout=float(raw.get("lora_dropout") or 0.0),
        targets=tuple(targets) if isinstance(targets, list) else "all-linear",
        rslora=bool(raw.get("use_rslora", False)),
    )


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except FileNotFoundError:
        raise AdapterError(f"{path} does not exist", wanted="an adapter folder in PEFT's format") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} is damaged or cut short", got=error, mend="copy it again from where it came"
        ) from error
