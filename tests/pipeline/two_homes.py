"""Whether two homes hold the same: every artifact by its id, every file by its hash, every turn with its verdict.

    python -m tests.pipeline.two_homes HOME OTHER

As after `prairie demo --no-serve --home HOME` and once more with another home. Says what differs, kind by kind, and
ends with 1 if anything does. Files that tell how long something took are left out.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from prairie.flywheel.remake import LOGS
from prairie.store.home import Home


def products(home: Home) -> dict[str, dict[str, str]]:
    """Of each artifact, named by its kind and id, the hashes of its files."""
    return {
        f"{artifact.kind} {artifact.id}": {
            name: facts["sha256"] for name, facts in artifact.manifest["files"].items() if name not in LOGS
        }
        for artifact in home.artifacts.list()
    }


def turns(home: Home) -> dict[str, dict[str, Any]]:
    """Of each turn, named by its line and number, whom it compared, what was learned and how it was judged."""
    told = ("champion", "candidate", "dataset", "promoted", "verdict")
    return {
        f"turn {turn.number} of {line}": {name: getattr(turn, name) for name in told}
        for line in home.registry.lines()
        for turn in home.registry.turns(line)
    }


def differences(one: Home, other: Home) -> tuple[Counter[str], list[str]]:
    """(how many of each kind are the same in both, what is not)."""
    mine, theirs = ({**products(home), **turns(home)} for home in (one, other))
    same = Counter(name.split()[0] for name in mine.keys() & theirs.keys() if mine[name] == theirs[name])
    told = []
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            told.append(f"{name}: only in {(one if name in mine else other).root}")
        elif mine[name] != theirs[name]:
            parts = sorted(mine[name].keys() | theirs[name].keys())
            told.append(f"{name}: {', '.join(p for p in parts if mine[name].get(p) != theirs[name].get(p))}")
    return same, told


def main(paths: list[str]) -> int:
    if len(paths) != 2 or not all((Path(path) / "prairie.db").is_file() for path in paths):
        sys.exit("wanted two homes: python -m tests.pipeline.two_homes HOME OTHER")
    with Home(paths[0]) as one, Home(paths[1]) as other:
        same, told = differences(one, other)
    print("the same in both: " + ", ".join(f"{count} {kind}" for kind, count in sorted(same.items())))
    print("\n".join(told) or "nothing differs")
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
