"""A home on SQLite and, where a Postgres can be started, the same tests on that."""

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from prairie.store.home import Home

ON_BOTH = ("test_feedback_store", "test_registry", "test_keys_store", "test_logs", "test_postgres")


def pytest_generate_tests(metafunc):
    if "home" in metafunc.fixturenames and metafunc.module.__name__.rpartition(".")[2] in ON_BOTH:
        metafunc.parametrize("home", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def home(tmp_path, request, monkeypatch):
    if getattr(request, "param", "sqlite") == "postgres":
        monkeypatch.setenv("PRAIRIE_DATABASE", request.getfixturevalue("postgres_url"))
    with Home(tmp_path / "home") as home:
        yield home


@pytest.fixture(scope="session")
def _postgres():
    """A Postgres of our own in a folder of its own, reached by a socket there; stopped and removed at the end."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra `postgres`)")
    program = shutil.which("pg_ctl")
    if program is None:
        pytest.skip("there is no pg_ctl on the path")
    user = None
    if os.geteuid() == 0:  # Postgres refuses to run as root
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("Postgres does not run as root, and there is no user postgres")
    folder = Path(tempfile.mkdtemp(prefix="prairie-pg-"))
    run_as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    if user:
        os.chown(folder, user.pw_uid, user.pw_gid)
    bin = Path(program).resolve().parent

    def run(*arguments):
        subprocess.run([*map(str, arguments)], check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=120, **run_as)

    data = folder / "data"
    try:
        run(bin / "initdb", "-D", data, "-A", "trust", "-U", "prairie", "--no-sync", "-E", "UTF8", "--locale", "C")
        settings = f"-k {folder} -c listen_addresses= -c fsync=off -c max_connections=60"
        run(bin / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", settings, "start")
        try:
            yield folder
        finally:
            run(bin / "pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_NUMBERS = itertools.count()


@pytest.fixture
def postgres_url(_postgres):
    """A database of this test alone."""
    import psycopg

    name = f"test_{next(_NUMBERS)}"
    with psycopg.connect(f"host={_postgres} user=prairie dbname=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield f"postgresql+psycopg://prairie@/{name}?host={_postgres}"
    with psycopg.connect(f"host={_postgres} user=prairie dbname=postgres", autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
