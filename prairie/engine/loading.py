"""A model folder -> the face that fits what it is. Not here: the faces, names of a registry (`prairie.load`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prairie.engine.language_model import LanguageModel
from prairie.engine.reader import Reader
from prairie.engine.seq2seq import Seq2Seq
from prairie.errors import ModelError
from prairie.models.config_file import read_config
from prairie.models.peft_format import ADAPTER_CONFIG
from prairie.models.weights import read_json, read_manifest
from prairie.runtime import Runtime

Face = LanguageModel | Reader | Seq2Seq


def load(
    folder: Path | str,
    adapter: Path | str | None = None,
    runtime: Runtime | None = None,
    verified: bool = False,
    **engine_settings: Any,
) -> Face:
    """A decoder answers (LanguageModel), an encoder-decoder rewrites (Seq2Seq), all others read (Reader), and so does a
    decoder with an adapter that brings a head of scores.
    `verified`, of a decoder: as in `load_model`.

    Raises what their `load` raises; ModelError for an adapter on a model that takes none.
    """
    folder = Path(folder)
    if folder.is_dir() and read_manifest(folder).get("kind") != "adapter":
        config = read_config(read_json(folder / "config.json"), str(folder / "config.json"))
        if config.kind != "decoder" or not config.writes:
            if adapter is not None:
                raise ModelError(f"{folder} takes no adapter here", got=adapter, wanted="a decoder that writes")
            if engine_settings.get("quantize") is not None or engine_settings.get("dtype") == "bfloat16":
                raise ModelError(
                    f"{folder} cannot be quantised", got=f"an {config.kind}", wanted="a decoder that writes"
                )
            return Seq2Seq.load(folder, runtime) if config.writes else Reader.load(folder, runtime)
        if adapter is not None and read_json(Path(adapter) / ADAPTER_CONFIG).get("modules_to_save"):
            return Reader.load(folder, runtime, adapter)
    return LanguageModel.load(folder, adapter, runtime, verified=verified, **engine_settings)
