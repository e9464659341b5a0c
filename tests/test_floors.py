"""The rooms of the house: a room imports only what stands behind it here, lazy and type-checking imports included."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "prairie"
GROUND = "errors recipe runtime"
ENGINE = "errors runtime data ops models"
EVALS = f"{ENGINE} engine tasks store"
PIPELINE = f"{GROUND} data ops models train store tasks engine evals"
MAY = {
    "errors": "",
    "recipe": "errors",
    "runtime": "errors",
    "data": GROUND,
    "ops": "errors runtime",
    "store": "errors recipe data",
    "models": f"{GROUND} ops",
    "tasks": "errors data",
    "train": f"{GROUND} data ops models",
    "engine": ENGINE,
    "games": "errors runtime data models",
    "evals": EVALS,
    "pipeline": PIPELINE,
    "flywheel": f"{PIPELINE} pipeline games",
    "serve": f"{ENGINE} engine store evals games",
    "apps": "errors",
    "web": "",
    "cli": f"{PIPELINE} pipeline flywheel serve games apps web",
    "__init__": "*",
    "__main__": "cli errors",
}
IN_CIRCLES = {
    *(f"models/{name}" for name in ("lora", "quantized", "transformer", "weights")),
    *(f"store/{name}" for name in ("artifacts", "feedback", "home", "keys", "registry")),
}
"""Files that know each other in a circle, of types only; no other may."""


def imported_rooms(path: Path) -> set[tuple[int, str]]:
    """(line, room) of every import of prairie in a file, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written whole, not relative"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {(node.lineno, name.split(".")[1]) for name in names if name.startswith("prairie.")}
    return found


def test_arrows_only_go_down():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert room in MAY, f"{path}: the room `{room}` has no entry in MAY"
        allowed = {room, "__version__", *MAY[room].split()}
        for line, other in sorted(imported_rooms(path)):
            if other not in allowed and MAY[room] != "*":
                wrong.append(f"{path}:{line}: {room} must not import {other}; it may import: {MAY[room] or 'nothing'}")
    assert not wrong, "\n".join(wrong)


def test_nothing_knows_itself_in_a_circle():
    files = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for name, path in files.items():
        froms = [
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)
        ]
        said = [f"{node.module}.{alias.name}" for node in froms for alias in node.names]
        places = [one.removeprefix("prairie.").replace(".", "/") for one in said if one.startswith("prairie.")]
        known = {place if place in files else place.rpartition("/")[0] for place in places} & files.keys() - {name}
        graph[name] = known - IN_CIRCLES if name in IN_CIRCLES else known
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_one_objective_does_not_import_another():
    objectives = PACKAGE / "train" / "objectives"
    names = {path.stem for path in objectives.glob("*.py")} - {"__init__"}
    for path in objectives.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("prairie.train.objectives"):
                assert node.module.split(".")[-1] not in names - {path.stem}, f"{path}:{node.lineno}"


def test_no_drawer_for_odds_and_ends():
    banned = {"utils", "helpers", "common", "core", "callbacks", "plugins", "experimental", "misc"}
    assert not [path for path in PACKAGE.rglob("*") if path.stem in banned]
