"""Exit codes of the distiller's commands: what starts a job again must not try a slip of the pen for ever."""

from pathlib import Path

import pytest

from flashbulb_service.cli import run

RECIPE = "distill/recipes/emoji.yaml"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "nope.yaml"], "nope.yaml: expected a recipe"),
        (["run", RECIPE, "--set", "adm.steps"], "--set: expected key.of.recipe=value"),
        (["run", RECIPE, "--set", "adm.stepz=1"], "adm.stepz"),
        (
            ["run", RECIPE, "--set", "prompts=nope.txt", "--set", "evaluate=null", "--no-doctor"],
            "prompts: expected a file",
        ),
        (["run", RECIPE, "--set", "teacher=/nowhere"], "expected an emoji teacher"),
        (
            ["run", RECIPE, "--set", "evaluate.reference=/nowhere", "--no-doctor"],
            "expected the real pictures",
        ),
        (["run", RECIPE, "--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N"),
        (["plan", RECIPE, "--gpu", "24"], "--gpu: expected a memory size"),
        (["plan", RECIPE, "--gpu", "24GiB", "--gpus", "5"], "--gpus: expected a number that shares"),
        (["plan", RECIPE, "--gpu", "24GiB", "--stage", "adx"], "--stage: expected one of"),
        (["compare", "--methods", "zz"], "--methods: expected some of A1"),
        (["tensorrt", "/nowhere"], "expected a student bundle"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_exit_code_2_and_one_line(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run")] if arguments[0] == "run" else []
    group = "export" if arguments[0] == "tensorrt" else "distill"
    assert run([group, *arguments, *out]) == 2
    error = capsys.readouterr().err
    assert told in error.splitlines()[-1]


def test_failed_work_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("the disk is full")

    monkeypatch.setattr("flashbulb_distill.run.Run.__init__", fails)
    assert run(["distill", "run", RECIPE, "--out", str(tmp_path / "run")]) == 1
    assert "the disk is full" in capsys.readouterr().err
