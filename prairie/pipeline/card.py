"""The model card: README.md of an exported folder. It says what is known of the model, and where nothing is known.

The front matter is what the Hugging Face hub reads. Not here: the lineage itself (`store.registry`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

SHOWN_KEYS = (
    "objective", "start", "data", "epochs", "steps", "lr", "optimizer", "tokens_per_batch", "max_tokens", "dtype",
    "quantize", "adapter", "beta", "loss", "sft_weight", "shape", "tasks", "source", "path", "want", "line",
)  # fmt: skip
"""Keys of a stage that a card shows, where they are set."""
SHOWN_FIGURES = (
    "loss",
    "accuracy",
    "perplexity",
    "rows",
    "tokens",
    "supervised_tokens",
    "parameters",
    "users",
    "votes",
)


def card(
    name: str,
    form: str,
    manifest: Mapping[str, Any],
    lineage: Mapping[str, Any],
    configs: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> str:
    """The card's text. `manifest`: the folder's `prairie.json`; `configs`: what each artifact was made with, by id."""
    configs = {id: _without_folders(config) for id, config in configs.items()}
    tops = [top for top in (lineage.get("artifact"), lineage.get("base")) if top]
    nodes = [node for top in tops for node in _nodes(top)]
    stated = {key: _stated(key, manifest, nodes) for key in ("license", "origin")}
    licence = stated["license"]
    merged = [*manifest.get("merged", ()), *manifest.get("parents", ())]
    front = {
        "license": licence or "unknown",
        "library_name": {"hf": "transformers", "peft": "peft", "gguf": "gguf"}[form],
        "base_model": (stated["origin"] or "").partition("@")[0],
        "tags": ["prairie"],
    }
    parts = [
        "---\n" + yaml.safe_dump({k: v for k, v in front.items() if v}, sort_keys=False, allow_unicode=True) + "---",
        f"# {name}",
        "## Lineage",
        _lines([*_identity(manifest, lineage), *(f"stands on or holds adapter `{hash[:12]}`" for hash in merged)]),
        "```text\n" + "\n".join(_tree(tops)) + "\n```" if tops else "Of a plain folder; no more is known.",
        "## Data",
        _lines(_data(nodes, configs)) or "Not known.",
        "## Recipe",
        _lines(_recipe(nodes, configs, lineage)) or "Not known.",
        "## Figures",
        _lines(_figures(nodes, lineage)) or "None were measured.",
        "## Export",
        _lines(
            f"{key}: {_plain(value)}" for key, value in facts.items() if key != "folder" and value not in (None, [])
        ),
        "## Licence",
        f"{licence}, as the base states it." if licence else "None is stated. Ask the makers of its base and data.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _without_folders(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A card is read elsewhere: of a path it tells the last name, not where the maker keeps things."""
    return {**config, "path": Path(config["path"]).name} if config.get("path") else config


def _stated(key: str, manifest: Mapping[str, Any], nodes: list[Any]) -> str | None:
    """What the folder itself, or the open model that it was made from, says."""
    found = (manifest.get(key), *((node.get("figures") or {}).get(key) for node in nodes))
    return next((str(value) for value in found if value), None)


def _nodes(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield node
    for below in node.get("inputs", []):
        yield from _nodes(below)


def _identity(manifest: Mapping[str, Any], lineage: Mapping[str, Any]) -> Iterator[str]:
    if lineage:
        yield f"version `{lineage['name']}`, artifact `{lineage['artifact_id']}`"
    for key, what in (
        ("weights_hash", "weights"), ("adapter_hash", "adapter"), ("base_hash", "base"),
        ("tokenizer_hash", "tokenizer"), ("template_hash", "chat template"), ("origin", "imported from"),
    ):  # fmt: skip
        if manifest.get(key):
            yield f"{what} `{manifest[key]}`"


def _tree(tops: list[Any]) -> Iterator[str]:
    def draw(node: Mapping[str, Any], depth: int) -> Iterator[str]:
        kind, name = node.get("kind", "gone"), node.get("name", "")
        votes = f", from {len(node['events'])} votes" if node.get("events") else ""
        yield f"{'  ' * depth}{kind} {name} {node['id']}{votes}"
        for below in node.get("inputs", []):
            yield from draw(below, depth + 1)

    for top in tops:
        yield from draw(top, 0)


def _data(nodes: list[Any], configs: Mapping[str, Any]) -> Iterator[str]:
    for node in nodes:
        config = configs.get(node["id"]) or {}
        if node.get("repeated") or node.get("kind") not in ("prepare", "votes", "sample"):
            continue
        figures = node.get("figures", {})
        source = (
            config.get("path") or ", ".join(config.get("tasks") or []) or config.get("source") or config.get("line")
        )
        yield f"`{node['name']}` ({node['kind']}): {source}, {figures.get('rows', 'unknown')} rows"


def _recipe(nodes: list[Any], configs: Mapping[str, Any], lineage: Mapping[str, Any]) -> Iterator[str]:
    made = lineage.get("lineage") or {}
    if made.get("recipe"):
        yield f"recipe `{made['recipe']}`, hash `{str(made.get('recipe_hash', ''))[:12]}`"
    for node in reversed(nodes):
        config = configs.get(node["id"]) or {}
        if not node.get("repeated") and node.get("kind") in ("train", "candidate", "import", "tokenizer"):
            shown = {key: config[key] for key in SHOWN_KEYS if config.get(key) not in (None, [], {})}
            yield f"`{node['name']}` ({node['kind']}): {json.dumps(shown, ensure_ascii=False, default=str)}"


def _figures(nodes: list[Any], lineage: Mapping[str, Any]) -> Iterator[str]:
    for name, figures in (
        *((f"`{node['name']}`", node.get("figures") or {}) for node in nodes if not node.get("repeated")),
        ("this version", lineage.get("figures") or {}),
    ):
        shown = [f"{key} {_plain(figures[key])}" for key in SHOWN_FIGURES if isinstance(figures.get(key), int | float)]
        if shown:
            yield f"{name}: {', '.join(shown)}"


def _lines(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
