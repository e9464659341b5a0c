"""Models out of the house: a Hugging Face folder, a PEFT adapter or a GGUF file, with a card of where it is from.

A copy is exact unless another dtype is asked for or an adapter is merged. The new folder is whole or absent.
Not here: the formats (`models.weights`, `models.lora`, `models.gguf`, `data.gguf_vocabulary`), the text of the `card`.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prairie.errors import AdapterError, ModelError, RequestError
from prairie.models.weights import read_manifest
from prairie.pipeline.card import card
from prairie.store.disk import disk_errors, sync_tree
from prairie.store.home import Home

Form = Literal["hf", "peft", "gguf"]
HF_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Origin:
    """What is exported: its folder, and the base's where it is an adapter."""

    name: str
    folder: Path
    base: Path | None = None
    files: tuple[str, ...] = ()
    """What the folder holds."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """As `Registry.lineage` has it; empty for a plain folder."""
    configs: dict[str, Any] = field(default_factory=dict)
    """What the artifacts of the lineage were made with, by id."""


def origin_of(name: str, home: Home) -> Origin:
    """A folder, or a name of the registry whose files are verified first. NotFoundError, StoreError for damage."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        files = tuple(str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file())
        manifest = read_manifest(folder)
        base = folder.parent / str(manifest.get("base_artifact", "")) if manifest.get("kind") == "adapter" else None
        return Origin(folder.resolve().name, folder, base, files)
    version = home.registry.resolve(name)
    artifact = home.artifacts.get(version.artifact_id)
    home.artifacts.verify(artifact.id)
    base = home.artifacts.get(version.base_artifact_id).path if version.base_artifact_id else None
    lineage = home.registry.lineage(version)
    ids = {node["id"] for top in (lineage["artifact"], lineage.get("base")) if top for node in nodes_of(top)}
    found = [a for id in ids if (a := home.artifacts.find(id)) is not None]
    configs = {a.id: a.manifest.get("config") for a in found}
    return Origin(version.name, artifact.path, base, tuple(artifact.manifest["files"]), lineage, configs)


def nodes_of(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A node of a lineage and all below it."""
    yield node
    for below in node.get("inputs", []):
        yield from nodes_of(below)


def export(origin: Origin, folder: Path, to: Form | None, dtype: str | None, merge: bool) -> dict[str, Any]:
    """Writes `origin` into the new folder and returns the facts of it.

    `to` None: a model as "hf", an adapter as "peft". `dtype`: f32, f16, bf16, for GGUF q8_0 and q4_0
    too; None keeps the file's.
    RequestError for what does not go together, ModelError and AdapterError for models that cannot be written so.
    """
    form = to or ("peft" if origin.base is not None and not merge else "hf")
    _check(origin, form, dtype, merge)
    facts: dict[str, Any] = {"exported": origin.name, "folder": str(folder), "to": form, "merged": merge}
    with new_folder(folder) as part:
        if form == "gguf":
            facts |= _write_gguf(origin, part, dtype)
        elif form == "hf" and (dtype is not None or merge):
            facts |= _write_hf(origin, part, dtype)
        else:
            for name in origin.files:
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(origin.folder / name, part / name)
        manifest = read_manifest(origin.folder)
        text = card(origin.name, form, manifest, origin.lineage, origin.configs, facts)
        (part / "README.md").write_text(text, "utf-8")
    return facts


def _check(origin: Origin, form: Form, dtype: str | None, merge: bool) -> None:
    adapter = origin.base is not None
    if merge and not adapter:
        raise RequestError(f"{origin.name} is no adapter, so there is nothing to merge", mend="leave out --merge")
    if form == "peft" and (not adapter or merge):
        got = "a merged model" if merge else "a whole model"
        raise RequestError("only an adapter can be written in PEFT's format", got=got, mend="use --to hf")
    if form != "peft" and adapter and not merge:
        raise RequestError(
            f"{origin.name} is an adapter, and --to {form} writes whole models", mend="add --merge, or use --to peft"
        )
    if form == "peft" and dtype is not None:
        raise RequestError("an adapter is copied as it is", got=f"--dtype {dtype}", mend="leave out --dtype")
    if form == "hf" and dtype is not None and dtype not in HF_DTYPES:
        raise RequestError("a Hugging Face folder cannot have this dtype", got=dtype, wanted=" | ".join(HF_DTYPES))
    if origin.base is not None and merge and not origin.base.is_dir():
        raise AdapterError(f"the base of {origin.name} is not beside it", got=origin.base.name or "none")


def _opened(origin: Origin) -> tuple[Any, Any, Any, float | None]:
    """(model, tokenizer, template, what merging changed) of a model, or of an adapter merged into its base."""
    import torch

    from prairie.data.tokenizer import Tokenizer
    from prairie.models.lora import LoRA
    from prairie.models.weights import load_model
    from prairie.pipeline.model_stages import template_of

    folder = origin.base or origin.folder
    tokenizer = Tokenizer.load(folder)
    # Merged in float32 whatever the files hold, and rounded once, when it is written.
    model = load_model(folder, None if origin.base is None else torch.float32)
    error = None if origin.base is None else LoRA.load(origin.folder).merge_into(model, origin.name)
    return model, tokenizer, template_of(folder, tokenizer, model.config), error


def _write_hf(origin: Origin, part: Path, dtype: str | None) -> dict[str, Any]:
    import torch

    from prairie.models.pooling import carry_pooling
    from prairie.pipeline.model_stages import write_model

    model, tokenizer, template, error = _opened(origin)
    manifest = {k: v for k, v in read_manifest(origin.folder).items() if k in ("license", "origin")}
    if dtype is not None:
        model = model.to(getattr(torch, HF_DTYPES[dtype]))
        if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            raise ModelError(f"{origin.name} has numbers that {dtype} cannot hold", mend="use --dtype bf16 or f32")
    write_model(model, tokenizer, template, part, manifest)
    carry_pooling(origin.base or origin.folder, part)
    return {"dtype": dtype} | ({} if error is None else {"merge_error": error})


def _write_gguf(origin: Origin, part: Path, dtype: str | None) -> dict[str, Any]:
    from prairie.data.gguf_vocabulary import add_vocabulary
    from prairie.models.gguf import add_model, architecture_of, gguf_library

    gguf = gguf_library()
    kind = dtype or "f16"
    model, tokenizer, template, error = _opened(origin)
    plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in origin.name)
    path = part / f"{plain}-{kind}.gguf"
    writer = gguf.GGUFWriter(path, architecture_of(model.config).name)
    try:
        kept = add_model(writer, model, kind, origin.name)
        fidelity = add_vocabulary(writer, tokenizer, template, model.config.vocab_size)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    facts = {"dtype": kind, "file": path.name, "tokenizer": str(fidelity), "kept_f16": kept}
    return facts | ({} if error is None else {"merge_error": error})


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A place beside `folder` that becomes it at the end: whole, synced and all at once, or not at all.

    RequestError when the folder holds something already, StorageFullError when the disk is full.
    """
    with disk_errors(f"{folder} cannot be written"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RequestError(f"{folder} holds something already", wanted="a new or empty folder")
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        part = folder.absolute().with_name(f"{folder.name}.{secrets.token_hex(4)}.part")
        try:
            part.mkdir()
            yield part
            sync_tree(part)
            os.rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
