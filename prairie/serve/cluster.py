"""Prairie on a Ray cluster: the app of `prairie serve` as a Ray Serve deployment (extra `cluster`).

    serve run prairie.serve.cluster:app names=spark home=/shared/home replicas=2 threads=2

Ray starts the replicas, spreads requests over them, starts a dead one anew and drains them. Each replica is a whole
server on the one home, which every machine must see (a shared folder, and PRAIRIE_DATABASE for Postgres): records,
keys, votes and promotions meet there. Limits of a key, queues and /metrics are each replica's own.
Not here: what a server is (`app`); several processes on one machine without Ray (`replicas`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prairie.errors import UsageError
from prairie.serve.options import Dtype, Quantize, Speculate

if TYPE_CHECKING:
    from fastapi import FastAPI

OPTIONS = {
    "names": "lines, versions or model folders, joined by commas; none: every line",
    "home": "the folder of the home",
    "replicas": "how many servers (1)",
    "threads": "threads, and CPUs that Ray counts, of each (1)",
    "quantize": "bf16, int8, int4 or nf4",
    "dtype": "auto, float32 or bfloat16 (auto)",
    "speculate": "ngram",
    "max_pending": "answers under way or queued, of each (512)",
}
CHOICES = {"quantize": Quantize, "dtype": Dtype, "speculate": Speculate}


def app(args: Mapping[str, str]) -> Any:
    """The Ray Serve application of these arguments. Raises UsageError for what is unknown, or without Ray."""
    unknown = sorted(args.keys() - OPTIONS.keys())
    if unknown:
        raise UsageError("unknown arguments of the deployment", got=", ".join(unknown), wanted=", ".join(OPTIONS))
    try:
        replicas, threads, max_pending = (
            int(args.get(name, default)) for name, default in (("replicas", 1), ("threads", 1), ("max_pending", 512))
        )
    except ValueError as error:
        raise UsageError("replicas, threads and max_pending are numbers", got=error) from None
    try:
        from ray import serve
    except ImportError:
        raise UsageError(
            "Ray Serve needs the extra `cluster`, which is not installed", mend="pip install 'prairie[cluster]'"
        ) from None
    names = [name for name in args.get("names", "").split(",") if name]
    kept = settings_of(args)

    class Replica:
        """One server; Ray runs its start and stop as those of any ASGI app."""

        async def __serve_build_asgi_app__(self) -> FastAPI:
            server = _server(names, args.get("home"), threads, kept, max_pending)
            self.service = server.state.service
            return server

        async def check_health(self) -> None:
            """Raises what Ray should start a replica anew for."""
            if self.service.failure is not None:
                raise self.service.failure
            if (problem := self.service.health()) is not None:
                raise RuntimeError(problem)

    deployment = serve.deployment(
        name="prairie",
        num_replicas=replicas,
        # Prairie queues fairly and says when to come back; Ray's own queue stays behind that.
        max_ongoing_requests=2 * max_pending,
        ray_actor_options={"num_cpus": threads},
        graceful_shutdown_timeout_s=30,
    )
    return deployment(serve.ingress()(Replica)).bind()


def settings_of(args: Mapping[str, str]) -> dict[str, str]:
    """What the arguments say of the engines. Raises UsageError for a value that there is not, or two that disagree."""
    for name, known in CHOICES.items():
        if name in args and args[name] not in list(known):
            raise UsageError(f"{name} has no such value", got=args[name], wanted=" | ".join(known))
    if args.get("dtype", "auto") != "auto" and "quantize" in args:
        raise UsageError("dtype and quantize both say how weights are kept", mend="leave out one of them")
    return {"dtype": "auto"} | {name: args[name] for name in CHOICES if name in args}


def _server(names: list[str], home: str | None, threads: int, kept: dict[str, str], max_pending: int) -> FastAPI:
    """In a replica: the app of `prairie serve`. No route of an administrator is open without a key: others reach it."""
    from pathlib import Path

    from prairie.runtime import Runtime
    from prairie.serve.app import Settings, create_app
    from prairie.store.home import Home

    settings = Settings(max_pending=max_pending, admin_without_key=False)
    return create_app(
        Home(Path(home) if home else None), names, settings, lambda: Runtime.detect(threads=threads), **kept
    )
