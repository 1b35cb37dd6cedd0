"""Wrong settings and arguments: exit code, and one line that says what was expected, what came, what to do."""

from pathlib import Path

import pytest

from flashbulb_service.catalog import Catalog
from flashbulb_service.cli import run
from flashbulb_service.errors import UnknownModel

HEAD = ["--models", "nowhere"]


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FLASHBULB_MODEL_ALIASES", "x", ["expected JSON", "FLASHBULB_MODEL_ALIASES", "'x'", "gpt-image-1"]),
        ("FLASHBULB_REDIS", "http://:pw@x", ["redis://", "unix://", "'http'"]),
        ("FLASHBULB_MODLES", "x", ["FLASHBULB_MODLES", "did you mean FLASHBULB_MODELS?"]),
    ],
)
def test_a_wrong_variable_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
    words: list[str],
) -> None:
    monkeypatch.setenv(variable, value)
    assert run(["models", "list"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and all(word in told for word in words), told
    assert ":pw@" not in told


def refuse(capsys: pytest.CaptureFixture[str], code: int, arguments: list[str], *words: str) -> None:
    assert run(arguments) == code
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and all(word in told for word in words), told


def test_a_folder_as_picture_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").mkdir()
    refuse(capsys, 2, ["generate", "dog", "-o", str(tmp_path / "a.png"), *HEAD], "folder", "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_an_unknown_model_is_wrong_usage(
    models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(
        capsys,
        2,
        ["generate", "dog", "-o", str(tmp_path / "a.png"), "--models", str(models_dir), "--model", "nope"],
        "'nope'",
        "tiny@1",
    )


def test_data_that_cannot_be_written_is_told_with_its_option(
    models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    data = str(tmp_path / "file" / "data")
    refuse(capsys, 1, ["serve", "--models", str(models_dir), "--data", data, "--port", "0"], data, "--data")


def test_a_results_url_that_cannot_be_opened_is_no_dump(
    models_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHBULB_RESULTS_URL", "s4://x")
    arguments = ["api", "--models", str(models_dir), "--redis", "redis://127.0.0.1:1", "--port", "0"]
    assert run(arguments) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "FLASHBULB_RESULTS_URL" in told and "'s4'" in told and "{" not in told


def test_an_alias_to_nothing_is_not_offered(models_dir: Path) -> None:
    with pytest.raises(UnknownModel) as caught:
        Catalog.load(models_dir, verify=False, aliases={"mine": "gone", "good": "tiny"})
    assert caught.value.known == ("good", "tiny")


def test_a_backend_that_cannot_run_the_models_is_refused_before_anything_starts(
    models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["serve", "--models", models_dir, "--data", tmp_path / "d", "--backend", "tensorrt"]
    assert run([str(word) for word in asked]) == 1
    said = capsys.readouterr().err
    assert said.startswith("flashbulb: backend 'tensorrt' was asked for, but ")
    assert said.count("\n") == 1 and not (tmp_path / "d").exists()
