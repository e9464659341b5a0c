"""`prairie feedback`: what people said, counted, taken away, or forgotten."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prairie.cli.options import (
    GoldOption,
    HomeOption,
    JsonOption,
    NamesOption,
    emit,
    find_names,
    open_home,
    read_gold,
    say,
    short,
    table,
    when,
)
from prairie.errors import UsageError

if TYPE_CHECKING:
    from prairie.store.feedback import FeedbackEvent

app = typer.Typer(help="List, count, import, export, curate and forget what people said.", no_args_is_help=True)

LineOption = Annotated[str | None, typer.Option("--line", help="Only answers of this line.")]
PurposeOption = Annotated[str | None, typer.Option("--purpose", help="Only chat, or only gate.")]


@app.command("list")
def list_feedback(
    kind: Annotated[str | None, typer.Option("--kind", help="thumb, rating, choice, edit, comment, ...")] = None,
    user: Annotated[str | None, typer.Option("--user", help="Only of this user.")] = None,
    line: LineOption = None,
    purpose: PurposeOption = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many, the newest.")] = 50,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """The newest feedback, oldest of it first."""
    from prairie.store.feedback import KINDS

    if kind is not None and kind not in KINDS:
        raise UsageError("no such kind of feedback", got=kind, wanted=", ".join(KINDS))
    with open_home(home) as store:
        events = store.feedback.events([kind] if kind else None, [user] if user else None, None, purpose, line)
    shown = events[-limit:]

    def text() -> str:
        if not shown:
            return "No feedback yet."
        rows = [
            (
                e.id,
                when(e.created),
                e.kind,
                short(_value_text(e), 48),
                short(e.user or "-", 20),
                short(e.response_id, 40),
            )
            for e in shown
        ]
        more = f"\n({len(events) - len(shown)} older ones: --limit)" if len(events) > len(shown) else ""
        return table(("ID", "WHEN", "KIND", "VALUE", "USER", "RESPONSE"), rows) + more

    emit({"total": len(events), "events": [event.to_json() for event in shown]}, as_json, text)


@app.command()
def stats(
    line: LineOption = None, purpose: PurposeOption = None, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """How much was said, and how each model fares."""
    with open_home(home) as store:
        figures = store.feedback.stats(line=line, purpose=purpose)

    def text() -> str:
        def listing(counts: dict[str, int]) -> str:
            return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"

        lines = [
            f"said       {figures['events']} ({listing(figures['by_kind'])}) by {figures['users']} users",
            f"counts now {listing(figures['current'])}",
            f"thumbs     {listing(figures['thumbs'])}",
            f"answers    {listing(figures['responses'])}",
        ]
        header = ("LINE", "ARTIFACT", "UP", "DOWN", "RATINGS", "EDITS")
        rows = [
            (row["line"] or "-", row["version_id"] or "-", row["up"], row["down"], row["ratings"], row["edits"])
            for row in figures["by_model"]
        ]
        return "\n".join(lines) + ("\n\n" + table(header, rows) if rows else "")

    emit(figures, as_json, text)


@app.command()
def export(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="JSON lines; none = stdout.")] = None,
    line: LineOption = None,
    purpose: PurposeOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every piece of feedback with the answer that it speaks of, as JSON lines."""
    with open_home(home) as store:
        rows = store.feedback.export(line=line, purpose=purpose)
        if file is None and as_json:
            emit({"events": list(rows)}, True)
        elif file is None:
            for row in rows:
                print(json.dumps(row, ensure_ascii=False))
        else:
            count = _write_lines(file, rows)
            emit({"file": str(file), "events": count}, as_json, f"{count} events are in {file}.")


@app.command("import")
def import_log(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A log of JSON lines, perhaps .gz.")],
    line: Annotated[str, typer.Option("--line", help="The line that shall learn from it.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take over answers and feedback that another system logged."""
    from prairie.store.logs import read_log

    log = read_log(file, line)
    with open_home(home, make=True) as store:
        counts = store.feedback.take_over(log.talks)
    refused = [{"row": row, "why": why} for row, why in log.refused]
    facts = {"file": str(file), "line": line, **counts, "skipped": dict(log.skipped), "refused": refused}

    def text() -> str:
        lines = [
            f"{counts['responses']} answers and {counts['events']} pieces of feedback are new in {line}"
            f" ({counts['known_responses']} and {counts['known_events']} were here already).",
            *(f"left out: {count} x {why}" for why, count in log.skipped.items()),
            *(f"refused: row {row}: {why}" for row, why in log.refused[:10]),
        ]
        more = len(log.refused) - 10
        return "\n".join([*lines, f"refused: {more} more rows (--json lists them)"] if more > 0 else lines)

    emit(facts, as_json, text)


@app.command()
def curate(
    line: Annotated[str, typer.Argument(metavar="LINE", help="The line that was spoken of.")],
    split: Annotated[str, typer.Option("--split", help="Hold out by user or by time.")] = "user",
    share: Annotated[float, typer.Option("--share", min=0.0, max=0.9, help="How much is held out.")] = 0.25,
    gold: GoldOption = None,
    names: NamesOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a dataset of all that was said of a line: pairs, labelled answers, edits, comments."""
    from prairie.flywheel.datasets import feedback_dataset

    if split not in ("user", "time"):
        raise UsageError("no such way to hold out", got=split, wanted="user or time")
    with open_home(home) as store:
        way: Literal["user", "time"] = "time" if split == "time" else "user"
        artifact = feedback_dataset(store, line, split=way, share=share, gold=read_gold(gold), names=find_names(names))
    facts = {"id": artifact.id, "path": str(artifact.path), "events": len(artifact.events), **artifact.figures}

    def text() -> str:
        lines = [f"dataset {artifact.id} holds {len(artifact.events)} events: {artifact.path}"]
        for part in ("train", "held_out"):
            figures = artifact.figures[part]
            counts = ", ".join(f"{figures[kind]} {kind}" for kind in ("pairs", "weak", "labelled", "edits", "comments"))
            lines.append(f"{part:<9} {counts}")
            for about in ("dropped", "masked"):
                found = ", ".join(f"{count} {why}" for why, count in figures[about].items())
                lines += [f"{'':<9} {about}: {found}"] if found else []
        return "\n".join(lines)

    emit(facts, as_json, text)


@app.command()
def forget(
    user: Annotated[str, typer.Argument(metavar="USER", help="As it stands in `prairie feedback list`.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete all that a user said and was answered, and name what has learned from it."""
    with open_home(home) as store:
        if not yes:
            if not sys.stdin.isatty():
                raise UsageError("forgetting cannot be undone", wanted="--yes when nobody can be asked")
            typer.confirm(f"Delete all that {user} said and was answered? This cannot be undone.", abort=True, err=True)
        report = store.feedback.forget(user)
        postgres = store.url is not None

    def text() -> str:
        lines = [f"Forgotten: {report['events']} events, {report['responses']} answers of {user}."]
        for dataset in report["datasets"]:
            lines.append(f"dataset {dataset['name']} ({dataset['id']}) holds {dataset['events']} of those events")
        for model in report["models"]:
            names = ", ".join(model["versions"]) or "not registered"
            lines.append(f"model {model['name']} ({model['id']}; {names}) has learned from them")
        if report["champions"]:
            lines.append(f"still served: {', '.join(report['champions'])}; the next turn learns without them")
        if report["queued"]:
            lines.append(f"waiting to be made again without them: {', '.join(report['queued'])} (prairie rebuild)")
        return "\n".join(lines)

    emit(report, as_json, text)
    if not report["erased_from_log"]:
        say(
            "On Postgres the deleted text leaves the files at the next VACUUM."
            if postgres
            else "A running server still reads the database: the deleted text leaves its log at the next checkpoint."
        )


def _value_text(event: FeedbackEvent) -> str:
    if event.thumb:
        return event.thumb + (f" ({', '.join(event.reasons)})" if event.reasons else "")
    return event.text if event.text is not None else json.dumps(event.value, ensure_ascii=False)


def _write_lines(file: Path, rows: Any) -> int:
    """Writes JSON lines beside `file` and then renames, so that a half-written export never has its name."""
    from prairie.store.disk import disk_errors, sync_file

    part = file.with_name(file.name + f".{os.getpid()}.part")
    count = 0
    with disk_errors(f"{file} cannot be written"):
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("w", encoding="utf-8") as out:
                for row in rows:
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
                    count += 1
            sync_file(part)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    return count
