"""Which versions are in memory, under which names, and for how long.

A base model is loaded once (an engine); every version that is an adapter on it adds only its adapter. A name ("spark",
"spark:poet") points at its line's champion; a refresh moves all pointers at once, and a request keeps the version it
was given at its start until its end. A version leaves memory when no name points at it and nobody uses it; one that was
asked for by number or id ("spark@3") may stay for a while, so that a candidate that is judged is read once. A version
on trial is in memory as its champion is: it answers a share of the users (a canary), always the same ones, or everybody
and is not shown (a shadow).
Not here: when to look for new champions (`reload`), computing (`worker`).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prairie.errors import AdapterError, ModelError, NotFoundError, RequestError
from prairie.runtime import give_back
from prairie.serve.memory import check_fits
from prairie.serve.metrics import Metrics

if TYPE_CHECKING:
    from prairie.data.chat_template import ChatTemplate
    from prairie.data.tokenizer import Tokenizer
    from prairie.engine.engine import Engine
    from prairie.engine.language_model import LanguageModel
    from prairie.engine.reader import Reader
    from prairie.runtime import Runtime
    from prairie.serve.worker import Worker
    from prairie.store.home import Home
    from prairie.store.registry import Trial, Version

log = logging.getLogger("prairie.serve")

SPARE_VERSIONS = 2
"""Versions asked for by number or id that stay in memory although nobody uses them."""
SPARE_S = 600.0
MAX_ADAPTERS = 16
"""Adapters loaded at run time that stay in memory although nobody uses them."""
PLAYS = "tower"
"""The kind of a version that plays Go: `prairie.serve.board` answers for it."""


class ModelNotFound(NotFoundError):
    """No line, version or folder of that name is served here."""

    code = "model_not_found"


@dataclass(frozen=True)
class Source:
    """Where a version lies and what it is called; known without loading anything."""

    name: str
    """spark@3, or the name of a plain folder."""
    folder: Path
    base_folder: Path
    """Same as `folder` unless the version is an adapter."""
    line: str
    number: int | None = None
    artifact_id: str | None = None
    created: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def kind(self) -> str:
        return "model" if self.folder == self.base_folder else "adapter"

    def model_object(self, name: str) -> dict[str, Any]:
        """OpenAI's model object of a version that is not in memory."""
        about = {"line": self.line, "version": self.number, "artifact_id": self.artifact_id}
        more = {"kind": self.kind, "resident": False, "figures": self.figures}
        return {
            "id": name,
            "object": "model",
            "created": int(self.created),
            "owned_by": "prairie",
            "prairie": about | more,
        }


@dataclass(eq=False)
class Base:
    """A model, with its engine if it writes, and the names of the residents that stand on it."""

    key: tuple[str, str, str]
    """Hashes of weights, template (of a model that only reads: its folder) and tokenizer."""
    model: LanguageModel | Reader
    residents: set[str] = field(default_factory=set)


@dataclass(eq=False)
class Resident:
    """A version in memory. All but the last three fields are fixed for its lifetime."""

    source: Source
    base: Base
    adapter_hash: str | None
    spare: bool = False
    """Was asked for by number or id: may stay for a while."""
    in_use: int = 0
    last_used: float = 0.0

    @property
    def engine(self) -> Engine:
        """Raises RequestError for a model that writes nothing."""
        if self.base.model.engine is None:
            raise self._writes_nothing()
        return self.base.model.engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self.base.model.tokenizer

    @property
    def template(self) -> ChatTemplate:
        """Raises RequestError for a model that writes nothing."""
        if self.base.model.template is None:
            raise self._writes_nothing()
        return self.base.model.template

    def _writes_nothing(self) -> RequestError:
        return RequestError(
            f"{self.source.name} reads texts and writes none", mend="POST /v1/embeddings takes it", param="model"
        )

    @property
    def max_context(self) -> int:
        """In tokens."""
        model = self.base.model
        return model.embedder.max_tokens if model.engine is None else model.engine.max_context

    @property
    def weights_hash(self) -> str:
        return self.base.model.weights_hash

    @property
    def fingerprint(self) -> str:
        """Weights, adapter and template in one short word: equal fingerprints answer alike."""
        parts = (self.weights_hash, self.adapter_hash or "", self.base.key[1], *filter(None, [self.bits]))
        return "fp_" + hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]

    @property
    def bits(self) -> str | None:
        """In what form the weights are kept, where they are quantised: the same weights then answer otherwise."""
        quantization = getattr(self.base.model, "quantization", None)
        return quantization.bits if quantization is not None else None

    def identity(self) -> dict[str, Any]:
        """The `prairie` object of every answer."""
        return {
            "line": self.source.line,
            "version": self.source.number,
            "artifact_id": self.source.artifact_id,
            "weights_hash": self.weights_hash,
            "adapter_hash": self.adapter_hash,
            **({"quantize": self.bits} if self.bits else {}),
        }

    def model_object(self, name: str) -> dict[str, Any]:
        """OpenAI's model object under `name`, with the version that answers to it."""
        model = self.base.model
        more = {
            "kind": self.source.kind,
            "resident": True,
            "writes": model.engine is not None,
            "max_context": self.max_context,
            "figures": self.source.figures,
            **({} if model.engine is None or model.engine.choice is None else {"steps": model.engine.choice.to_json()}),
        }
        return {
            "id": name,
            "object": "model",
            "created": int(self.source.created),
            "owned_by": "prairie",
            "prairie": self.identity() | more,
        }


class Models:
    """The table of names and residents. Methods may be called from any thread; loading happens in one of its own."""

    def __init__(
        self,
        home: Home,
        worker: Worker,
        metrics: Metrics,
        names: Sequence[str] = (),
        detect: Callable[[], Runtime] | None = None,
        may_be_empty: bool = False,
        **engine_settings: Any,
    ) -> None:
        """`names`: what to serve (lines, versions, model folders); none: every line of the registry. `detect` looks at
        the machine; it runs with the first load, because it imports torch.

        Raises NotFoundError if there is nothing to serve or a name is unknown. Nothing is loaded yet.
        """
        self.home, self.worker, self.metrics = home, worker, metrics
        self._detect, self._engine_settings = detect, engine_settings
        self._runtime: Runtime | None = None
        self.ready = False
        """Everything that is served from the start is in memory."""
        self.compile_first = False
        """Every model answers by its compiled form from the first step."""
        self._lock = threading.Lock()
        self._loader = ThreadPoolExecutor(1, "prairie-loader")
        self._bases: dict[tuple[str, str, str], Base] = {}
        self._residents: dict[str, Resident] = {}
        self._pointers: dict[str, str] = {}
        """Name -> name of the resident that answers to it: lines, and what was named at the start."""
        self._trials: dict[str, Trial] = {}
        """Line -> its version on trial, which is in memory."""
        self._by_version: dict[str, str] = {}
        """ "spark@9af3" -> "spark@3": names with a version in them, which never change."""
        self._folders: dict[str, Source] = {}
        self._verified: dict[Path, tuple[Any, ...]] = {}
        """Model folder -> what its files were like when their weights were hashed: a version that comes back, or that
        was judged here before, is not hashed again while they are so."""
        self.added: dict[str, Source] = {}
        """Adapters that were loaded by name while the server ran (`adapters`)."""
        self.max_adapters = MAX_ADAPTERS
        self._named = [self._declare(name) for name in names]
        self._lines = {_family(name) for name in self._named if name not in self._folders}
        if not names and not may_be_empty and not self._champions() and not self._towers():
            raise NotFoundError(
                f"there is no model to serve in {home.root}",
                mend="make one with `prairie demo` or `prairie run RECIPE`, or name a folder: `prairie serve DIR`",
            )

    # -- requests --------------------------------------------------------------------------------------------------

    async def acquire(self, name: str, user: str = "") -> Resident:
        """The version that answers to `name`, in memory until `release`; loads it if need be. A line's name is answered
        by its canary if this `user` is one of its share; without a user by the champion. Raises ModelNotFound."""
        resident = self._take(name, user)
        if resident is not None:
            return resident
        source = await asyncio.to_thread(self._source, name)
        # The first load happens in the loader's thread too: a request that comes early waits for it here.
        loading = asyncio.get_running_loop().run_in_executor(self._loader, self._load_named, name, source)
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            # The client left, the load goes on: give back what nobody will use.
            loading.add_done_callback(self._release_loaded)
            raise

    def release(self, resident: Resident) -> None:
        """A request is over; whatever only it needed is freed."""
        with self._lock:
            resident.in_use -= 1
            resident.last_used = time.monotonic()
            leaving = resident.in_use == 0
        if leaving:
            self.sweep()

    def acquire_shadow(self, name: str) -> Resident | None:
        """The version that shall answer to a line's name beside the champion and unseen, until `release`."""
        with self._lock:
            trial = self._trials.get(name)
            resident = self._residents.get(trial.version.name) if trial is not None and trial.share is None else None
            if resident is not None:
                resident.in_use += 1
            return resident

    def _release_loaded(self, loading: asyncio.Future[Resident]) -> None:
        if not loading.cancelled() and loading.exception() is None:
            self.release(loading.result())

    def _take(self, name: str, user: str = "") -> Resident | None:
        with self._lock:
            trial = self._trials.get(name)
            if trial is not None and trial.share is not None and is_canary(trial.version.name, user, trial.share):
                resident = self._residents.get(trial.version.name)
            else:
                resident = self._residents.get(self._pointers.get(name) or self._by_version.get(name, ""))
            if resident is not None:
                resident.in_use += 1
            return resident

    def _load_named(self, name: str, source: Source) -> Resident:
        """In the loader's thread: `name`, loaded and taken."""
        taken = self._take(name)
        if taken is not None:
            return taken
        resident = self._load(source)
        resident.spare = True
        if "@" in name and not name.endswith("@newest"):
            self._by_version[name] = source.name
        return resident

    # -- names -----------------------------------------------------------------------------------------------------

    def _declare(self, name: str) -> str:
        """A name given at the start -> the name it is served under. Raises NotFoundError."""
        folder = Path(name).expanduser()
        if (folder / "config.json").is_file():
            folder = folder.resolve()
            made = (folder / "config.json").stat().st_mtime
            self._folders[folder.name] = Source(folder.name, folder, folder, folder.name, created=made)
            return folder.name
        if folder.is_dir():
            raise NotFoundError(f"{folder} is no model folder", got="no config.json", wanted="a Hugging Face folder")
        self.home.registry.resolve(name)
        return name

    def _source(self, name: str) -> Source:
        """Where the version that `name` means lies. Raises ModelNotFound; StoreError when its artifact is damaged."""
        if name in self._folders:
            return self._folders[name]
        try:
            if self.serves(name):
                version = self.home.registry.resolve(name)
                if version.kind == PLAYS:
                    raise NotFoundError(f"{version.name} plays Go and writes nothing", mend="POST /v1/go/think asks it")
                return self._registered(version)
        except NotFoundError as error:
            raise ModelNotFound(
                error.what, got=error.got, wanted=error.wanted, mend=error.mend, param="model"
            ) from None
        with self._lock:
            known = sorted(self._pointers)
        raise ModelNotFound(
            "no such model is served here", got=f"`{name}`", wanted=", ".join(known[:8]) + ", ..." * (len(known) > 8),
            mend="GET /v1/models lists them", param="model",
        )  # fmt: skip

    def serves(self, name: str) -> bool:
        """With names given at the start: their lines only, with all versions and verticals of these."""
        return not self._named or _family(name) in self._lines

    def _registered(self, version: Version) -> Source:
        folder = self.home.artifacts.get(version.artifact_id).path
        base = version.base_artifact_id
        return Source(
            name=version.name,
            folder=folder,
            base_folder=folder if base is None else self.home.artifacts.get(base).path,
            line=version.line,
            number=version.number,
            artifact_id=version.artifact_id,
            created=version.created,
            figures=version.figures,
        )

    def _champions(self) -> dict[str, Version]:
        """Line -> its champion, for the lines that are served and read or write text."""
        return {line: one for line, one in self._all_champions().items() if one.kind != PLAYS}

    def _towers(self) -> list[str]:
        """The lines that are served and play."""
        return [line for line, one in self._all_champions().items() if one.kind == PLAYS]

    def _all_champions(self) -> dict[str, Version]:
        lines = [line for line in self.home.registry.lines() if self.serves(line)]
        champions = {line: self.home.registry.champion(line) for line in lines}
        return {line: champion for line, champion in champions.items() if champion is not None}

    def lines(self) -> list[str]:
        """The lines that are served."""
        return list(self._champions())

    # -- adapters that come and go (`adapters`) ---------------------------------------------------------------------

    def is_served(self, name: str) -> bool:
        """Whether the name already stands for a line, a vertical or a folder."""
        return name in self._folders or name in self._pointers or _family(name) in self.home.registry.lines()

    def base_folders(self, name: str | None = None) -> list[tuple[str, Path]]:
        """(hash of the weights, folder) of each base in memory that writes; with a name only the one it stands on."""
        with self._lock:
            residents = [r for r in self._residents.values() if r.base.model.engine is not None]
            if name is not None:
                residents = [r for r in residents if r.source.name in (name, self._pointers.get(name))]
            return sorted({(r.weights_hash, r.source.base_folder) for r in residents})

    def add(self, name: str, source: Source) -> None:
        """Loads an adapter and makes it known under a name. Raises what makes it unusable; then nothing has changed."""
        resident = self._loader.submit(self._load, source).result()
        with self._lock:
            resident.spare = True
            self.added[name] = self._folders[name] = source
            self._by_version[name] = source.name
        self.release(resident)

    def remove(self, name: str) -> None:
        """The name is unknown from now on; the adapter leaves memory when its last request has ended."""
        with self._lock:
            source = self.added.pop(name)
            del self._folders[name]
            self._by_version.pop(name, None)
            resident = self._residents.get(source.name)
            if resident is not None:
                resident.spare = False
        self.sweep()

    # -- loading ---------------------------------------------------------------------------------------------------

    def load_first(self) -> Future[None]:
        """Loads all that is served from the start. The future raises what makes a model unusable."""
        return self._loader.submit(self._load_first)

    def _load_first(self) -> None:
        for name in self._named:
            if name not in self._folders and self.home.registry.resolve(name).kind == PLAYS:
                continue
            source = self._source(name)
            resident = self._load(source)
            with self._lock:
                self._pointers[name] = source.name
            self.release(resident)
        _, failed = self._refresh()
        if failed and not self._pointers:
            raise failed[0]
        self.ready = True

    def refresh(self) -> tuple[list[str], list[Exception]]:
        """Brings every line's name to its champion, and trials to theirs: loads first, then moves all names at once.

        Returns the names that moved, and why some could not: these go on with the version they had.
        """
        return self._loader.submit(self._refresh).result()

    def _refresh(self) -> tuple[list[str], list[Exception]]:
        loaded: dict[str, Resident] = {}
        failed: list[Exception] = []
        for line, champion in self._champions().items():
            try:
                loaded[line] = self._load(self._registered(champion))
            except Exception as error:
                failed.append(error)
                self.metrics.load_failures.inc()
                log.error("%s cannot be loaded, %s stays as it is: %s", champion.name, line, error)
        trials = self._load_trials(loaded)
        with self._lock:
            before = dict(self._pointers)
            self._pointers.update({line: resident.source.name for line, resident in loaded.items()})
            self._trials = {line: trial for line, (trial, _) in trials.items()}
        moved = [line for line, resident in loaded.items() if before.get(line) != resident.source.name]
        for line in moved:
            log.info("%s is now %s", line, loaded[line].source.name)
            if line in before:
                self.metrics.swaps.labels(line).inc()
        for resident in (*loaded.values(), *(resident for _, resident in trials.values())):
            self.release(resident)
        self.sweep()
        return moved, failed

    def _load_trials(self, champions: dict[str, Resident]) -> dict[str, tuple[Trial, Resident]]:
        """Line -> its trial and the version in memory. A trial whose version cannot be loaded ends."""
        found = {}
        for line in champions:
            trial = self.home.registry.trial(line)
            if trial is None:
                continue
            try:
                resident = self._load(self._registered(trial.version))
                resident.engine, resident.template  # noqa: B018 - a version that writes nothing cannot answer
                found[line] = trial, resident
            except Exception as error:
                self.metrics.load_failures.inc()
                log.error("%s cannot be loaded, its trial is over: %s", trial.version.name, error)
                self.home.registry.end_trial(trial, who="prairie serve", why=f"it cannot be loaded: {error}")
        return found

    def _load(self, source: Source) -> Resident:
        """In the loader's thread: the resident of `source`, from memory or disk; counted as in use until `release`."""
        with self._lock:
            resident = self._residents.get(source.name)
            if resident is not None:
                resident.in_use += 1
                return resident
        started = time.perf_counter()
        with _served_soon():
            base = self._load_base(source.base_folder)
            adapter_hash = self._load_adapter(source, base) if source.kind == "adapter" else None
        resident = Resident(source, base, adapter_hash, last_used=time.monotonic())
        with self._lock:
            resident.in_use += 1
            base.residents.add(source.name)
            self._bases[base.key] = base
            self._residents[source.name] = resident
        self.metrics.load_seconds.labels(source.kind).observe(time.perf_counter() - started)
        self._count()
        return resident

    def _load_base(self, folder: Path) -> Base:
        from prairie.engine.loading import load
        from prairie.engine.seq2seq import Seq2Seq
        from prairie.models.weights import fingerprint, read_manifest

        # Two artifacts with the same weights, template and tokenizer are one engine.
        manifest = read_manifest(folder)
        promised = (
            str(manifest.get("weights_hash")),
            str(manifest.get("template_hash")),
            str(manifest.get("tokenizer_hash")),
        )
        with self._lock:
            base = self._bases.get(promised)
        if base is not None:
            return base
        check_fits(folder)
        if self._runtime is None and self._detect is not None:
            self._runtime = self._detect()
        files = fingerprint(folder)
        verified = self._verified.get(folder) == files
        model = load(folder, runtime=self._runtime, verified=verified, **self._engine_settings)
        self._verified[folder] = files
        if isinstance(model, Seq2Seq):
            raise ModelError(
                f"{folder} is an encoder-decoder, which the server does not answer with",
                mend="`prairie chat DIR` and prairie.load do",
            )
        if (quantization := getattr(model, "quantization", None)) is not None:
            log.info("%s quantised, %s", folder.name, quantization)
        # The pooling of a model that only reads stands in its folder; of one that writes the engine is what counts.
        text = str(folder) if model.template is None else model.template.hash
        key = (model.weights_hash, text, model.tokenizer.hash)
        self._prepare(model)
        with self._lock:
            return self._bases.get(key) or Base(key, model)

    def _prepare(self, model: LanguageModel | Reader) -> None:
        """A new champion answers by its compiled form from the first step where its predecessor does: compiled code is
        shared, what was tried for a model of its shape holds for it too, and laying out the weights takes a moment
        between two steps."""
        with self._lock:
            engines = [base.model.engine for base in self._bases.values()]
        compiled = [engine for engine in engines if engine is not None and engine.is_compiled]
        if (new := model.engine) is not None and (self.compile_first or compiled):
            shape = new.model.config
            like = next((engine for engine in reversed(compiled) if engine.model.config == shape), None)
            self.worker.call(lambda: new.compile(like)).result()

    def start_compiling(self) -> None:
        """Has the compiled form of every model in memory made ready in the background, and its threads probed."""
        with self._lock:
            engines = [base.model.engine for base in self._bases.values()]
        for engine in engines:
            if engine is not None:
                engine.start_compiling()

    def _load_adapter(self, source: Source, base: Base) -> str:
        """Reads an adapter, adds it to its base's engine between two steps and returns its hash.

        Raises AdapterError if it was trained on other weights, with another template or another tokenizer.
        """
        from prairie.engine.language_model import check_adapter
        from prairie.models.lora import LoRA

        engine, template = base.model.engine, base.model.template
        if engine is None or template is None:
            raise AdapterError(f"{source.name} stands on a model that writes nothing", wanted="a decoder that writes")
        check_adapter(source.folder, template, base.model.tokenizer)
        lora = LoRA.load(source.folder)
        hash = lora.hash
        self.worker.call(lambda: engine.add_adapter(hash, lora)).result()
        return hash

    # -- freeing ---------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Frees what no name points at and nobody uses, but for a few versions that were asked for lately."""
        with self._lock:
            pointed = {*self._pointers.values(), *(trial.version.name for trial in self._trials.values())}
            idle = [r for name, r in self._residents.items() if name not in pointed and r.in_use == 0]
            if not idle:
                return
            fresh = [r for r in idle if r.spare and time.monotonic() - r.last_used < SPARE_S]
            added = {source.name for source in self.added.values()}
            adapters = sorted((r for r in idle if r.source.name in added), key=lambda r: r.last_used)
            spared = sorted((r for r in fresh if r.source.name not in added), key=lambda r: r.last_used)
            spared = [*spared[-SPARE_VERSIONS:], *adapters[max(0, len(adapters) - self.max_adapters) :]]
            leaving = [r for r in idle if r not in spared]
            engines = sum(self._forget(resident) for resident in leaving)
        if leaving:
            self._count()
        if engines:
            self._loader.submit(give_back)

    def drop_engine(self, engine: Engine) -> None:
        """The engine broke: its versions are read anew from disk when they are next asked for."""
        with self._lock:
            for resident in [r for r in self._residents.values() if r.base.model.engine is engine]:
                self._forget(resident)
        self._count()

    def _forget(self, resident: Resident) -> bool:
        """With the lock held: takes a version out of the table; True if its engine went with it."""
        base, hash = resident.base, resident.adapter_hash
        del self._residents[resident.source.name]
        base.residents.discard(resident.source.name)
        if not base.residents:
            self._bases.pop(base.key, None)
            return True
        engine, others = base.model.engine, (self._residents[name] for name in base.residents)
        if hash is not None and engine is not None and not any(other.adapter_hash == hash for other in others):
            self.worker.call(lambda: engine.remove_adapter(hash))
        return False

    def _count(self) -> None:
        with self._lock:
            engines, versions = len(self._bases), len(self._residents)
        self.metrics.resident.labels("engine").set(engines)
        self.metrics.resident.labels("version").set(versions)

    def count_engines(self) -> None:
        """Brings the gauges of the engines up to date; reads counts that the engine's thread may be changing."""
        with self._lock:
            engines = [base.model.engine for base in self._bases.values()]
        figures = [engine.figures() for engine in engines if engine is not None]
        for name in (
            "running", "waiting", "kv_blocks", "kv_blocks_held", "preemptions", "drafted_tokens", "accepted_tokens"
        ):  # fmt: skip
            self.metrics.engines.labels(name).set(sum(each[name] for each in figures))

    # -- listing ---------------------------------------------------------------------------------------------------

    def listing(self) -> list[dict[str, Any]]:
        """OpenAI's model objects: names first, then versions in memory that were asked for by number or id."""
        with self._lock:
            named = {name: self._residents.get(key) for name, key in sorted(self._pointers.items())}
            named |= {name: self._residents.get(source.name) for name, source in sorted(self.added.items())}
            shown = {r.source.name for r in named.values() if r is not None}
            named |= {name: r for name, r in sorted(self._residents.items()) if r.spare and name not in shown}
            away = {name: source for name, source in self.added.items() if named.get(name) is None}
            trials = {line: trial.to_json() for line, trial in self._trials.items()}
        found = {name: resident.model_object(name) for name, resident in named.items() if resident is not None}
        for name in found.keys() & trials.keys():
            found[name]["prairie"]["trial"] = trials[name]
        found |= {name: source.model_object(name) for name, source in sorted(away.items())}
        return list(found.values())

    def describe(self, name: str) -> dict[str, Any]:
        """One model object, without loading it. Raises ModelNotFound."""
        resident = self._take(name)
        if resident is not None:
            self.release(resident)
            return resident.model_object(name)
        return self._source(name).model_object(name)

    def close(self) -> None:
        """Ends the loader's thread. A first load under way is not waited for: it cannot be interrupted."""
        self._loader.shutdown(wait=self.ready, cancel_futures=True)


def is_canary(version: str, user: str, share: float) -> bool:
    """Is this user one of the `share` who get a version's answers? By a hash: the same ones at every server and time, a
    larger share adds to a smaller one, another version has others. Nobody without a name is."""
    digest = hashlib.sha256(f"canary:{version}:{user}".encode()).digest()
    return bool(user) and int.from_bytes(digest[:8], "big") / 2**64 < share


@contextmanager
def _served_soon() -> Iterator[None]:
    """While a model is read, threads of Python give way to each other after 0.5 ms instead of 5: the one that reads
    asks for its turn dozens of times, and would wait behind the engine and the event loop at each."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _family(name: str) -> str:
    """ "spark:poet@3" -> "spark"."""
    return name.partition("@")[0].partition(":")[0]
