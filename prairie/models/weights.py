"""Weights in and out: Hugging Face folders of safetensors, every name and shape checked against the family's table.

Not here: tokenizer and chat template files (the data room writes them), adapters (`lora`). Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prairie.errors import ModelError, PrairieError, StorageFullError
from prairie.models.config import ModelConfig
from prairie.models.config_file import read_config, write_config
from prairie.models.families import FAMILIES, WRITING_RULES
from prairie.models.names import Names, Weight
from prairie.models.transformer import Transformer
from prairie.models.weight_table import names_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "prairie.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PIECE_BYTES = 2 << 20
"""How much of a tensor is read at once."""
READ_BYTES = 256 << 20
"""How much of a tensor is read by one call where nothing has to be turned round on the way."""
MOST_BUFFERS = 512
MAPPED_BYTES = 8 << 20
"""How much of a file may lie in memory before it is closed and opened anew: what was read counts as ours till then."""


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over the sorted names with their dtypes, shapes and bytes."""
    return _hash_of((name, state[name]) for name in sorted(state))


def _hash_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """Of tensors in the order of their names, one in memory at a time."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(_title(name, tensor.dtype, tensor.shape))
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def named_state(model: Transformer) -> dict[str, Tensor]:
    """The model's weights under the names and in the layout of the file; views of the parameters where that is one."""
    return dict(_each_named(model))


def _each_named(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """In the order of the names. ModelError when some are packed."""
    if (bits := model.packed) is not None:
        raise ModelError("a model whose weights are packed cannot be written", got=bits, mend="write it before")
    parameters = dict(model.named_parameters())
    for weight in sorted(model.table):
        yield weight.name, weight.take(parameters[weight.parameter].detach())


def hash_of(model: Transformer) -> str:
    """The hash that names this model's weights: the file's own while they are as loaded (in whatever dtype), else
    theirs. Computed once for a frozen base that many adapters ask for, else always anew: what trains a model may change
    weights without counting it in their versions, as fused optimisers do. Writing to a frozen weight's `.data` is not
    counted either, so whoever does that must not ask before and after."""
    if model.loaded_hashes is not None and model.packed is not None:
        return model.loaded_hashes[0]  # the model that was packed; packed weights do not change
    if model.hashed is None or not model.hashed.still(model):
        model.hashed = Hashed.of(model, _hash_of(_each_named(model)))
    found = model.hashed.found
    if model.loaded_hashes is not None and model.loaded_hashes[1] == found:
        return model.loaded_hashes[0]
    return found


class Hashed(NamedTuple):
    """The hash of a model's weights, and what tells that they are as they were."""

    found: str
    marks: list[tuple[weakref.ref[Tensor], int, int]] | None
    """Each frozen parameter with its version and address; None if some could learn."""

    @classmethod
    def of(cls, model: Transformer, found: str) -> Hashed:
        parameters = list(model.parameters())
        if any(p.requires_grad or p.is_inference() for p in parameters):
            return cls(found, None)
        return cls(found, [(weakref.ref(p), p._version, p.data_ptr()) for p in parameters])

    def still(self, model: Transformer) -> bool:
        """Whether it still is the hash of this model."""
        parameters = list(model.parameters())
        return (
            self.marks is not None
            and len(self.marks) == len(parameters)
            and all(
                mark() is p and not p.requires_grad and version == p._version and address == p.data_ptr()
                for (mark, version, address), p in zip(self.marks, parameters, strict=True)
            )
        )


def load_model(folder: Path | str, dtype: torch.dtype | None = None, *, verified: bool = False) -> Transformer:
    """Reads `config.json` and the weights of a Hugging Face folder into a Transformer.

    `dtype` None keeps the file's. `verified`: these very files were read and hashed before by this process, so what
    `prairie.json` claims of them is believed (`fingerprint` tells whether they are as they were). Tensors are read into
    place or in pieces, so that loading needs little more memory than the model (tests/models/test_load_memory.py).
    ModelError when a file is missing or damaged, when a name or shape differs from what the config promises, or when
    `prairie.json` names other weights.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest.get("kind") == "tower":
        raise ModelError(
            f"{folder} holds a net that plays Go, not a language model", mend="prairie go gtp, or prairie go match"
        )
    model_config = read_config(_raw_config(folder), str(folder / "config.json"))
    files = _files_of(folder)
    model_config = _as_in_the_files(model_config, folder, files)
    _check_counts(model_config, folder, len(files))
    names = names_of(model_config)
    with torch.device("meta"):
        model = Transformer(model_config)
    expected = {w.name: w for w in model.table}
    places = _by_expected_name(files, expected, names)
    copies = _copies_in(places, expected, names)
    _check_names(
        folder, expected, (n for n in places if n not in copies and (n in expected or not n.endswith(names.unused)))
    )
    claimed = manifest.get("weights_hash")
    known = str(claimed) if verified and claimed is not None else None
    digest = hashlib.sha256()
    with _Shards(places) as shards:
        kinds = {name: _checked_dtype(shards, expected[name], folder) for name in sorted(expected)}
        parameters = _room_for(model, kinds, dtype)
        rooms = {name: expected[name].room(parameters[expected[name].parameter], kind) for name, kind in kinds.items()}
        shards.read_into({name: room for name, room in rooms.items() if room is not None})
        for name, kind in kinds.items():
            weight, room = expected[name], rooms[name]
            if room is not None and known is not None:
                continue
            digest.update(_title(name, kind, weight.shape))
            if room is not None:
                digest.update(_bytes(room))
                continue
            for first, piece in shards.pieces(name):
                digest.update(_bytes(piece) if known is None else b"")
                weight.put(piece, parameters[weight.parameter], first)
        for copy, original in copies.items():
            if not shards.equal(copy, original):
                raise ModelError(
                    f"{folder} says that {copy} is tied to {original} but it differs",
                    mend="set tie_word_embeddings to false in config.json" if copy.startswith(names.head) else None,
                )
    model.load_state_dict(parameters, assign=True)
    found = known or digest.hexdigest()
    if claimed is not None and claimed != found:
        raise ModelError(
            f"the weights in {folder} are not those its {MANIFEST} names",
            got=found[:12],
            wanted=str(claimed)[:12],
            mend="restore the folder from where it was made",
        )
    model.merged = tuple(manifest.get("merged", ()))
    as_in_file = dtype is None or set(kinds.values()) == {dtype}
    model.loaded_hashes = found, found if as_in_file else _hash_of(_each_named(model))
    return model


def fingerprint(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What tells that a folder's files are untouched: names, inodes, sizes and times of change (ns)."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    return tuple((p.name, s.st_ino, s.st_size, s.st_mtime_ns) for p in files for s in [p.stat()])


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
    raw = write_config(c, kind)
    marks |= {key: raw[key] for key in WRITING_RULES if key in raw}
    found = weights_hash(state)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", raw)
        write_json(
            folder / "generation_config.json",
            {k: v for k, v in marks.items() if v is not None},
        )
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        facts = {"kind": "model", **manifest, "weights_hash": found, "merged": list(model.merged)}
        write_json(folder / MANIFEST, facts)
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
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read", got=error) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _title(name: str, dtype: torch.dtype, shape: Iterable[int]) -> bytes:
    """What stands before a tensor's bytes in a hash."""
    return f"{name}|{str(dtype).removeprefix('torch.')}|{list(shape)}|".encode()


def _bytes(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data
    return data


def _raw_config(folder: Path) -> dict[str, Any]:
    """`config.json`, with rules of writing that stand in `generation_config.json` alone."""
    raw, path = read_json(folder / "config.json"), folder / "generation_config.json"
    rules = read_json(path) if path.exists() else {}
    return raw | {key: rules[key] for key in WRITING_RULES if rules.get(key) is not None and raw.get(key) is None}


def _as_in_the_files(config: ModelConfig, folder: Path, files: Mapping[str, Path]) -> ModelConfig:
    """The config with what config.json does not say: if there are a pooler, biases of logits, an untied head."""
    names, family = names_of(config), FAMILIES[config.family]
    if config.head is not None and config.head.kind == "pool":
        pooler = family.head_row("pool").dense.removeprefix(names.prefix)
        config = config if any(pooler in name for name in files) else replace(config, head=None)
    if config.encoder is not None and names.logit_bias not in files:
        config = replace(config, logit_bias=False)
    if family.tied_by_file:
        head, embed = f"{names.head}.weight", f"{names.embed}.weight"
        with _Shards({name: _Place(path, name) for name, path in files.items()}) as shards:
            own = head in files and embed in files and not shards.equal(head, embed)
        config = replace(config, tie_embeddings=not own)
    return config


def _by_expected_name(files: Mapping[str, Path], expected: Container[str], names: Names) -> dict[str, _Place]:
    """Where each tensor lies, by the name that we expect: files of a bare model leave out the prefix, old files have
    old names."""
    places = {}
    for name, path in files.items():
        new = name
        for old_end, new_end in names.older:
            new = new.removesuffix(old_end) + new_end if new.endswith(old_end) else new
        forms = (new, names.prefix + new, new.removeprefix(names.prefix))
        places[next((form for form in forms if form in expected), new)] = _Place(path, name)
    return places


def _copies_in(places: dict[str, _Place], expected: Container[str], names: Names) -> dict[str, str]:
    """Second names of weights in the files. A weight that is there under its second name alone is found by it."""
    found = {}
    for copy, original in ((f"{names.head}.weight", f"{names.embed}.weight"), *names.copies):
        for prefix in ("", names.prefix):
            first = original.removeprefix(prefix)
            if copy in places and copy not in expected and first in expected:
                places.setdefault(first, places[copy])
                found[copy] = first
    return found


def _check_counts(config: ModelConfig, folder: Path, tensors: int) -> None:
    """Refuses a config of far more layers than the files can hold, before they are made."""
    if max(config.layers, config.experts) > tensors:
        experts = f" of {config.experts} experts" if config.experts else ""
        raise ModelError(
            f"the weights in {folder} do not fit config.json",
            got=f"{tensors} tensors",
            wanted=f"{config.layers} layers{experts}",
        )


def _room_for(model: Transformer, kinds: Mapping[str, torch.dtype], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Every parameter, not yet set, before the first piece is read: between pieces the heap would fall apart."""
    of_parameter = {weight.parameter: kinds[weight.name] for weight in sorted(model.table, reverse=True)}
    return {
        name: torch.empty(parameter.shape, dtype=dtype or of_parameter[name])
        for name, parameter in model.named_parameters()
    }


def _checked_dtype(shards: _Shards, weight: Weight, folder: Path) -> torch.dtype:
    """The dtype of a tensor, when it and the shape are as promised; ModelError otherwise."""
    shape, dtype = shards.shape_and_dtype(weight.name)
    if shape != weight.shape:
        raise ModelError(f"{weight.name} in {folder} does not fit config.json", got=shape, wanted=weight.shape)
    if dtype not in DTYPES:
        raise ModelError(
            f"{weight.name} in {folder} has an unsupported dtype", got=dtype, wanted="float32, bfloat16, float16"
        )
    return dtype


def _files_of(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor, from the index if there is one. Paths that leave the folder are refused."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{folder / INDEX} has no weight_map")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file:
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
    names = set(found)
    missing, unexpected = sorted(set(expected) - names), sorted(names - set(expected))
    for kind, odd in (("lacks", missing), ("holds unknown", unexpected)):
        if odd:
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            raise ModelError(f"the weights in {folder} do not fit config.json: it {kind} {', '.join(odd[:3])}{more}")


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begins, and what it says of each tensor. Of a file that was opened, and so
    checked, before."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(length))


def _neighbours(pieces: Iterable[tuple[int, memoryview]]) -> Iterator[tuple[int, list[memoryview]]]:
    """(where in the file, buffers that it fills one after the other); in the order of the file."""
    start, end, buffers = 0, 0, list[memoryview]()
    for at, data in pieces:
        if buffers and (at != end or len(buffers) == MOST_BUFFERS or end + len(data) - start > 4 * READ_BYTES):
            yield start, buffers
            buffers = []
        if not buffers:
            start = at
        buffers.append(data)
        end = at + len(data)
    if buffers:
        yield start, buffers


class _Place(NamedTuple):
    """A tensor's file, and its name there."""

    path: Path
    name: str


class _Shards:
    """Open files of a folder; tensors are read when asked for, in pieces."""

    def __init__(self, places: Mapping[str, _Place]) -> None:
        self.places = places
        self.open: dict[Path, Any] = {}
        self.read_bytes = 0

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self.open.clear()

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        part = self._slice(name)
        shape = tuple(part.get_shape())
        return shape, part[:0].dtype if shape else part[...].dtype

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """A tensor by its rows: the number of the first, and some rows."""
        shape, dtype = self.shape_and_dtype(name)
        row_bytes = max(1, math.prod(shape[1:]) * dtype.itemsize)
        step = max(1, PIECE_BYTES // row_bytes)
        for first in range(0, shape[0], step):
            try:
                piece: Tensor = self._slice(name)[first : first + step]
            except SafetensorError as error:
                raise ModelError(f"{name} cannot be read from {self.places[name].path}", got=error) from error
            yield first, piece
            self.read_bytes += piece.numel() * dtype.itemsize
            del piece
            if self.read_bytes > MAPPED_BYTES:
                self.open.clear()
                self.read_bytes = 0

    def read_into(self, rooms: Mapping[str, Tensor]) -> None:
        """Fills each tensor's room by as few calls as can be: nothing is copied in between, no page of a file counts as
        ours, and a server whose other threads compute waits for them once or twice instead of at every tensor."""
        in_file: dict[Path, list[tuple[int, memoryview]]] = {}
        for path in {self.places[name].path for name in rooms}:
            begin, header = _header(path)
            for name, room in rooms.items():
                if self.places[name].path == path:
                    at, data = begin + header[self.places[name].name]["data_offsets"][0], _bytes(room).cast("B")
                    starts = range(0, len(data), READ_BYTES)
                    in_file.setdefault(path, []).extend((at + i, data[i : i + READ_BYTES]) for i in starts)
        for path, pieces in in_file.items():
            with path.open("rb", buffering=0) as file:
                for at, buffers in _neighbours(sorted(pieces, key=itemgetter(0))):
                    if os.preadv(file.fileno(), buffers, at) != sum(map(len, buffers)):
                        raise ModelError(f"{path} is damaged or cut short", mend="copy it again from where it came")

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same."""
        if self.shape_and_dtype(name) != self.shape_and_dtype(other):
            return False
        pairs = zip(self.pieces(name), self.pieces(other), strict=True)
        return all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in pairs)

    def _slice(self, name: str) -> Any:
        path, own = self.places[name]
        if path not in self.open:
            self.open[path] = _opened(path)
        try:
            return self.open[path].get_slice(own)
        except SafetensorError as error:
            raise ModelError(f"{name} cannot be read from {path}", got=error) from error
