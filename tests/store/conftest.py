"""A home on SQLite and, where a Postgres can be started, the same tests on that."""

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
