from pathlib import Path

import pytest

from support.tiny_bundle import make_tiny_bundle


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    make_tiny_bundle(folder)
    return folder
