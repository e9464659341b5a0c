"""Weights in and out: Hugging Face folders of safetensors, every name and shape checked against the family's table.

Not here: tokenizer and chat template files (the data room writes them), adapters (`lora`). Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prairie.errors import ModelError, PrairieError, StorageFullError
from prairie.models.families import read_config, write_config
from prairie.models.transformer import Transformer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "prairie.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over the sorted names with their dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        _hash_tensor(digest, name, state[name])
    return digest.hexdigest()


def named_state(model: Transformer) -> dict[str, Tensor]:
    """The model's weights under the names and in the layout of the file; views of the parameters where that is one."""
    parameters = dict(model.named_parameters())
    return {w.name: w.take(parameters[w.parameter].detach()) for w in model.table}


def hash_of(model: Transformer) -> str:
    """The hash that names this model's weights: the file's own while they are as loaded (in whatever dtype), else
    theirs. Always computed anew: fused optimisers change weights without counting it in the tensor's version."""
    found = weights_hash(named_state(model))
    if model.loaded_hashes is not None and model.loaded_hashes[1] == found:
        return model.loaded_hashes[0]
    return found


def load_model(folder: Path | str, dtype: torch.dtype | None = None) -> Transformer:
    """Reads `config.json` and the weights of a Hugging Face folder into a Transformer.

    `dtype` None keeps the file's. Tensors are read one at a time. ModelError when a file is missing or damaged, when a
    name or shape differs from what the config promises, or when `prairie.json` names other weights.
    """
    folder = Path(folder)
    raw = read_json(folder / "config.json")
    model_config = read_config(raw, str(folder / "config.json"))
    manifest = read_manifest(folder)
    files = _files_of(folder)
    with torch.device("meta"):
        model = Transformer(model_config)
    expected = {w.name: w for w in model.table}
    tied_copy = "lm_head.weight" if model_config.tie_embeddings and "lm_head.weight" in files else None
    _check_names(folder, expected, {name for name in files if name != tied_copy})
    parameters: dict[str, Tensor] = {}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    digest = hashlib.sha256()
    with _Shards(folder, files) as shards:
        for name in sorted(expected):
            weight = expected[name]
            tensor = shards.read(name)
            if tuple(tensor.shape) != weight.shape:
                raise ModelError(
                    f"{name} in {folder} does not fit config.json", got=tuple(tensor.shape), wanted=weight.shape
                )
            if tensor.dtype not in DTYPES:
                raise ModelError(
                    f"{name} in {folder} has an unsupported dtype",
                    got=tensor.dtype,
                    wanted="float32, bfloat16, float16",
                )
            _hash_tensor(digest, name, tensor)
            if weight.parameter not in parameters:
                parameters[weight.parameter] = torch.empty(shapes[weight.parameter], dtype=dtype or tensor.dtype)
            weight.put(tensor, parameters[weight.parameter])
        if tied_copy and not torch.equal(shards.read(tied_copy), shards.read("model.embed_tokens.weight")):
            raise ModelError(
                f"{folder} says its embeddings are tied but its lm_head differs from them",
                mend="set tie_word_embeddings to false in config.json",
            )
    model.load_state_dict(parameters, assign=True)
    found = digest.hexdigest()
    claimed = manifest.get("weights_hash")
    if claimed is not None and claimed != found:
        raise ModelError(
            f"the weights in {folder} are not those its {MANIFEST} names",
            got=found[:12],
            wanted=str(claimed)[:12],
            mend="restore the folder from where it was made",
        )
    model.loaded_hashes = found, found if dtype is None else weights_hash(named_state(model))
    return model


def save_model(model: Transformer, folder: Path | str, dtype: torch.dtype | None = None, **manifest: Any) -> str:
    """Writes config.json, model.safetensors, generation_config.json and prairie.json; returns the weights' hash.

    `manifest` is added to `prairie.json`. The folder loads in transformers. ModelError when it cannot be written.
    """
    folder = Path(folder)
    state = {name: tensor.to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in named_state(model).items()}
    kind = str(next(iter(state.values())).dtype).removeprefix("torch.")
    c = model.config
    stops = list(c.eos_id) if isinstance(c.eos_id, tuple) else c.eos_id
    marks = {"bos_token_id": c.bos_id, "eos_token_id": stops, "pad_token_id": c.pad_id}
    found = weights_hash(state)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", write_config(c, kind))
        write_json(
            folder / "generation_config.json",
            {k: v for k, v in marks.items() if v is not None},
        )
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / MANIFEST, {"kind": "model", **manifest, "weights_hash": found})
    except (OSError, SafetensorError) as error:
        raise not_written(ModelError, f"the model cannot be written to {folder}", error) from error
    return found


def not_written(kind: type[PrairieError], what: str, error: Exception) -> PrairieError:
    """The error to raise for files that cannot be written. Safetensors tells of a full disk in its text alone."""
    if getattr(error, "errno", None) == errno.ENOSPC or f"(os error {errno.ENOSPC})" in str(error):
        return StorageFullError(f"{what}: the disk is full", mend="free some space and run the command again")
    return kind(what, got=error)


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The folder's `prairie.json`; empty when there is none (a folder that others made). ModelError if unreadable."""
    path = Path(folder) / MANIFEST
    return read_json(path) if path.exists() else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a ModelError that says what is wrong with it."""
    value = _parsed(path)
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object", got=type(value).__name__)
    return value


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """A JSON list of objects from a file, or a ModelError."""
    value = _parsed(path)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ModelError(f"{path} holds no list of JSON objects", got=type(value).__name__)
    return value


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", wanted=f"a model folder with a {path.name}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read", got=error) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{list(tensor.shape)}|".encode())
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)


def _files_of(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor, from the index if there is one. Paths that leave the folder are refused."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{folder / INDEX} has no weight_map")
        for file in set(weight_map.values()):
            if Path(file).name != file:
                raise ModelError(f"{folder / INDEX} names a file outside its folder", got=file)
        return {name: folder / file for name, file in weight_map.items()}
    path = folder / WEIGHTS
    if not path.exists():
        others = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
        raise ModelError(
            f"{folder} holds no {WEIGHTS}",
            got=", ".join(others) if others else "no weights",
            mend="convert pickled weights to safetensors elsewhere; they are never opened here" if others else None,
        )
    with _opened(path) as file:
        return dict.fromkeys(file.keys(), path)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", wanted="every file that the index names") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is damaged or cut short", got=error, mend="copy it again from where it came"
        ) from error


def _check_names(folder: Path, expected: Iterable[str], found: Iterable[str]) -> None:
    names = {name for name in found if not name.endswith("rotary_emb.inv_freq")}
    missing, unexpected = sorted(set(expected) - names), sorted(names - set(expected))
    for kind, odd in (("lacks", missing), ("holds unknown", unexpected)):
        if odd:
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            raise ModelError(f"the weights in {folder} do not fit config.json: it {kind} {', '.join(odd[:3])}{more}")


class _Shards:
    """Open files of a folder; tensors are read when asked for."""

    def __init__(self, folder: Path, files: Mapping[str, Path]) -> None:
        self.folder, self.files = folder, files
        self.open: dict[Path, Any] = {}

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self.open.clear()

    def read(self, name: str) -> Tensor:
        path = self.files[name]
        if path not in self.open:
            self.open[path] = _opened(path)
        try:
            tensor: Tensor = self.open[path].get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{name} cannot be read from {path}", got=error) from error
        return tensor
