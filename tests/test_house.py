"""Promises of the repository as a whole: names, versions, pins, documents, what a process loads."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
CODE_FOLDERS = ("service", "distill", "kernels")
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DOCUMENTS = sorted(
    {
        path
        for pattern in ("*.md", "docs/**/*.md", "[a-z]*/README.md", "examples/*/README.md")
        for path in ROOT.glob(pattern)
    }
)


def run_python(code: str) -> str:
    """Run code in a fresh interpreter with the repository's root on its path; return its output."""
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def modules_after(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after one import statement."""
    return set(json.loads(run_python(f"import json, sys; {statement}; print(json.dumps([*sys.modules]))")))


def constraints() -> dict[str, str]:
    """Return the pinned version of every package of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins), "expected name==version on every line"
    names = [canonicalize_name(name) for name, _ in pins]
    assert sorted(set(names)) == sorted(names), "a package is pinned twice"
    return dict(zip(names, (version for _, version in pins), strict=True))


def requirements() -> list[Requirement]:
    """Return every requirement that pyproject.toml names, extras included."""
    project = PYPROJECT["project"]
    listed = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        listed.extend(extra)
    return [Requirement(line) for line in listed]


# ------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("folder", CODE_FOLDERS)
def test_code_folder_is_no_import_package(folder: str) -> None:
    """Hugging Face publishes a package `kernels`; a folder of ours must never answer in its place."""
    assert not (ROOT / folder / "__init__.py").exists()
    found = run_python(
        "from importlib.util import find_spec\n"
        f"spec = find_spec({folder!r})\n"
        f"print(spec is not None and spec.origin is not None and spec.origin.startswith({str(ROOT)!r}))"
    )
    assert found == "False"


@pytest.mark.timeout(180)
def test_transformers_does_not_take_our_folder_for_the_hub_package() -> None:
    """With the root on the path, a wrong answer here breaks the import of transformers' models."""
    pytest.importorskip("transformers", reason="the extra `distill` is not installed")
    told = run_python(
        "from transformers.utils import is_kernels_available\n"
        "from transformers import BertModel\n"
        "print(is_kernels_available())"
    )
    assert told == "False"


def test_every_file_of_a_package_is_installed_with_it() -> None:
    """A Lua script or a page that no package-data pattern names is missing from a wheel, and only there."""
    patterns: dict[str, list[str]] = PYPROJECT["tool"]["setuptools"]["package-data"]
    forgotten = []
    for folder in CODE_FOLDERS:
        for package in (ROOT / folder).glob("flashbulb_*"):
            shipped = {
                path for p in patterns.get(package.name, []) + patterns["*"] for path in package.glob(p)
            }
            forgotten += [
                path.relative_to(ROOT)
                for path in package.rglob("*")
                if path.is_file() and path.suffix not in {".py", ".pyc"} and path not in shipped
            ]
    assert forgotten == []


# ---------------------------------------------------------------------------------------------- versions


def test_version_has_one_source() -> None:
    """pyproject.toml says it; everything else asks the installed metadata."""
    assert metadata.version("flashbulb") == PYPROJECT["project"]["version"]
    assignment = re.compile(r"^__version__\s*=\s*[\"']", re.MULTILINE)
    sources = [path for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in sources if assignment.search(path.read_text(encoding="utf-8"))] == []


def test_every_requirement_is_pinned_within_its_range() -> None:
    pins = constraints()
    for requirement in requirements():
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name}: expected a pin in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement}: constraints.txt pins {version}"


def test_every_pin_installs_on_the_oldest_python() -> None:
    """Debian 12 has Python 3.11.2: a package that asks for 3.11.5 cannot be installed there."""
    oldest = PYPROJECT["project"]["requires-python"].removeprefix(">=") + ".0"
    refused = []
    for name, version in constraints().items():
        with contextlib.suppress(metadata.PackageNotFoundError):  # of another system or another extra
            found = metadata.metadata(name)
            asked = found["Requires-Python"] or ""
            if found["Version"].partition("+")[0] == version and not SpecifierSet(asked).contains(oldest):
                refused.append(f"{name}=={version} asks for Python {asked}")
    assert refused == []


def test_pins_carry_no_local_suffix() -> None:
    """torch==2.13.0 accepts the CPU build and the CUDA build; with +cpu it would accept one index only."""
    assert [f"{name}=={version}" for name, version in constraints().items() if "+" in version] == []


def test_torch_is_pinned_in_one_place() -> None:
    """A second pin would drift, and torch at another version is a CUDA build of several GB."""
    assert "torch" in constraints()
    for name in ("Makefile", ".ci/run", "pyproject.toml", "Dockerfile"):
        path = ROOT / name
        if path.exists():
            assert "torch==" not in path.read_text(encoding="utf-8"), name


def test_base_install_has_no_torch() -> None:
    base = {canonicalize_name(Requirement(line).name) for line in PYPROJECT["project"]["dependencies"]}
    assert base.isdisjoint({"torch", "transformers", "diffusers", "accelerate", "triton", "onnx"})


# --------------------------------------------------------------------------------------------- processes
# import-linter reads import statements; these two see what a running process really holds.


def test_api_process_loads_no_model_library() -> None:
    loaded = modules_after("import flashbulb_service.app")
    assert "fastapi" in loaded
    assert loaded.isdisjoint({"torch", "onnxruntime", "diffusers", "transformers", "triton"})


def test_worker_process_loads_neither_the_web_framework_nor_torch() -> None:
    loaded = modules_after("import flashbulb_service.worker")
    assert loaded.isdisjoint({"fastapi", "starlette", "uvicorn", "torch", "diffusers", "transformers"})


# ------------------------------------------------------------------------------------------ one way to check


def test_check_runs_the_same_tests_as_make_test() -> None:
    """What CI runs and what the README tells a newcomer to run must not part."""
    environment = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MFLAGS"}}

    def commands(target: str) -> list[str]:
        answer = subprocess.run(
            ["make", "-n", target], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return [line for line in answer.stdout.splitlines() if "pytest" in line]

    assert len(commands("test")) == 1
    assert commands("check") == commands("test")
    assert "make check" in (ROOT / ".ci/run").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r"<img[^>]*\ssrc=\"([^\"]+)\"", text)
    missing = [t for t in targets if "://" not in t and not (document.parent / t).exists()]
    assert missing == []


def test_every_decision_record_is_in_the_index() -> None:
    index = (ROOT / "docs/adr/README.md").read_text(encoding="utf-8")
    records = [path.name for path in (ROOT / "docs/adr").glob("[0-9]*.md")]
    assert records
    assert [name for name in records if f"]({name})" not in index] == []
