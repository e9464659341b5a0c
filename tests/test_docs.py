"""The documents say what the program does: commands parse, keys and defaults agree, names and links lead somewhere.

No torch here, so that `make docs` answers at once. The page on data has its own test (`tests/data/test_data_page.py`).
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from pydantic import BaseModel

from prairie import errors
from prairie.cli.main import _WRONG_USAGE, COMMANDS, app
from prairie.cli.run import find_recipe
from prairie.recipe import (
    KINDS,
    AdapterShape,
    GateRules,
    GoLearning,
    GoMatch,
    GoPlay,
    HeldOut,
    Learning,
    Recipe,
    Shape,
    Users,
    load_recipe,
    resolve_recipe,
)

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PAGES = [*READMES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MODELS: dict[str, type[BaseModel]] = {
    "Recipe": Recipe, **KINDS, "Learning": Learning, "Held-out": HeldOut, "Shape": Shape, "Adapter": AdapterShape,
    "Users": Users, "Gate": GateRules, "GoPlay": GoPlay, "GoLearning": GoLearning, "GoMatch": GoMatch,
}  # fmt: skip
EVERYWHERE = {"--home", "--json", "--help"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
every_readme = pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)


# --- reading Markdown -------------------------------------------------------------------------------------------------


@cache
def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str, mark: str = "") -> list[str]:
    """The fenced blocks of a language, with `mark` on the line above."""
    return re.findall(rf"^{mark}```{language}\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))


def sections(page: Path) -> dict[str, str]:
    """Heading -> what stands under it, up to the next heading of any level."""
    parts = re.split(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def table(text: str, first: str) -> list[list[str]]:
    """The rows of the table whose first column has this title; cells without their backticks."""
    found: list[list[str]] = []
    for block in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        if rows[0][0] == first:
            found += rows[2:]
    return found


def plain(cell: str) -> str:
    return cell.replace("`", "").strip()


# --- commands ---------------------------------------------------------------------------------------------------------


@cache
def root() -> Any:
    return typer.main.get_command(app)


@cache
def _below(command: Any, name: str) -> Any:
    return command.get_command(None, name)


def find(words: list[str]) -> tuple[Any, list[str]]:
    """The command that some words name, and the words after its name. Fails the test when there is none."""
    command, rest = root(), list(words)
    while hasattr(command, "get_command") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        below = _below(command, name)
        assert below is not None, f"there is no command `prairie {shlex.join(words)}`: what is {name}?"
        command = below
    return command, rest


def options(command: Any) -> dict[str, Any]:
    return {max(p.opts, key=len): p for p in command.params if p.param_type_name == "option"}


def prairie_lines(text: str) -> Iterator[list[str]]:
    """The words after `prairie` of each command line in a shell block; comments and pipes taken apart."""
    for line in text.splitlines():
        for part in re.split(r" \| ", re.split(r"(?:^|\s)# ", line)[0]):
            words = shlex.split(part.removeprefix("$ "))
            if words[:1] == ["prairie"]:
                yield words[1:]


def recipe_lines(recipe: Path) -> Iterator[list[str]]:
    """The same of the comment at the top of a recipe."""
    for line in top_comment(recipe).splitlines():
        for part in re.findall(r"prairie [a-z].*?(?=\s{2,}|\)|$)", line):
            yield shlex.split(part)[1:]


def top_comment(recipe: Path) -> str:
    return "\n".join(re.match(r"(?:#.*\n)+", read(recipe))[0].splitlines())


def check_line(words: list[str], named: dict[str, Path]) -> None:
    """Parses a command line as the program would, and reads the recipe that it names with the keys that it sets."""
    command, rest = find(words)
    try:
        command.make_context(words[0], list(rest))
    except _WRONG_USAGE as error:
        pytest.fail(f"`prairie {shlex.join(words)}` does not parse: {error.format_message()}")
    if words[0] in ("run", "plan") and rest and not rest[0].startswith("-") and not rest[0].isupper():
        path = named.get(rest[0]) or find_recipe(ROOT / rest[0] if "/" in rest[0] else rest[0])
        load_recipe(path, [word for word in rest[1:] if not word.startswith("-")]).order()


def recipes_in(page: Path, folder: Path) -> dict[str, Path]:
    """The YAML blocks of a page that are whole recipes, as files."""
    found = {}
    for text in blocks(page, "yaml"):
        tree = yaml.safe_load(text)
        if isinstance(tree, dict) and "stages" in tree:
            found[f"{tree['name']}.yaml"] = folder / f"{tree['name']}.yaml"
            found[f"{tree['name']}.yaml"].write_text(text, encoding="utf-8")
    return found


@every_page
def test_every_command_line_parses(page: Path, tmp_path: Path) -> None:
    named = recipes_in(page, tmp_path)
    for text in blocks(page, "bash"):
        for words in prairie_lines(text):
            check_line(words, named)
    for span in spans(page):
        words = span.split()
        if words[0] == "prairie" and len(words) > 1 and not words[1].isupper():
            command, rest = find([word for word in words[1:] if word.islower() or word.startswith("-")])
            unknown = {word for word in rest if word.startswith("--")} - set(options(command)) - EVERYWHERE
            assert not unknown, f"`{span}`: no option {', '.join(unknown)}"


@every_page
def test_every_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    lines = [line for text in blocks(page, "bash") for line in text.splitlines()] + spans(page)
    asked = {line.split()[1] for line in lines if re.match(r"make [a-z]", line)}
    assert asked <= targets


def test_every_command_and_option_stands_on_its_page() -> None:
    page = sections(ROOT / "docs" / "commands.md")
    leaves: dict[str, Any] = {}
    for name in COMMANDS:
        command, _ = find([name])
        if hasattr(command, "list_commands"):
            assert f"prairie {name}" in page
            leaves |= {
                f"prairie {name} {below}": command.get_command(None, below) for below in command.list_commands(None)
            }
        else:
            leaves[f"prairie {name}"] = command
    groups = {f"prairie {name}" for name in COMMANDS}
    assert set(leaves) <= {title for title in page if title.startswith("prairie ")} <= set(leaves) | groups
    for title, command in leaves.items():
        wanted = {name: _default(p) for name, p in options(command).items() if name not in EVERYWHERE}
        written = {plain(row[0]): plain(row[1]) for row in table(page[title], "option")}
        assert written == wanted, f"docs/commands.md, {title}: wanted\n{_rows(wanted)}"
        assert {"--home", "--json"} <= set(options(command)), title


def _default(option: Any) -> str:
    if option.is_flag:
        return ""
    return "-" if option.default in (None, "") else str(option.default)


def _rows(wanted: dict[str, str]) -> str:
    return "\n".join(
        f"| `{name}` | {f'`{value}`' if value not in ('', '-') else value} | |" for name, value in wanted.items()
    )


@every_readme
def test_every_command_stands_in_the_readme(page: Path) -> None:
    rows = table(read(page), "command" if page == READMES[0] else "命令")
    named = {plain(row[0]).split()[1] for row in rows}
    assert named == set(COMMANDS)
    for row in rows:
        command, _ = find([plain(row[0]).split()[1]])
        if hasattr(command, "list_commands"):
            first = plain(row[0]).split()[2]
            assert {first, *re.findall(r"`([a-z]+)`", row[1])} == set(command.list_commands(None))


def test_both_readmes_say_the_same() -> None:
    one, other = READMES
    for language in ("bash", "python"):
        without = [
            [re.split(r"\s*# ", line)[0] for t in blocks(page, language) for line in t.splitlines()] for page in READMES
        ]
        changed = [pair for pair in zip(*without, strict=True) if pair[0] != pair[1] and "generate" not in pair[0]]
        assert not changed
    assert [link for link in links(one) if "README" not in link] == [
        link for link in links(other) if "README" not in link
    ]
    assert len(sections(one)) == len(sections(other))


@every_readme
def test_the_table_of_the_demo_is_filled_in(page: Path) -> None:
    found = [
        re.search(r"<!-- demo table -->\n(.*?)<!-- /demo table -->", read(readme), re.DOTALL) for readme in READMES
    ]
    assert all(found), "each README has a block between <!-- demo table --> and <!-- /demo table -->"
    tables = {
        readme: re.findall(r"[0-9][0-9.]*%?", match[1]) for readme, match in zip(READMES, found, strict=True) if match
    }
    assert len(tables[page]) > 10, "put the table of a measured run between the marks"
    assert tables[READMES[0]] == tables[READMES[1]], "the two tables differ"


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", MODELS)
def test_every_key_of_a_recipe_is_documented_with_its_default(title: str) -> None:
    fields = {name: field for name, field in MODELS[title].model_fields.items() if name != "kind"}
    if title == "train":
        fields = {name: field for name, field in fields.items() if name not in Learning.model_fields}
    wanted = {name: _written(field) for name, field in fields.items()}
    rows = table(sections(ROOT / "docs" / "recipes.md")[title], "key")
    assert {plain(row[0]): plain(row[1]) for row in rows} == wanted, (
        f"docs/recipes.md, {title}: wanted\n{_rows(wanted)}"
    )
    assert all(row[2] for row in rows if plain(row[0]) not in ("rank",)), f"{title}: a key without a meaning"


def _written(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "-"
    return "" if value == "" or isinstance(value, BaseModel) else str(value)


@every_page
def test_recipes_on_a_page_are_recipes(page: Path) -> None:
    for text in blocks(page, "yaml"):
        tree = yaml.safe_load(text)
        if isinstance(tree, dict) and "stages" in tree:
            empty = [f"{name}=x" for name, value in (tree.get("params") or {}).items() if value is None]
            resolve_recipe(tree, empty, page.name).order()


@every_recipe
def test_every_recipe_loads_and_says_how_it_is_run(recipe: Path) -> None:
    params = yaml.safe_load(read(recipe)).get("params") or {}
    load_recipe(recipe, [f"{name}=x" for name, value in params.items() if value is None]).order()
    comment = top_comment(recipe)
    for word in ("run:", "needs:", "expect:"):
        assert f"# {word}" in comment, f"{recipe.name}: its first lines want `# {word}`"
    assert re.search(r"minute|second|hour|time", comment), f"{recipe.name}: its first lines say how long it takes"
    lines = list(recipe_lines(recipe))
    assert any(words[:2] == ["run", f"recipes/{recipe.name}"] for words in lines)
    for words in lines:
        check_line(words, {})
    for path in re.findall(r"\b(?:docs/)?[\w.-]+\.md\b", comment):
        assert (ROOT / path).is_file(), f"{recipe.name} names {path}"
    assert f"recipes/{recipe.name}" in read(ROOT / "docs" / "recipes.md")


@every_page
def test_every_recipe_that_is_named_exists(page: Path) -> None:
    for path in set(re.findall(r"\brecipes/[\w-]+\.yaml", read(page))):
        assert (ROOT / path).is_file(), path


# --- HTTP and errors --------------------------------------------------------------------------------------------------


def test_every_route_and_kind_of_feedback_is_documented() -> None:
    page = sections(ROOT / "docs" / "commands.md")["prairie serve"]
    source = "".join(read(path) for path in sorted((ROOT / "prairie" / "serve").glob("*.py")))
    routes = {
        f"{method.upper()} {path}"
        for method, path, rest in re.findall(r'@app\.(get|post|put|delete)\("([^"]+)"(.*)\)', source)
        if "include_in_schema=False" not in rest
    }
    assert {plain(row[0]) for row in table(page, "route")} == routes
    schema = read(ROOT / "prairie" / "serve" / "schema.py")
    kinds = re.search(r"class FeedbackRequest.*?kind: Literal\[(.*?)\]", schema, re.DOTALL)
    assert kinds and [plain(row[0]) for row in table(page, "kind of feedback")] == re.findall(r'"(\w+)"', kinds[1])


def test_every_error_is_documented() -> None:
    tree = {
        name: (str(kind.http_status), kind.code)
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, errors.PrairieError)
    }
    rows = table(read(ROOT / "docs" / "errors.md"), "class")
    assert {plain(row[0]): (plain(row[1]), plain(row[2])) for row in rows} == tree


def test_the_example_of_an_error_is_what_is_said() -> None:
    tree = {"name": "tiny", "stages": {"sft": {"kind": "train", "start": "a", "data": "b", "epoch": 1}}}
    with pytest.raises(errors.RecipeError) as caught:
        resolve_recipe(tree, [], "tiny.yaml")
    first, last = re.search(r"error: (tiny\.yaml.*?)\.\.\.(.*)", read(ROOT / "docs" / "errors.md")).groups()
    assert str(caught.value).startswith(first.strip()) and str(caught.value).endswith(last.strip())


# --- names and links --------------------------------------------------------------------------------------------------


def test_the_floors_on_the_page_are_the_floors_of_the_test() -> None:
    spec = importlib.util.spec_from_file_location("floors", ROOT / "tests" / "test_floors.py")
    assert spec is not None and spec.loader is not None
    floors = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(floors)
    rows = table(read(ROOT / "docs" / "concepts.md"), "room")
    written = {plain(row[0]): set(plain(row[2]).split()) - {"nothing"} for row in rows}
    assert written == {room: set(may.split()) for room, may in floors.MAY.items() if not room.startswith("__")}


@pytest.mark.parametrize("title", ["One request", "One turn", "Never silently wrong"])
def test_the_walks_name_what_is_there(title: str) -> None:
    text = sections(ROOT / "docs" / "concepts.md")[title]
    rows = table(text, "claim" if title.startswith("Never") else "step")
    assert len(rows) >= 10
    for row in rows:
        files = re.findall(r"`((?:prairie|tests)/[\w/]+\.py)`", " ".join(row))
        names = [name for cell in row[1:] for name in re.findall(r"`([\w.]+)`", cell) if not name.endswith(".py")]
        assert files and names, f"{row} names no file or no function"
        sources = "\n".join(read(ROOT / file) for file in files)
        for part in {part for name in names for part in name.split(".")}:
            assert re.search(rf"\b(?:def|class) {part}\b", sources), f"{part} is not in {', '.join(files)}"


@every_page
def test_every_file_that_is_named_exists(page: Path) -> None:
    for path in set(
        re.findall(r"(?<![\w/.])(?:prairie|tests|docs|recipes|benchmarks)/[\w/.-]+\.(?:py|md|yaml)\b", read(page))
    ):
        assert (ROOT / path).is_file(), f"{page.name} names {path}"


def links(page: Path) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


@every_page
def test_links_and_images_lead_somewhere(page: Path) -> None:
    missing = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_file() or (anchor and anchor not in {_anchor(title) for title in sections(target)}):
            missing.append(link)
    assert not missing, f"{page.name}: {', '.join(missing)}"


def _anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@every_page
def test_no_path_of_one_machine(page: Path) -> None:
    assert not re.search(r"(?<![\w.~])/(?:work|root|home|tmp|mnt|data)/", read(page))


@every_page
def test_python_blocks_are_python_and_run_where_they_say_so(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in blocks(page, "python"):
        ast.parse(text)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for text in blocks(page, "python", mark="<!-- run -->\n"):
        exec(compile(text, str(page), "exec"), names)
