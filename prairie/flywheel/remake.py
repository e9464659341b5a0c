"""A model made again from what its lineage says: to see that it comes out the same, or without what was taken back.

`reproduce` does one artifact's work again, from its own inputs, into a folder that is thrown away, and compares every
file. `rebuild` makes a version of a line again without the events that people had forgotten: the datasets that hold one
lose those rows, and every candidate that stands on such a dataset learns again, the oldest first. `Rebase` makes the
champion of a vertical again on its base's new champion: the same data and keys, the first adapter first.
Not here: whether the rebuilt model is as good (`gate`), making it champion (`prairie.store.registry`).
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prairie.data.records import Chat, Text
from prairie.data.sources import write_records
from prairie.errors import RequestError
from prairie.flywheel.chat import LEARNING_CODE, LEAST_ROWS, learn_candidate, make_candidate
from prairie.flywheel.replay import events_of, sealed
from prairie.pipeline.context import Context, Made, Work, code_revision
from prairie.pipeline.data_stages import train_records
from prairie.pipeline.handlers import HANDLERS
from prairie.pipeline.publishing import register
from prairie.recipe import KINDS, VoteLearning, resolve_recipe
from prairie.runtime import Runtime
from prairie.store.artifacts import Artifact
from prairie.store.home import Home
from prairie.store.registry import Registry, Version

LOGS = ("metrics.jsonl", "curves.html")
"""Files that tell how long something took, and so are never the same twice."""
NOT_OF_THE_STAGE = ("seed", "reads", "outside")


@dataclass(frozen=True)
class Reproduced:
    """What came of making an artifact again."""

    artifact: Artifact
    files: Mapping[str, bool]
    """File -> the same bytes? Without logs."""
    same_code: bool
    """Whether the rooms that made it are as they were."""
    seconds: float

    @property
    def same(self) -> bool:
        return all(self.files.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "artifact": self.artifact.id,
            "kind": self.artifact.kind,
            "same": self.same,
            "files": dict(self.files),
            "same_code": self.same_code,
            "machine_then": self.artifact.manifest.get("machine"),
            "seconds": round(self.seconds, 2),
        }


def reproduce(home: Home, artifact: Artifact, runtime: Runtime) -> Reproduced:
    """Makes an artifact again and compares. Its inputs and itself are verified first (StoreError). Raises RequestError
    for a kind that is not made from its inputs alone, or when what it read outside the home has changed."""
    store = home.artifacts
    for id in (artifact.id, *artifact.inputs):
        store.verify(id)
    make, code = _maker(home, artifact, runtime)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=home.root / "tmp", prefix="again-") as place:
        folder, scratch = Path(place) / "product", Path(place) / "scratch"
        folder.mkdir()
        scratch.mkdir()
        make(folder, scratch)
        known = {name: facts["sha256"] for name, facts in artifact.manifest["files"].items() if name not in LOGS}
        found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        files = {name: name in found and _sha256(found[name]) == hash for name, hash in known.items()}
        files |= {name: False for name in found if name not in known and name not in LOGS}
    return Reproduced(artifact, files, code == artifact.manifest["code"], time.perf_counter() - began)


def rebuild(home: Home, version: Version, runtime: Runtime) -> Version:
    """A new version of the same line that never learned from what was forgotten; nobody's champion yet. Raises
    RequestError when nothing forgotten is in it, or when a stage of a recipe has learned from it."""
    forgotten = set(home.feedback.forgotten())
    old = home.artifacts.get(version.artifact_id)
    new = _without(home, old, forgotten, runtime)
    if new.id == old.id:
        raise RequestError(f"{version.name} has learned from nothing that was forgotten")
    return register(Registry(home), version.line, new, _context(home, runtime, _seed(old)))


def _without(home: Home, artifact: Artifact, forgotten: set[str], runtime: Runtime) -> Artifact:
    """The artifact, or the one that takes its place."""
    if not _holds(home, artifact, forgotten):
        return artifact
    if artifact.kind == "votes":
        return _fewer_votes(home, artifact, forgotten)
    if artifact.kind == "replay":
        return _fewer_earlier(home, artifact, forgotten, runtime)
    if artifact.kind != "candidate":
        raise RequestError(
            f"{artifact.kind} `{artifact.name}` has learned from what was forgotten", got=artifact.id,
            wanted="a candidate of a turn", mend="run its recipe again",
        )  # fmt: skip
    parent, records, earlier = _learned(artifact, lambda id: _without(home, home.artifacts.get(id), forgotten, runtime))
    if records.figures["rows"] < LEAST_ROWS:
        return parent  # what is left teaches too little: as if this turn had not been
    if earlier is not None and not earlier.figures["rows"]:
        earlier = None
    context = _context(home, runtime, _seed(artifact))
    return make_candidate(context, _learning(artifact), parent, records, artifact.name, earlier)


@dataclass
class Rebase:
    """The roles of actor and learner in a turn that judges a vertical anew, because its line has a new base: nothing is
    collected, and the candidate is the champion trained again on the new base (`prairie.flywheel.loop`)."""

    context: Context
    model: str
    """Artifact id of the new base."""

    def act(self, champion: Version) -> Artifact:
        """What the champion learned from last. Raises RequestError for one that was not trained here."""
        store = self.context.home.artifacts
        artifact = store.get(champion.artifact_id)
        below = [id for id in artifact.inputs if not store.get(id).is_model]
        if artifact.kind not in ("candidate", "train") or not below:
            raise RequestError(
                f"{champion.name} cannot be trained again on a new base", got=f"a {artifact.kind}",
                wanted="an adapter that a stage or a turn trained here", mend="train it by a recipe and publish it",
            )  # fmt: skip
        return store.get(artifact.inputs[1] if artifact.kind == "candidate" else below[-1])

    def learn(self, champion: Version, records: Artifact) -> Version:
        """A version of the vertical on the new base; nobody's champion yet."""
        home = self.context.home
        assert champion.base_artifact_id is not None
        new = self._again(home.artifacts.get(champion.artifact_id), champion.base_artifact_id)
        return register(Registry(home), champion.line, new, self.context)

    def _again(self, artifact: Artifact, old: str) -> Artifact:
        home, store = self.context.home, self.context.home.artifacts
        if artifact.id == old:
            return store.get(self.model)
        if artifact.kind == "candidate":
            parent, records, earlier = _learned(artifact, store.get)
            context = _context(home, self.context.runtime, _seed(artifact))
            return make_candidate(
                context, _learning(artifact), self._again(parent, old), records, artifact.name, earlier
            )
        keys, handler = artifact.manifest["config"], HANDLERS[artifact.kind]
        reads = {name: self.model if id == old else id for name, id in keys["reads"].items()}
        inputs, code = [self.model if id == old else id for id in artifact.inputs], code_revision(handler.rooms)
        keys = {**keys, "reads": reads}
        id = store.id_of(artifact.kind, keys, inputs, code)
        if store.find(id) is None:
            context = _context(home, self.context.runtime, _seed(artifact))
            made = {name: _made(home, name, read) for name, read in reads.items()}
            config: Any = KINDS[artifact.kind].model_validate(_of_the_stage(keys))
            figures: dict[str, Any] = {}
            with (
                home.working(id) as scratch,
                store.create(artifact.kind, artifact.name, keys, inputs, code, figures=figures) as folder,
            ):
                figures.update(handler.make(Work(context, artifact.name, config, made, folder, scratch, id)))
        return store.get(id)


def _holds(home: Home, artifact: Artifact, forgotten: set[str]) -> bool:
    return bool(forgotten & set(artifact.events)) or any(
        _holds(home, home.artifacts.get(id), forgotten) for id in artifact.inputs
    )


def _fewer_votes(home: Home, artifact: Artifact, forgotten: set[str]) -> Artifact:
    """The same dataset without the rows that stand on a forgotten event."""
    rows = [row for row in train_records(artifact.path) if not isinstance(row, Text)]
    kept = [row for row in rows if not forgotten & set(row.tags["events"])]
    events = list(dict.fromkeys(event for row in kept for event in row.tags["events"]))
    config = {**artifact.manifest["config"], "events": events, "without_forgotten": True}
    figures = {**artifact.figures, "rows": len(kept), "users": len({row.tags["user"] for row in kept})}
    store, code = home.artifacts, artifact.manifest["code"]
    id = store.id_of("votes", config, [], code)
    if store.find(id) is None:
        with store.create("votes", artifact.name, config, [], code, figures=figures, events=events) as folder:
            write_records(folder / "train.jsonl", kept)
    return store.get(id)


def _fewer_earlier(home: Home, artifact: Artifact, forgotten: set[str], runtime: Runtime) -> Artifact:
    """The same earlier rows but for those that stand on a forgotten event, from datasets without it."""
    rows = [row for row in train_records(artifact.path) if isinstance(row, Chat)]
    kept = [row for row in rows if not forgotten & set(row.tags.get("events", ()))]
    inputs = [_without(home, home.artifacts.get(id), forgotten, runtime).id for id in artifact.inputs]
    config = {**artifact.manifest["config"], "events": events_of(kept), "without_forgotten": True}
    return sealed(home, artifact.name, config, inputs, artifact.manifest["code"], kept)


def _learned(artifact: Artifact, get: Callable[[str], Artifact]) -> tuple[Artifact, Artifact, Artifact | None]:
    """What a candidate was made from: its parent, the votes, and what it went over again, if anything."""
    parent, records, *earlier = map(get, artifact.inputs)
    return parent, records, earlier[0] if earlier else None


Make = Callable[[Path, Path], object]


def _maker(home: Home, artifact: Artifact, runtime: Runtime) -> tuple[Make, str]:
    """(what fills a product's folder, given a scratch folder; the revision of the code that does it now)."""
    context = _context(home, runtime, _seed(artifact))
    if artifact.kind == "candidate":
        parent, records, earlier = _learned(artifact, home.artifacts.get)
        config, title = _learning(artifact), artifact.name

        def learn_again(folder: Path, scratch: Path) -> object:
            return learn_candidate(context, config, parent, records, folder, scratch, title, earlier)

        return learn_again, code_revision(LEARNING_CODE)
    handler = HANDLERS.get(artifact.kind)
    if handler is None or handler.always:
        raise RequestError(
            f"a {artifact.kind} cannot be made again from its inputs", got=artifact.id,
            wanted="candidate | " + " | ".join(kind for kind, one in HANDLERS.items() if not one.always),
        )  # fmt: skip
    keys = artifact.manifest["config"]
    stage: Any = KINDS[artifact.kind].model_validate(_of_the_stage(keys))
    if handler.outside(stage) != keys["outside"]:
        raise RequestError(
            f"what {artifact.kind} `{artifact.name}` read from outside the home has changed since", got=artifact.id
        )
    inputs = {name: _made(home, name, id) for name, id in keys["reads"].items()}

    def make_again(folder: Path, scratch: Path) -> object:
        return handler.make(Work(context, artifact.name, stage, inputs, folder, scratch, artifact.id))

    return make_again, code_revision(handler.rooms)


def _of_the_stage(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a recipe gave a stage, of all that its artifact is named by."""
    return {key: value for key, value in keys.items() if key not in NOT_OF_THE_STAGE}


def _made(home: Home, name: str, id: str) -> Made:
    artifact = home.artifacts.get(id)
    return Made(name, artifact.kind, artifact.figures, artifact)


def _learning(artifact: Artifact) -> VoteLearning:
    return VoteLearning.model_validate({k: v for k, v in artifact.manifest["config"].items() if k != "seed"})


def _seed(artifact: Artifact) -> int:
    return int(artifact.manifest["config"].get("seed", 0))


def _context(home: Home, runtime: Runtime, seed: int) -> Context:
    recipe = resolve_recipe({"name": "again", "seed": seed, "stages": {"model": {"kind": "import", "path": "-"}}})
    return Context(recipe, home, replace(runtime, seed=seed))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
