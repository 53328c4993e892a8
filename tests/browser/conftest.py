"""One home for all browser tests, so that the artifacts one of them builds are there for the next."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab_browser import browser, jupyter, missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, in one sentence, where there is no browser; the hook sees the tests of all folders."""
    if reason := missing():
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def browser_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LABKIT_HOME of every kernel the browser tests start."""
    return tmp_path_factory.mktemp("browser-home")


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder JupyterLab shows."""
    return tmp_path_factory.mktemp("desk")


@pytest.fixture(scope="session")
def chromium():
    with browser() as one:
        yield one


@pytest.fixture(scope="session")
def lab(desk: Path, browser_home: Path):
    """Address of a running JupyterLab over `desk`."""
    with jupyter(desk, browser_home) as address:
        yield address
