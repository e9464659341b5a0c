"""Prairie's Python face; `import prairie` loads nothing heavy.

import prairie
model = prairie.load("spark")            # a line of the registry, or a model folder
model.generate("What is 2 + 3?").text
prairie.run("spark", seed=1)
prairie.Registry().lines()
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prairie.engine.loading import Face
    from prairie.runtime import Runtime
    from prairie.store.registry import Registry

__version__ = "0.1.0"
__all__ = ["Registry", "__version__", "load", "run"]


def load(
    name: str | Path, home: str | Path | None = None, *, runtime: Runtime | None = None, **engine_settings: Any
) -> Any:
    """A model: a folder, or a name of the registry ("spark", "spark@3", "spark:poet").

    A decoder comes as a LanguageModel, an encoder or a classifier as a Reader, an encoder-decoder as a Seq2Seq. An
    adapter's folder brings the base that lies beside it. Raises NotFoundError for an unknown name, ModelError and its
    kin for files that are missing, damaged or do not belong together.
    """
    from prairie.engine.loading import load as load_face

    if runtime is None:
        import torch

        from prairie.runtime import Runtime

        runtime = Runtime.detect(threads=torch.get_num_threads())
    folder, adapter = _folders(name, home)
    model: Face = load_face(folder, adapter, runtime, **engine_settings)
    model.name = str(name) if adapter is not None or folder != Path(name) else folder.name
    return model


def run(
    recipe: str | Path, *, home: str | Path | None = None, threads: int | None = None, quiet: bool = False,
    **overrides: Any,
) -> dict[str, Any]:  # fmt: skip
    """Carries out a recipe (a file, or the name of one that comes with Prairie) and returns every stage's figures.

    `overrides` are keys of the recipe: `run("spark", seed=1, **{"sft.lr": 1e-3})`.
    """
    from prairie.cli.run import run_recipe

    changed = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]
    return run_recipe(recipe, changed, home=Path(home) if home is not None else None, threads=threads, quiet=quiet)


def _folders(name: str | Path, home: str | Path | None) -> tuple[Path, Path | None]:
    """The folders of the base and of the adapter on it."""
    from prairie.errors import AdapterError
    from prairie.models.weights import read_manifest
    from prairie.store.home import Home

    folder = Path(name).expanduser()
    if folder.is_dir():
        manifest = read_manifest(folder)
        if manifest.get("kind") != "adapter":
            return folder, None
        base = folder.parent / str(manifest.get("base_artifact", ""))
        if not manifest.get("base_artifact") or not base.is_dir():
            raise AdapterError(
                f"{folder} is an adapter and its base is not beside it",
                mend="LanguageModel.load(BASE_DIR, adapter=ADAPTER_DIR)",
            )
        return base, folder
    with Home(home) as store:
        version = store.registry.resolve(str(name))
        path = store.artifacts.get(version.artifact_id).path
        if version.base_artifact_id is None:
            return path, None
        return store.artifacts.get(version.base_artifact_id).path, path


def __getattr__(name: str) -> Any:
    if name == "Registry":
        from prairie.store.registry import Registry

        return Registry
    raise AttributeError(f"module 'prairie' has no attribute {name!r}")
