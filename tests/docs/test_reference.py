"""What users meet is documented: the pages are made from the code, and what has no description is refused."""

import json
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import typer
from pydantic import BaseModel, Field

from flashbulb_service.cli import PLUGIN_HELP, app
from flashbulb_service.errors import ServiceError
from flashbulb_service.observability import Metrics
from flashbulb_service.settings import Settings
from flashbulb_service.worker_metrics import WorkerMetrics

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_reference_pages_are_what_the_code_says(reference: ModuleType) -> None:
    for name, text in reference.pages().items():
        written = (DOCS / "reference" / name).read_text(encoding="utf-8")
        assert written == text, f"docs/reference/{name} is stale: run python docs/reference.py"


def told(command: typer.core.TyperGroup) -> str:
    """Return what --help prints, its lines joined."""
    context = typer.Context(command, info_name="flashbulb", max_content_width=200)
    return " ".join(command.get_help(context).split())


def test_help_on_a_terminal_tells_what_the_reference_tells(reference: ModuleType) -> None:
    """As markup, which typer reads into it by default, a default such as "[auto]" is a tag and vanishes."""
    root = reference._with_plugins(typer.main.get_command(app))
    for path, command in reference._commands(root, ("flashbulb",)):
        text = told(command)
        for parameter in command.params:
            if not getattr(parameter, "hidden", False):
                assert " ".join((parameter.help or "").split()) in text, (path, parameter.name)
    for name, text in PLUGIN_HELP.items():
        assert root.commands[name].help.startswith(text), name


def test_a_planted_setting_changes_the_page(reference: ModuleType) -> None:
    class Planted(Settings):
        unicorns: int = Field(default=3, description="how many")

    page = reference.settings_page(Planted.model_fields)
    assert "| `FLASHBULB_UNICORNS` | `3` | how many |" in page
    assert page != (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")


def test_a_planted_setting_without_a_description_is_refused(reference: ModuleType) -> None:
    class Planted(Settings):
        unicorns: int = 3

    with pytest.raises(reference.Undescribed, match="the setting unicorns"):
        reference.settings_page(Planted.model_fields)


def test_a_planted_option_without_a_description_is_refused(reference: ModuleType) -> None:
    app = typer.Typer()

    @app.command()
    def planted(unicorns: int = 3) -> None:
        """Do nothing."""

    with pytest.raises(reference.Undescribed, match="--unicorns"):
        reference.commands_page(typer.main.get_command(app))


def test_a_planted_error_without_a_description_is_refused(reference: ModuleType) -> None:
    planted = type("Planted", (ServiceError,), {"code": "unicorn", "__doc__": ""})
    with pytest.raises(reference.Undescribed, match="the error Planted"):
        reference.errors_page(iter([planted]))
    del planted


def test_a_planted_field_of_a_record_without_a_description_is_refused(reference: ModuleType) -> None:
    class Planted(BaseModel):
        """A record."""

        unicorns: int

    with pytest.raises(reference.Undescribed, match="the field unicorns"):
        reference.manifest_page(Planted)


def undocumented(names: set[str]) -> set[str]:
    """Return the metrics that the page about them does not name."""
    page = (DOCS / "observability.md").read_text(encoding="utf-8")
    return {name for name in names if f"`{name}`" not in page}


def test_every_metric_is_documented() -> None:
    assert undocumented(Metrics().names | WorkerMetrics().names) == set()


def test_a_planted_metric_is_found_undocumented() -> None:
    assert undocumented({"flashbulb_unicorns_total"}) == {"flashbulb_unicorns_total"}


def test_every_benchmark_that_a_page_names_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of results named one by the file of its result, and that command only printed its help."""
    monkeypatch.syspath_prepend(str(DOCS.parent))
    known = import_module("benchmarks.__main__").BENCHMARKS
    pages = [DOCS.parent / "README.md", *DOCS.rglob("*.md")]
    named = {
        name
        for page in pages
        for name in re.findall(r"python -m benchmarks ([a-z]\w*)", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 10 and named <= set(known), named - set(known)


def test_curves_are_drawn_of_every_figure_and_a_run_without_any_is_refused(
    reference: ModuleType, tmp_path: Path
) -> None:
    curves = import_module("curves")
    (tmp_path / "adm").mkdir()
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        curves.read_curves(tmp_path)
    rows = [{"stage": "adm", "step": step, "seconds": 1.0, "loss": 3.0 - step} for step in (1, 2)]
    (tmp_path / "adm" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = curves.read_curves(tmp_path)
    assert told == {"adm": {"loss": [(1, 2.0), (2, 1.0)]}}
    points = re.search(r'polyline points="([^"]+)"', curves.draw(told))
    assert points is not None
    (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in points[1].split())
    assert x1 < x2 and y1 < y2  # down a page is down in value
