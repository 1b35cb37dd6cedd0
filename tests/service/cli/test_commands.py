"""The command line as a user meets it: real processes, exit codes, one line of error."""

import io
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashbulb_distill.bundle import hash_file
from support.serving import run_flashbulb
from support.tiny_bundle import make_tiny_bundle


def snapshot(folder: Path) -> dict[str, str]:
    return {str(file): hash_file(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def check_refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("flashbulb: ")
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n"), done.stderr
    for word in words:
        assert word in done.stderr


def test_the_version_is_that_of_the_installed_distribution() -> None:
    done = run_flashbulb("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"flashbulb {version('flashbulb')}\n", "")


def test_generate_twice_is_byte_identical_and_another_seed_differs(models_dir: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file, seed in zip(files, (7, 7, 8), strict=True):
        done = run_flashbulb("generate", "red apple", "-o", file, "--seed", str(seed), "--models", models_dir)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{file}\n"
        assert f"seed {seed}" in done.stderr
    first, second, third = (file.read_bytes() for file in files)
    assert first == second != third
    assert Image.open(io.BytesIO(first)).size == (64, 64)


def test_generate_several_numbers_the_files_and_image_0_is_the_single_one(
    models_dir: Path, tmp_path: Path
) -> None:
    common = ("--seed", "7", "--models", models_dir)
    done = run_flashbulb("generate", "dog", "-o", tmp_path / "many.png", "-n", "10", *common)
    assert done.stdout.split() == [str(tmp_path / f"many-{index}.png") for index in range(10)]
    run_flashbulb("generate", "dog", "-o", tmp_path / "one.png", *common)
    pictures = [(tmp_path / f"many-{index}.png").read_bytes() for index in range(10)]
    assert len(set(pictures)) == 10
    assert pictures[0] == (tmp_path / "one.png").read_bytes()


def test_generate_writes_the_format_of_the_file_name(models_dir: Path, tmp_path: Path) -> None:
    for name, kind in (("a.jpg", "JPEG"), ("a.webp", "WEBP")):
        run_flashbulb("generate", "dog", "-o", tmp_path / name, "--seed", "1", "--models", models_dir)
        picture = Image.open(tmp_path / name)
        assert picture.format == kind
        assert np.asarray(picture).std() > 1


def test_generate_takes_a_version_or_a_folder(models_dir: Path, tmp_path: Path) -> None:
    make_tiny_bundle(models_dir, version=2)
    outputs = {}
    for model in ("tiny", "tiny@2", "tiny@1", str(models_dir / "tiny" / "1")):
        run_flashbulb(
            "generate",
            "dog",
            "-o",
            tmp_path / "a.png",
            "--seed",
            "1",
            "--models",
            models_dir,
            "--model",
            model,
        )
        outputs[model] = (tmp_path / "a.png").read_bytes()
    assert outputs["tiny"] == outputs["tiny@2"] != outputs["tiny@1"]
    assert outputs["tiny@1"] == outputs[str(models_dir / "tiny" / "1")]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["dog", "-o", "a.gif"], 2, [".png", "a.gif"]),
        (["", "-o", "a.png"], 2, ["prompt"]),
        (["dog"], 2, ["-o"]),
        (["dog", "-o", "a.png", "--size", "512x512"], 2, ["64x64", "512x512"]),
        (["dog", "-o", "a.png", "--seed", "-1"], 2, ["--seed"]),
        (["dog", "-o", "a.png", "-n", "0"], 2, ["-n"]),
        (["dog", "-o", "a.png", "--model", "cat"], 2, ["cat", "tiny@1"]),
        (["dog", "-o", "a.png", "--model", "./none"], 1, ["manifest.json"]),
        (["dog", "-o", "none/a.png"], 1, ["none"]),
        (["dog", "-o", "a.png", "--backend", "magic"], 2, ["backend", "magic"]),
        (["dog", "-o", "a.png", "--sede", "3"], 2, ["--sede"]),
    ],
)
def test_generate_refuses_in_one_line(
    models_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    check_refused(run_flashbulb("generate", *arguments, "--models", models_dir), code, *words)
    assert snapshot(tmp_path) == before


def test_missing_models_folder_is_named(tmp_path: Path) -> None:
    for command in (["generate", "dog", "-o", tmp_path / "a.png"], ["models", "list"], ["models", "verify"]):
        check_refused(run_flashbulb(*command, "--models", tmp_path / "none"), 1, str(tmp_path / "none"))


@pytest.mark.parametrize(
    "name", ["manifest.json", "text_encoder.onnx", "denoiser.onnx", "decoder.onnx", "tokenizer.json"]
)
def test_a_flipped_byte_in_any_file_is_refused_and_changes_nothing(
    models_dir: Path, tmp_path: Path, name: str
) -> None:
    file = models_dir / "tiny" / "1" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    out = tmp_path / "a.png"
    out.write_bytes(b"an earlier picture")
    before = snapshot(tmp_path)
    check_refused(run_flashbulb("generate", "dog", "-o", out, "--models", models_dir), 1, name)
    check_refused(run_flashbulb("models", "verify", "--models", models_dir), 1, name)
    assert snapshot(tmp_path) == before


def test_another_schema_version_is_refused(models_dir: Path, tmp_path: Path) -> None:
    file = models_dir / "tiny" / "1" / "manifest.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"schema_version": 3}, indent=2) + "\n")
    done = run_flashbulb("generate", "dog", "-o", tmp_path / "a.png", "--models", models_dir)
    check_refused(done, 1, "schema_version 1 or 2", "got 3")


def test_models_list_inspect_verify(models_dir: Path) -> None:
    listed = run_flashbulb("models", "list", "--models", models_dir).stdout
    assert listed.split("\t")[:3] == ["tiny@1", "64x64", "1 step"]
    shown = json.loads(run_flashbulb("models", "inspect", "tiny", "--models", models_dir).stdout)
    assert (shown["name"], shown["time_steps"]) == ("tiny", [1.0])
    assert shown["sha256"] == hash_file(models_dir / "tiny" / "1" / "manifest.json")
    verified = run_flashbulb("models", "verify", "tiny@1", "--models", models_dir)
    assert verified.returncode == 0
    assert verified.stdout.startswith("tiny@1\tok\t4 files\thashes only: ")


def test_models_calibrate_writes_beside_the_bundle_and_never_into_it(
    models_dir: Path, tmp_path: Path
) -> None:
    before = snapshot(models_dir)
    data = tmp_path / "state"
    done = run_flashbulb("models", "calibrate", "--models", models_dir, "--data", data, "--threads", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "tiny@1"
    assert [line.split()[0] for line in lines[2:6]] == ["1", "2", "4", "8"]
    assert "random mixes): yes" in lines[6]
    (file,) = (data / "calibration").iterdir()
    assert lines[7].strip() == str(file)
    assert snapshot(models_dir) == before
    check_refused(run_flashbulb("models", "calibrate", "cat", "--models", models_dir), 2, "cat", "tiny@1")


def test_debug_adds_the_traceback(tmp_path: Path) -> None:
    done = run_flashbulb("models", "list", "--debug", "--models", tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "BundleRejected" in done.stderr


def test_usage_errors_exit_2(tmp_path: Path) -> None:
    check_refused(run_flashbulb("serv"), 2, "serv")
    check_refused(run_flashbulb("serve", "--port", "x"), 2, "--port")
    check_refused(run_flashbulb("worker", "--data", tmp_path), 2, "--redis")
    nowhere = ("--redis", "redis://127.0.0.1:1")
    check_refused(run_flashbulb("worker", *nowhere, "--models", tmp_path), 1, str(tmp_path))
    check_refused(run_flashbulb("serve", port="99999"), 2, "port", "99999")
    refused = run_flashbulb("serve", "--host", "0.0.0.0", "--port", "0", "--data", tmp_path)
    check_refused(refused, 2, "--allow-public", "flashbulb keys create")
    assert run_flashbulb("--help").returncode == 0


def loaded_modules(code: str) -> set[str]:
    """Run code in a fresh interpreter and return what it has imported."""
    program = f"import sys\n{code}\nprint('MODULES', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    return {name.partition(".")[0] for name in done.stdout.partition("MODULES ")[2].split()}


MODEL_LIBRARIES = {"torch", "onnxruntime", "diffusers", "transformers", "triton", "tokenizers"}


def test_help_imports_nothing_heavy() -> None:
    modules = loaded_modules("from flashbulb_service import cli\ncli.run(['--help'])")
    assert not modules & (MODEL_LIBRARIES | {"fastapi", "numpy", "PIL", "flashbulb_distill"})


def test_the_api_imports_no_model_library() -> None:
    modules = loaded_modules("import flashbulb_service.app, flashbulb_service.serve")
    assert "fastapi" in modules
    assert not modules & (MODEL_LIBRARIES | {"numpy", "PIL"})


def test_the_worker_imports_no_web_framework() -> None:
    modules = loaded_modules("import flashbulb_service.worker, flashbulb_service.backends.onnx")
    assert "onnxruntime" in modules
    assert not modules & {"fastapi", "starlette", "uvicorn", "torch"}


PLUGIN = """
from importlib.metadata import EntryPoint
from flashbulb_service import cli
sys.path.insert(0, {folder!r})
cli._add_plugin(EntryPoint("toy", "toy_plugin:app", cli.COMMAND_GROUP))
sys.exit(cli.run({arguments!r}))
"""


def run_plugin(folder: Path, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "toy_plugin.py").write_text(source)
    program = "import sys\n" + PLUGIN.format(folder=str(folder), arguments=["toy", *arguments])
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )


TOY = """
import typer
app = typer.Typer()

@app.command()
def add(a: int, b: int = typer.Option(0)):
    print(a + b)

@app.command()
def fail():
    raise typer.Exit(3)

@app.command()
def broken():
    raise ValueError("expected better,\\ngot worse")
"""


def test_a_plugin_gets_its_arguments_and_gives_its_exit_code(tmp_path: Path) -> None:
    done = run_plugin(tmp_path, TOY, "add", "2", "--b", "3")
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr
    assert run_plugin(tmp_path, TOY, "fail").returncode == 3
    assert "add" in run_plugin(tmp_path, TOY, "--help").stdout
    check_refused(run_plugin(tmp_path, TOY, "add", "two"), 2, "'a'", "integer")
    check_refused(run_plugin(tmp_path, TOY, "broken"), 1, "expected better, got worse")


def test_a_plugin_whose_package_is_missing_says_how_to_get_it(tmp_path: Path) -> None:
    done = run_plugin(tmp_path, "import torch_that_is_not_installed", "run")
    check_refused(done, 1, "torch_that_is_not_installed", "pip install 'flashbulb[toy]'")


def test_models_load_unload_alias_keep_their_word_in_the_data_folder(
    models_dir: Path, tmp_path: Path
) -> None:
    make_tiny_bundle(models_dir, version=2)
    where = ("--models", models_dir, "--data", tmp_path / "data")
    assert run_flashbulb("models", "unload", "tiny", *where).stdout == "tiny@2\tunloaded\n"
    assert run_flashbulb("models", "alias", "dall-e-3", "tiny@1", *where).stdout == "dall-e-3\ttiny@1\n"
    check_refused(run_flashbulb("models", "alias", "tiny", "tiny@1", *where), 2, "'tiny'")
    assert run_flashbulb("models", "alias", "dall-e-3", "--remove", *where).stdout == ""
    assert run_flashbulb("models", "load", "tiny@2", *where).stdout == "tiny@2\tserved\n"
