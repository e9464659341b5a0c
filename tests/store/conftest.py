import pytest

from prairie.store.home import Home


@pytest.fixture
def home(tmp_path):
    with Home(tmp_path / "home") as home:
        yield home
