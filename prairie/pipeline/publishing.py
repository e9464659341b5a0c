"""The stages that face the world: `publish` (a version of a line, made champion) and `serve` (a server process).

The server is the same `prairie serve` that a user starts; it is a process of its own and is reached over HTTP only.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from prairie.errors import BusyError, PrairieError
from prairie.models.weights import read_manifest
from prairie.pipeline.context import Context, Work
from prairie.recipe import Publish, Serve
from prairie.store.artifacts import Artifact
from prairie.store.registry import Registry, Version

START_LIMIT_S = 600.0
"""Compiling takes half a minute on a quiet machine that never did it, and far longer on a busy one."""


@dataclass
class Server:
    """A running `prairie serve`."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self, limit_s: float = 15.0) -> None:
        """SIGTERM drains it; SIGKILL if it does not end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(limit_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def publish(work: Work) -> dict[str, Any]:
    """Registers the model once, and makes it champion unless its line has already gone on from it."""
    config: Publish = work.config
    registry = Registry(work.context.home)
    version = register(registry, config.line, work.model(config.model), work.context)
    if not any(entry.number == version.number and entry.action == "promote" for entry in registry.history(config.line)):
        registry.promote(version, why=f"published by recipe {work.context.recipe.name}")
    return {"line": config.line, "version": version.number, "artifact": version.artifact_id}


def register(registry: Registry, line: str, artifact: Artifact, context: Context) -> Version:
    """The version of `line` that holds this artifact; a new number only when it is new."""
    manifest = read_manifest(artifact.path)
    return registry.register(
        line,
        artifact.id,
        kind=str(manifest["kind"]),
        base=manifest.get("base_artifact"),
        lineage={"recipe": context.recipe.name, "recipe_hash": context.recipe.hash(), "stage": artifact.name},
        figures=artifact.figures,
    )


def serve(work: Work) -> dict[str, Any]:
    """Starts the server and waits until it is ready. BusyError when the port is taken."""
    config: Serve = work.config
    port = config.port or free_port(config.host)
    check_port(config.host, port)
    log = work.scratch / "server.log"
    command = [sys.executable, "-m", "prairie", *serve_command(work.context.home.root, config.host, port)]
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=_environment(work.context), start_new_session=True
        )
    server = Server(f"http://{config.host}:{port}", process, log)
    work.context.services.append(server)
    wait_until_ready(server)
    return {"url": server.url}


def serve_command(home: Path, host: str, port: int) -> list[str]:
    """Of the wheel's server: its models are compiled before it is ready, and in float32, as neither who asks when nor a
    probe of this machine must change what people are told, and so what they teach."""
    return ["serve", "--home", str(home), "--host", host, "--port", str(port), "--compile", "--dtype", "float32"]


def wait_until_ready(server: Server) -> None:
    """Raises PrairieError with the server's own last words when it does not come up."""
    deadline = time.monotonic() + START_LIMIT_S
    with httpx.Client(timeout=2) as client:
        while time.monotonic() < deadline and server.process.poll() is None:
            try:
                if client.get(f"{server.url}/readyz").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
    server.stop(1)
    words = server.log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing in its log"]
    raise PrairieError("the server did not come up", got=words[0], mend=f"its log is {server.log}")


def check_port(host: str, port: int) -> None:
    """Raises BusyError if something listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BusyError(
                f"port {port} on {host} cannot be taken", got=str(error), mend="choose another with --port"
            ) from None


def free_port(host: str) -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _environment(context: Context) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(context.runtime.threads), "PRAIRIE_HOME": str(context.home.root)}
