"""Which model has which name: lines of numbered versions, one champion a line, and how it came to be that.

A line is `spark`, or `spark:poet` for a vertical (an adapter that stands on a base). A version is an artifact under a
number. `promote` and `rollback` are one transaction each and append to the history; nothing else changes the champion.
Beside the champion one version of a line may be on trial (`try_out`): its answers are computed and not shown (shadow),
or a share of the users gets them (canary), until it is promoted or the trial ends. `generation()` grows with each
change, so that servers watch one number. Not here: whether a candidate deserves it, which users a share is (`serve`).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, func, select, update

from prairie.errors import ConflictError, NotFoundError, RequestError
from prairie.store.home import Home
from prairie.store.schema import LINES, REGISTRY_EVENTS, TRIALS, TURNS, VERSIONS

LINE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}(:[a-z0-9][a-z0-9._-]{0,99})?")


@dataclass(frozen=True)
class Version:
    """An artifact under a line's number."""

    line: str
    number: int
    artifact_id: str
    base_artifact_id: str | None
    """The model that an adapter stands on."""
    kind: str
    weights_hash: str | None
    figures: dict[str, Any]
    lineage: dict[str, Any]
    created: float
    """UNIX seconds."""

    @property
    def name(self) -> str:
        """As a user writes it: spark@3."""
        return f"{self.line}@{self.number}"

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class RegistryEvent:
    """One change of a champion, or the beginning or end of a trial."""

    id: int
    line: str
    action: str
    """promote or rollback; shadow or canary, and end, of a trial"""
    number: int
    """The champion afterwards; of a trial the version that is tried out."""
    previous: int | None
    who: str | None
    why: str | None
    verdict: dict[str, Any] | None
    created: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Trial:
    """A version that is tried out beside its line's champion."""

    version: Version
    share: float | None
    """Of the users who get its answers; None: a shadow, nobody does."""
    event: int
    """Id of the registry event that began it, by which this trial is told from another of the same version."""
    created: float
    """UNIX seconds."""

    @property
    def kind(self) -> str:
        return "shadow" if self.share is None else "canary"

    def to_json(self) -> dict[str, Any]:
        return {"version": self.version.name, "kind": self.kind, "share": self.share, "created": self.created}


@dataclass(frozen=True)
class Turn:
    """What one turn of a line's wheel came to; the artifact ids of champion, candidate and dataset."""

    line: str
    number: int
    champion: str | None
    candidate: str | None
    dataset: str | None
    verdict: dict[str, Any]
    promoted: bool
    key: str | None
    """Of the work that turned."""
    created: float

    @property
    def decided(self) -> bool:
        """Whether the votes were enough to say which of the two is better."""
        return self.promoted or (self.verdict.get("test") or {}).get("decision") != "undecided"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Registry:
    """The registry of a home. Threads and processes may share it."""

    def __init__(self, home: Home | Path | str | None = None) -> None:
        self.home = home if isinstance(home, Home) else Home(home)

    def register(
        self,
        line: str,
        artifact_id: str,
        *,
        kind: str,
        base: str | None = None,
        lineage: Mapping[str, Any] | None = None,
        figures: Mapping[str, Any] | None = None,
        weights_hash: str | None = None,
    ) -> Version:
        """Gives an artifact the line's next number; an artifact that has one already keeps it.

        `base` is the artifact id of the model that an adapter stands on. Raises NotFoundError when an artifact is
        missing, RequestError for a line's name, ConflictError when the same artifact stood on another base.
        """
        if not LINE_NAME.fullmatch(line):
            raise RequestError(
                "a line cannot have this name", got=repr(line),
                wanted="small letters, digits, . _ -, and one colon before a vertical, as spark or spark:poet",
            )  # fmt: skip
        artifact = self.home.artifacts.get(artifact_id)
        if base is not None:
            base = self.home.artifacts.get(base).id
        row = {
            "line": line,
            "artifact_id": artifact.id,
            "base_artifact_id": base,
            "kind": kind,
            "weights_hash": weights_hash or _weights_hash(artifact.path),
            "figures": dict(figures or {}),
            "lineage": dict(lineage or {}),
            "created": time.time(),
        }

        def run(connection: Connection) -> Version:
            if connection.execute(select(LINES.c.name).where(LINES.c.name == line).with_for_update()).first() is None:
                connection.execute(LINES.insert().values(name=line, champion=None, created=row["created"]))
            of_line = select(VERSIONS).where(VERSIONS.c.line == line)
            known = connection.execute(of_line.where(VERSIONS.c.artifact_id == artifact.id)).mappings().first()
            if known is not None:
                if known["base_artifact_id"] != base:
                    raise ConflictError(
                        f"artifact {artifact.id} is {line}@{known['number']} already, on another base",
                        got=base, wanted=known["base_artifact_id"],
                    )  # fmt: skip
                return _version(known)
            last = connection.execute(select(func.max(VERSIONS.c.number)).where(VERSIONS.c.line == line)).scalar() or 0
            connection.execute(VERSIONS.insert().values(number=last + 1, **row))
            return _version(_one(connection, line, last + 1))

        return self.home.database.write(run)

    def promote(
        self,
        version: Version | str,
        verdict: Mapping[str, Any] | None = None,
        *,
        who: str | None = None,
        why: str | None = None,
    ) -> Version:
        """Makes a version its line's champion, which ends a trial of the line. Promoting the champion again changes
        nothing and is not recorded."""
        chosen = self.resolve(version) if isinstance(version, str) else version

        def run(connection: Connection) -> Version:
            row = _one(connection, chosen.line, chosen.number)
            previous = _champion_number(connection, chosen.line, to_change=True)
            if previous != chosen.number:
                _set_champion(connection, chosen.line, "promote", chosen.number, previous, who, why, verdict)
            return _version(row)

        return self.home.database.write(run)

    def rollback(
        self, line: str, *, who: str | None = None, why: str | None = None, only: int | None = None
    ) -> Version:
        """Undoes the last change: ends a trial, if there is one, else makes the champion before the present one
        champion again; twice goes two back. Returns the champion. NotFoundError if there is nothing to undo.

        `only`: nothing but that champion is rolled back, ConflictError if it is champion no more.
        """

        def run(connection: Connection) -> Version:
            present = _champion_number(connection, line, to_change=True)
            if present is None:
                raise NotFoundError(f"line {line} has no champion to roll back")
            if only is None and _end_trial(connection, line, present, who, why):
                return _version(_one(connection, line, present))
            if only not in (None, present):
                raise ConflictError(f"{line}@{only} is champion no more", got=f"{line}@{present}")
            throne = _succession(connection, line)
            if len(throne) < 2:
                raise NotFoundError(
                    f"line {line} has no champion before {line}@{present}",
                    mend=f"choose a version with `prairie models promote {line}@NUMBER`",
                )
            _set_champion(connection, line, "rollback", throne[-2], present, who, why, None)
            return _version(_one(connection, line, throne[-2]))

        return self.home.database.write(run)

    def try_out(
        self,
        version: Version | str,
        share: float | None = None,
        *,
        who: str | None = None,
        why: str | None = None,
    ) -> Trial:
        """Puts a version on trial beside its line's champion, in place of another that was: as a canary for a `share`
        of the users, without one as a shadow. The same again changes nothing.

        Raises RequestError for a share that is none or for the champion itself, NotFoundError without a champion.
        """
        chosen = self.resolve(version) if isinstance(version, str) else version
        if share is not None and not 0 < share < 1:
            raise RequestError("a canary's share of the users is impossible", got=share, wanted="above 0%, below 100%")

        def run(connection: Connection) -> Trial:
            line, present = chosen.line, _champion_number(connection, chosen.line, to_change=True)
            if present is None:
                raise NotFoundError(f"line {line} has no champion beside which {chosen.name} could be tried out")
            if present == chosen.number:
                raise RequestError(f"{chosen.name} is the champion already, there is nothing to try out")
            running = _trial(connection, line)
            if running is None or (running.version.number, running.share) != (chosen.number, share):
                _end_trial(connection, line, present, who, f"{chosen.name} is tried out instead")
                action = "shadow" if share is None else "canary"
                event = _record(connection, line, action, chosen.number, present, who, why, None)
                row = {"line": line, "number": chosen.number, "share": share, "event": event, "created": time.time()}
                connection.execute(TRIALS.insert().values(row))
            found = _trial(connection, line)
            assert found is not None
            return found

        return self.home.database.write(run)

    def end_trial(self, trial: Trial, *, who: str | None = None, why: str | None = None) -> bool:
        """Ends just this trial; False when it is over already."""

        def run(connection: Connection) -> bool:
            line, present = trial.version.line, _champion_number(connection, trial.version.line, to_change=True)
            return _end_trial(connection, line, present, who, why, event=trial.event)

        return self.home.database.write(run)

    def trial(self, line: str) -> Trial | None:
        """The version that is tried out beside the line's champion, None when none is."""
        with self.home.database.read() as connection:
            return _trial(connection, line)

    def champion(self, line: str) -> Version | None:
        """The version served under the line's name, None when none was promoted. NotFoundError: no such line."""
        with self.home.database.read() as connection:
            number = _champion_number(connection, line)
            return None if number is None else _version(_one(connection, line, number))

    def resolve(self, name: str) -> Version:
        """`spark` (its champion), `spark@3`, `spark@<start of an artifact id>`, `spark@newest`; `spark:poet` likewise.

        Raises NotFoundError, which lists what there is.
        """
        line, at, which = name.partition("@")
        if not at:
            champion = self.champion(line)
            if champion is None:
                raise NotFoundError(
                    f"line {line} has no champion", mend=f"promote a version: `prairie models promote {line}@1`"
                )
            return champion
        versions = self.versions(line)
        if which == "newest" and versions:
            return versions[-1]
        numbered = [v for v in versions if which.isdecimal() and v.number == int(which)]
        begun = [v for v in versions if len(which) >= 4 and v.artifact_id.startswith(which)]
        matching = numbered or begun
        if len(matching) != 1:
            raise NotFoundError(
                f"`{name}` names {'no version' if not matching else 'several versions'}",
                wanted="one of " + ", ".join(f"{v.name} ({v.artifact_id})" for v in (matching or versions[-8:])),
            )
        return matching[0]

    def lines(self) -> list[str]:
        """Names of all lines, sorted."""
        with self.home.database.read() as connection:
            return list(connection.execute(select(LINES.c.name).order_by(LINES.c.name)).scalars())

    def versions(self, line: str) -> list[Version]:
        """All versions of a line, oldest first. Raises NotFoundError."""
        with self.home.database.read() as connection:
            _champion_number(connection, line)
            query = select(VERSIONS).where(VERSIONS.c.line == line).order_by(VERSIONS.c.number)
            return [_version(row) for row in connection.execute(query).mappings()]

    def versions_of(self, artifact_id: str) -> list[Version]:
        """Every version, of whatever line, that is this artifact or an adapter on it."""
        with self.home.database.read() as connection:
            query = select(VERSIONS).where(
                (VERSIONS.c.artifact_id == artifact_id) | (VERSIONS.c.base_artifact_id == artifact_id)
            )
            rows = connection.execute(query.order_by(VERSIONS.c.line, VERSIONS.c.number)).mappings()
            return [_version(row) for row in rows]

    def history(self, line: str) -> list[RegistryEvent]:
        """Every promotion, rollback and trial of a line, oldest first. Raises NotFoundError."""
        with self.home.database.read() as connection:
            _champion_number(connection, line)
            query = select(REGISTRY_EVENTS).where(REGISTRY_EVENTS.c.line == line).order_by(REGISTRY_EVENTS.c.id)
            return [RegistryEvent(**row) for row in connection.execute(query).mappings()]

    def generation(self) -> int:
        """A number that grows whenever any line's champion or trial changes; one indexed read."""
        with self.home.database.read() as connection:
            return connection.execute(select(func.max(REGISTRY_EVENTS.c.id))).scalar() or 0

    def require_vertical(self, name: str) -> None:
        """Raises NotFoundError unless `name` is a vertical of a line."""
        known = [line for line in self.lines() if ":" in line]
        if name not in known:
            raise NotFoundError(
                "no such vertical", got=name, wanted=" | ".join(known) or "LINE:NAME of one that was published"
            )

    def waiting(self) -> dict[str, Version]:
        """Verticals whose line has a new base: vertical -> the base's champion, against which it is to be judged again.

        A vertical waits while its champion stands on another model than its base's champion does (an adapter counts as
        what it stands on), and no turn with a decided verdict had a candidate on that model. Until then it is served on
        the model that it was trained on.
        """
        found = {}
        for line in self.lines():
            base = line.partition(":")[0]
            if base == line or base not in self.lines():
                continue
            new, own = self.champion(base), self.champion(line)
            if new is None or own is None or own.base_artifact_id is None:
                continue
            model = new.base_artifact_id or new.artifact_id
            on_it = {version.artifact_id for version in self.versions(line) if version.base_artifact_id == model}
            if own.base_artifact_id != model and not any(t.decided and t.candidate in on_it for t in self.turns(line)):
                found[line] = new
        return found

    def lineage(self, version: Version | str) -> dict[str, Any]:
        """All that a version was made from, down to datasets and the feedback events in them.

        A tree of `{"id", "kind", "name", "created", "config", "code", "machine", "figures", "events", "inputs"}`. What
        was shown before is `{"id", "kind", "name", "repeated": True}`, what is gone is `{"id", "missing": True}`.
        `judged`: the turns in which this version was the candidate, with their verdicts; `history`: when it became or
        ceased to be champion.
        """
        chosen = self.resolve(version) if isinstance(version, str) else version
        shown: set[str] = set()
        tree = {**chosen.to_json(), "artifact": self._node(chosen.artifact_id, shown)}
        if chosen.base_artifact_id is not None:
            tree["base"] = self._node(chosen.base_artifact_id, shown)
        tree["judged"] = [turn.to_json() for turn in self.turns(chosen.line) if turn.candidate == chosen.artifact_id]
        history = self.history(chosen.line)
        tree["history"] = [event.to_json() for event in history if chosen.number in (event.number, event.previous)]
        return tree

    def record_turn(
        self,
        line: str,
        number: int,
        champion: str | None,
        candidate: str | None,
        dataset: str | None,
        verdict: Mapping[str, Any],
        promoted: bool,
        key: str | None = None,
    ) -> Turn:
        """Appends a turn and, when `promoted`, makes its candidate the champion: one transaction, both or neither.

        `key` names the work that turned, so that the work done again finds its turn (`turn_of`). The same again changes
        nothing, not even a champion that was rolled back since. Raises ConflictError when the number or the key holds
        another outcome, or when the candidate was judged against a version that is champion no more; NotFoundError when
        it is no version of the line.
        """
        row = {
            "line": line,
            "number": number,
            "champion": champion,
            "candidate": candidate,
            "dataset": dataset,
            "verdict": json.loads(json.dumps(dict(verdict))),
            "promoted": promoted,
            "key": key,
        }

        def run(connection: Connection) -> Turn:
            query = select(TURNS).where(TURNS.c.line == line)
            same = TURNS.c.number == number
            if key is not None:
                same |= TURNS.c.key == key
            known = connection.execute(query.where(same)).mappings().first()
            if known is None:
                if promoted:
                    _promote_after_turn(connection, row)
                connection.execute(TURNS.insert().values(created=time.time(), **row))
                known = connection.execute(query.where(TURNS.c.number == number)).mappings().one()
            elif {name: known[name] for name in row} != row:
                raise ConflictError(f"turn {known['number']} of line {line} is recorded already, with another outcome")
            return Turn(**known)

        return self.home.database.write(run)

    def turn_of(self, line: str, key: str) -> Turn | None:
        """The turn that was recorded under this key, None when there is none."""
        with self.home.database.read() as connection:
            query = select(TURNS).where(TURNS.c.line == line, TURNS.c.key == key)
            row = connection.execute(query).mappings().first()
            return None if row is None else Turn(**row)

    def turns(self, line: str) -> list[Turn]:
        """All turns of a line, oldest first."""
        with self.home.database.read() as connection:
            query = select(TURNS).where(TURNS.c.line == line).order_by(TURNS.c.number)
            return [Turn(**row) for row in connection.execute(query).mappings()]

    def _node(self, id: str, shown: set[str]) -> dict[str, Any]:
        artifact = self.home.artifacts.find(id)
        if artifact is None:
            return {"id": id, "missing": True}
        short = {"id": id, "kind": artifact.kind, "name": artifact.name}
        if id in shown:
            return {**short, "repeated": True}
        shown.add(id)
        return {
            **short,
            "created": artifact.created,
            "config": artifact.manifest["config"],
            "code": artifact.manifest["code"],
            "machine": artifact.manifest.get("machine"),
            "figures": artifact.figures,
            "events": artifact.events,
            "inputs": [self._node(below, shown) for below in artifact.inputs],
        }


def _version(row: RowMapping) -> Version:
    return Version(**row)


def _one(connection: Connection, line: str, number: int) -> RowMapping:
    query = select(VERSIONS).where(VERSIONS.c.line == line, VERSIONS.c.number == number)
    row = connection.execute(query).mappings().first()
    if row is None:
        raise NotFoundError(f"no version {line}@{number}")
    return row


def _champion_number(connection: Connection, line: str, to_change: bool = False) -> int | None:
    query = select(LINES.c.champion).where(LINES.c.name == line)
    row = connection.execute(query.with_for_update() if to_change else query).first()
    if row is None:
        names = list(connection.execute(select(LINES.c.name).order_by(LINES.c.name)).scalars())
        raise NotFoundError("no such model", got=f"`{line}`", wanted=", ".join(names) or "none is registered yet")
    return row.champion


def _trial(connection: Connection, line: str) -> Trial | None:
    row = connection.execute(select(TRIALS).where(TRIALS.c.line == line)).mappings().first()
    if row is None:
        return None
    return Trial(_version(_one(connection, line, row["number"])), row["share"], row["event"], row["created"])


def _end_trial(
    connection: Connection, line: str, champion: int | None, who: str | None, why: str | None, event: int | None = None
) -> bool:
    """Takes the trial's row away and says so in the history; False when there is none (or not this one)."""
    trial = _trial(connection, line)
    if trial is None or event not in (None, trial.event):
        return False
    connection.execute(delete(TRIALS).where(TRIALS.c.line == line))
    _record(connection, line, "end", trial.version.number, champion, who, why, None)
    return True


def _record(
    connection: Connection,
    line: str,
    action: str,
    number: int,
    previous: int | None,
    who: str | None,
    why: str | None,
    verdict: Mapping[str, Any] | None,
) -> int:
    """Appends to the history; returns the event's id."""
    row = {
        "line": line, "action": action, "number": number, "previous": previous, "who": who, "why": why,
        "verdict": dict(verdict) if verdict is not None else None, "created": time.time(),
    }  # fmt: skip
    added = connection.execute(REGISTRY_EVENTS.insert().values(row)).inserted_primary_key
    assert added is not None
    return int(added[0])


def _set_champion(
    connection: Connection,
    line: str,
    action: str,
    number: int,
    previous: int | None,
    who: str | None,
    why: str | None,
    verdict: Mapping[str, Any] | None,
) -> None:
    """The champion's row, the history's row and the end of a trial; all in the caller's transaction or none."""
    _end_trial(connection, line, previous, who, f"{line}@{number} became champion")
    connection.execute(update(LINES).where(LINES.c.name == line).values(champion=number))
    _record(connection, line, action, number, previous, who, why, verdict)


def _promote_after_turn(connection: Connection, turn: Mapping[str, Any]) -> None:
    """Makes the candidate of a turn champion, if the champion is still the one that it was judged against."""
    line, present = turn["line"], _champion_number(connection, turn["line"])
    if present is None or _one(connection, line, present)["artifact_id"] != turn["champion"]:
        raise ConflictError(
            f"the champion of {line} changed while turn {turn['number']} was under way",
            got="nobody" if present is None else f"{line}@{present}", wanted=f"artifact {turn['champion']}",
            mend="turn again",
        )  # fmt: skip
    query = select(VERSIONS.c.number).where(VERSIONS.c.line == line, VERSIONS.c.artifact_id == turn["candidate"])
    number = connection.execute(query).scalar()
    if number is None:
        raise NotFoundError(f"the candidate of turn {turn['number']} is no version of {line}", got=turn["candidate"])
    if number != present:
        why = f"turn {turn['number']}"
        _set_champion(connection, line, "promote", number, present, None, why, turn["verdict"])


def _succession(connection: Connection, line: str) -> list[int]:
    """The champions from the first to the present one, without those that were rolled back."""
    query = select(REGISTRY_EVENTS.c.action, REGISTRY_EVENTS.c.number).where(REGISTRY_EVENTS.c.line == line)
    throne: list[int] = []
    for action, number in connection.execute(query.order_by(REGISTRY_EVENTS.c.id)):
        if action == "promote":
            throne.append(number)
        elif action == "rollback":
            throne.pop()
    return throne


def _weights_hash(folder: Path) -> str | None:
    """The hash by which prairie.json names the model, if there is one; an adapter's covers what it stands on."""
    try:
        manifest = json.loads((folder / "prairie.json").read_text(encoding="utf-8"))
        stated = manifest.get("adapter_hash") or manifest.get("weights_hash")
    except (OSError, ValueError, AttributeError):
        return None
    return str(stated) if stated else None
