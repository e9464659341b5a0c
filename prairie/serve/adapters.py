"""Adapters that come and go while the server runs: named by whoever loads them, told apart by their content.

A name stands for one content until it is unloaded; another content under a name in use is refused, so that no request
can be answered by what it did not ask for. Requests under way keep the adapter that they began with. At most
`max_adapters` that nobody uses stay in memory, the latest used; the others are read again when they are asked for.
Not here: the table of what is in memory (`models`), who may do this (`gate`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from prairie.errors import AdapterError, ConflictError, NotFoundError, RequestError
from prairie.serve.models import Models, Source


class Adapters:
    """What was loaded by name at run time. Blocking: call it in a thread."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def load(self, name: str, folder: Path, base: str | None = None) -> dict[str, Any]:
        """Brings a PEFT folder into memory under a name; its model object. The same content again changes nothing.

        `base`: a name that is served; None: the base that the adapter says it stands on, or the only one there is.
        Raises ConflictError for a name in use, AdapterError for a damaged adapter or one of another base.
        """
        from prairie.models.lora import LoRA
        from prairie.models.weights import read_manifest

        if not name or len(name) > 200 or "@" in name or ":" in name:
            raise RequestError(
                "this is no name for an adapter", got=repr(name[:50]), wanted="1 to 200 characters, no @ or :",
                param="lora_name",
            )  # fmt: skip
        folder = folder.expanduser().resolve()
        if not (folder / "adapter_config.json").is_file():
            raise AdapterError(f"{folder.name} is no adapter folder", wanted="a folder with adapter_config.json")
        content = LoRA.load(folder).hash
        known = self.models.added.get(name)
        if known is not None and known.artifact_id == content:
            return self.models.describe(name)
        if known is not None or self.models.is_served(name):
            raise ConflictError(
                f"the name `{name}` stands for something else", got=content[:12], wanted="another name",
                mend="unload it first, or choose another name", param="lora_name",
            )  # fmt: skip
        base_folder = self._base_folder(read_manifest(folder).get("base_hash"), base)
        source = Source(f"{name}@{content[:12]}", folder, base_folder, name, artifact_id=content, created=time.time())
        self.models.add(name, source)
        return self.models.describe(name)

    def unload(self, name: str) -> None:
        """The name is free at once; requests under way end with the adapter. Raises NotFoundError."""
        if name not in self.models.added:
            raise NotFoundError(
                "no adapter of that name was loaded", got=f"`{name}`", wanted=", ".join(self.models.added) or "none is",
                param="lora_name",
            )  # fmt: skip
        self.models.remove(name)

    def _base_folder(self, base_hash: object, base: str | None) -> Path:
        """Raises AdapterError if none fits, or several do."""
        found = self.models.base_folders(base)
        fitting = [folder for hash, folder in found if base_hash is None or hash == base_hash]
        if len(set(fitting)) != 1:
            raise AdapterError(
                "the base of this adapter is not clear" if fitting else "no base that is served fits this adapter",
                got=f"base {str(base_hash)[:12]}" if base_hash else "an adapter that names no base",
                wanted="`base_model_name`, a model that is served", param="base_model_name",
            )  # fmt: skip
        return fitting[0]
