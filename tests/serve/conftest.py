import os
import sys
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import tiny_server


@pytest.fixture(scope="package")
def spark_root(tmp_path_factory):
    """The folder of a home made once; copy it to change it."""
    root = tmp_path_factory.mktemp("serve") / "home"
    tiny_server.make_home(root).close()
    return root


@pytest.fixture
def home(spark_root, tmp_path):
    """A home of the test's own."""
    import shutil

    shutil.copytree(spark_root, tmp_path / "home")
    with tiny_server.Home(tmp_path / "home") as home:
        yield home


@pytest.fixture(scope="module")
def server(spark_root, tmp_path_factory):
    """A server for all tests of a module that do not change the registry."""
    import shutil

    root = tmp_path_factory.mktemp("module") / "home"
    shutil.copytree(spark_root, root)
    with tiny_server.Home(root) as home, tiny_server.running(home) as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


os.environ.setdefault("OMP_NUM_THREADS", "1")
