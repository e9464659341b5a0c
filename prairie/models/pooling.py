"""From the hidden states of a row to one vector: what a folder's sentence-transformers files say of it, and the sums.

`modules.json` lists the steps behind the Transformer: a Pooling with its own config, then perhaps Normalize. A step
that is not computed here is refused: a vector of another make would be silently wrong.

Legend: N tokens of all rows, B rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prairie.errors import ModelError
from prairie.models.heads import pool_rows
from prairie.models.weights import read_json, read_json_list

KINDS = ("mean", "cls", "max", "last")
OLDER = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
"""Switches that sentence-transformers wrote before its version 5, by the name of today."""


@dataclass(frozen=True)
class Pooling:
    """How one vector is made of a row of hidden states."""

    kind: str = "mean"
    """"mean" of all tokens, special ones included; "max" of each column; the first ("cls") or "last" token."""
    normalize: bool = False
    """Vectors of unit length."""
    max_tokens: int | None = None
    """Longest row the model was made for; longer ones are refused, not cut."""
    lower_case: bool = False
    prefix: str = ""
    """Text before every text ("query: "), where the folder names one for all."""

    def __call__(self, hidden_ND: Tensor, lengths: Sequence[int]) -> Tensor:
        """(B, D) float32."""
        pooled_BD = pool_rows(hidden_ND.float(), lengths, self.kind)
        return torch.nn.functional.normalize(pooled_BD, dim=1) if self.normalize else pooled_BD


def read_pooling(folder: Path | str) -> Pooling | None:
    """What `modules.json` and the files it names say; None for a folder that says nothing of embeddings.

    Raises ModelError for a step, a kind of pooling or a prompt that is not computed here, and for damaged files.
    """
    folder = Path(folder)
    if not (folder / "modules.json").is_file():
        return None
    kind, normalize, length = "mean", False, {}
    for step in read_json_list(folder / "modules.json"):
        name = str(step.get("type", "")).rsplit(".", 1)[-1]
        if name == "Transformer":
            config = _inside(folder, step) / "sentence_bert_config.json"
            length = read_json(config) if config.is_file() else {}
        elif name == "Pooling":
            kind = _kind_of(read_json(_inside(folder, step) / "config.json"), folder)
        elif name == "Normalize":
            normalize = True
        else:
            raise ModelError(
                f"{folder} makes its embeddings with a step that is not computed here",
                got=name or step,
                wanted="Transformer, Pooling, Normalize",
            )
    most = length.get("max_seq_length")
    return Pooling(
        kind=kind,
        normalize=normalize,
        max_tokens=most if isinstance(most, int) else None,
        lower_case=bool(length.get("do_lower_case", False)),
        prefix=_prefix_of(folder),
    )


def carry_pooling(folder: Path, target: Path) -> None:
    """Copies the files by which a folder says how it pools, if it says so, beside the same model elsewhere."""
    if not (folder / "modules.json").is_file():
        return
    files = [
        folder / name for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
    ]
    files += [
        _inside(folder, step) / "config.json" for step in read_json_list(folder / "modules.json") if step.get("path")
    ]
    for file in files:
        if file.is_file():
            copy = target / file.resolve().relative_to(folder.resolve())
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())


def _kind_of(config: dict[str, Any], folder: Path) -> str:
    modes = config.get("pooling_mode", [mode for switch, mode in OLDER.items() if config.get(switch)])
    modes = [modes] if isinstance(modes, str) else modes
    kind = {"lasttoken": "last"}.get(modes[0], modes[0]) if len(modes) == 1 else None
    if kind not in KINDS or config.get("include_prompt") is False:
        raise ModelError(
            f"{folder} pools its embeddings in a way that is not computed here",
            got=" + ".join(map(str, modes)) if kind not in KINDS else "include_prompt false",
            wanted="one of mean, cls, max, lasttoken, over all tokens",
        )
    return kind


def _prefix_of(folder: Path) -> str:
    """The prompt that stands before every text unless the caller names another."""
    path = folder / "config_sentence_transformers.json"
    config = read_json(path) if path.is_file() else {}
    name, prompts = config.get("default_prompt_name"), config.get("prompts") or {}
    if name is not None and name not in prompts:
        raise ModelError(f"{path} names a default prompt that it does not hold", got=name, wanted=", ".join(prompts))
    return "" if name is None else str(prompts[name])


def _inside(folder: Path, step: dict[str, Any]) -> Path:
    path = (folder / str(step.get("path", ""))).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ModelError(f"{folder / 'modules.json'} names a folder outside of its own", got=step.get("path"))
    return path
