"""The playground of a real server in a real browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.chromium import Page, find_chromium
from support.serving import Serving
from support.tiny_bundle import make_tiny_bundle


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("playground")
    make_tiny_bundle(folder / "models")
    with Serving(folder / "models", folder / "data") as serving:
        yield serving.url


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    binary = find_chromium()
    if binary is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    with Page(binary, tmp_path / "profile") as page:
        yield page
