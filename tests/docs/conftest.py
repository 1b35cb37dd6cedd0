"""The generator of the reference pages, which is a script of docs/ and no package."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """Return docs/reference.py as a module."""
    pytest.importorskip("torch", reason="the extra `distill` is not installed: its commands are listed too")
    spec = importlib.util.spec_from_file_location("flashbulb_docs_reference", ROOT / "docs" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
