"""Models that come and go while a worker runs."""

import logging
import shutil
from functools import partial
from pathlib import Path

import pytest

from flashbulb_service.catalog import Catalog, Model, open_model
from flashbulb_service.errors import UnknownModel
from flashbulb_service.presence import LiveWorker, serves, would_serve
from flashbulb_service.repository import Repository
from support.tiny_bundle import make_tiny_bundle


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    path = make_tiny_bundle(tmp_path / "models")
    known = [open_model(path, "tiny", 1, verify=True)]
    return Repository(tmp_path / "models", known)


def ids(repository: Repository) -> tuple[list[str], set[str]]:
    new, gone = repository.scan()
    return [model.id for model in new], gone


def test_a_new_version_is_found_once_and_a_removed_one_is_gone(
    repository: Repository, tmp_path: Path
) -> None:
    assert ids(repository) == ([], set())
    make_tiny_bundle(tmp_path / "models", version=2)
    assert ids(repository) == (["tiny@2"], set())
    assert ids(repository) == ([], set())
    shutil.rmtree(tmp_path / "models" / "tiny" / "1")
    assert ids(repository) == ([], {"tiny@1"})


def test_a_bundle_that_was_replaced_after_it_was_verified_is_found(tmp_path: Path) -> None:
    """A worker takes seconds to load its models before it begins to look."""
    path = make_tiny_bundle(tmp_path / "models")
    known = open_model(path, "tiny", 1, verify=True)
    shutil.rmtree(path)
    make_tiny_bundle(tmp_path / "models", licence="MIT")
    assert ids(Repository(tmp_path / "models", [known])) == (["tiny@1"], set())


def test_a_damaged_bundle_is_refused_in_one_line_until_it_changes(
    repository: Repository, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_tiny_bundle(tmp_path / "models", version=2)
    whole = (path / "decoder.onnx").read_bytes()
    (path / "decoder.onnx").write_bytes(whole[:-1])
    make_tiny_bundle(tmp_path / "models", version=3)
    with caplog.at_level(logging.ERROR):
        assert ids(repository) == (["tiny@3"], set())
        assert ids(repository) == ([], set())
    (record,) = caplog.records
    assert "tiny@2 refused" in record.message and "decoder.onnx" in record.message
    (path / "decoder.onnx").write_bytes(whole)
    assert ids(repository) == (["tiny@2"], set())


def test_a_bundle_that_cannot_be_read_hides_no_other_and_is_tried_again(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error of the disk ended the scan: who had appeared or gone in the same one was never told of."""
    unreadable = {"tiny@1", "tiny@2"}

    def read(path: Path, name: str, version: int, *, verify: bool) -> Model:
        if f"{name}@{version}" in unreadable:
            raise OSError(5, "Input/output error")
        return open_model(path, name, version, verify=verify)

    monkeypatch.setattr("flashbulb_service.repository.open_model", read)
    models = tmp_path / "models"
    (models / "tiny" / "1" / "notes.txt").write_text("being replaced")
    for version in (2, 3):
        make_tiny_bundle(models, version=version)
    assert ids(repository) == (["tiny@3"], set())
    shutil.rmtree(models / "tiny" / "3")
    unreadable.remove("tiny@2")
    assert ids(repository) == (["tiny@2"], {"tiny@3"})
    shutil.rmtree(models / "tiny" / "1")  # still served: its replacement was never read
    assert ids(repository) == ([], {"tiny@1"})


def test_the_catalog_offers_a_new_version_once_a_worker_has_it(tmp_path: Path) -> None:
    make_tiny_bundle(tmp_path)
    catalog = Catalog.load(tmp_path, verify=False)
    make_tiny_bundle(tmp_path, version=2)
    catalog.refresh(tmp_path, lambda model, bundle: False)  # no worker yet: what was offered stays
    assert catalog.find("tiny").id == "tiny@1"
    catalog.refresh(tmp_path, lambda model, bundle: True)
    assert (catalog.find("tiny").id, catalog.find("tiny@1").id) == ("tiny@2", "tiny@1")
    shutil.rmtree(tmp_path / "tiny")
    catalog.refresh(tmp_path, lambda model, bundle: True)
    for wanted in ("tiny", None):
        with pytest.raises(UnknownModel):
            catalog.find(wanted)


def test_a_replaced_version_is_offered_while_workers_serve_it_and_nothing_else_of_its_name(
    tmp_path: Path,
) -> None:
    """An API that saw the store before the workers did took away what they still drew with."""
    make_tiny_bundle(tmp_path)
    catalog = Catalog.load(tmp_path, verify=False)
    (old,) = catalog.models
    worker = LiveWorker("w", (old.id,), "onnx", (old.bundle.sha256,))
    shutil.rmtree(tmp_path / "tiny" / "1")
    make_tiny_bundle(tmp_path, version=2)
    for is_served in (serves, would_serve):
        catalog.refresh(tmp_path, partial(is_served, [worker]))
        assert [model.id for model in catalog.models] == ["tiny@1"]
    catalog.refresh(tmp_path, lambda model, bundle: True)
    assert [model.id for model in catalog.models] == ["tiny@2"]


def test_without_a_live_worker_of_its_name_a_bundle_is_what_a_started_one_would_serve() -> None:
    worker = LiveWorker("w", ("tiny@1",), "onnx", ("abc",))
    asked = [("tiny@1", "abc"), ("tiny@1", "def"), ("tiny@2", "abc"), ("sdxl@1", "abc")]
    assert [would_serve([worker], *one) for one in asked] == [True, False, False, True]
    assert all(would_serve([], *one) for one in asked)
