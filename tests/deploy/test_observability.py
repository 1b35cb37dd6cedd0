"""Alerts and dashboard against the metrics that the code declares."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from flashbulb_service.observability import Metrics
from flashbulb_service.worker_metrics import WorkerMetrics

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD: dict[str, Any] = json.loads(
    (ROOT / "deploy/grafana/dashboards/flashbulb.json").read_text(encoding="utf-8")
)
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]


def used(expression: str) -> set[str]:
    """Return the metrics of ours that an expression reads, without the suffixes of histograms."""
    names = re.findall(r"\bflashbulb_[a-z_]+", expression)
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def declared() -> set[str]:
    """Return the metrics that the code declares."""
    return Metrics().names | WorkerMetrics().names


def expressions() -> list[tuple[str, str]]:
    """Return (where, expression) of everything that reads a metric."""
    found = [(rule.get("alert", rule.get("record", "")), rule["expr"]) for rule in RULES]
    for panel in DASHBOARD["panels"]:
        found += [(panel["title"], target["expr"]) for target in panel.get("targets", [])]
    return found


def unknown(pairs: list[tuple[str, str]]) -> dict[str, set[str]]:
    """Return where -> metrics that nobody declares."""
    return {where: used(text) - declared() for where, text in pairs if used(text) - declared()}


def test_everything_that_is_read_is_declared() -> None:
    assert unknown(expressions()) == {}


def test_a_planted_metric_that_nobody_declares_is_found() -> None:
    assert unknown([("planted", "rate(flashbulb_unicorns_total[5m])")]) == {
        "planted": {"flashbulb_unicorns_total"}
    }


def test_recorded_ratios_that_are_read_are_recorded() -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    read = {name for _, text in expressions() for name in re.findall(r"\bflashbulb:[a-z_]+:[0-9a-z]+", text)}
    assert read == recorded


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert all(x < 24 for x, _ in cells)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_has_a_page_and_a_unit_test(alert: dict[str, Any]) -> None:
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^## (\w+)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert anchor in {heading.lower() for heading in headings}
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    expected = [
        case["exp_alerts"]
        for test in tests
        for case in test["alert_rule_test"]
        if case["alertname"] == alert["alert"]
    ]
    assert any(expected), "expected a unit test in which it fires"


def test_the_first_webhook_that_is_given_up_is_a_rise_from_zero() -> None:
    """Its series began with it, and increase() is silent about where a series begins."""
    assert b'flashbulb_webhook_deliveries_total{result="given_up"} 0.0' in Metrics().exposition()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("check", ["check rules alerts.yml", "test rules alerts_test.yml"])
def test_promtool_agrees(check: str) -> None:
    done = subprocess.run(
        ["promtool", *check.split()], cwd=PROMETHEUS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_a_planted_rule_that_never_fires(tmp_path: Path) -> None:
    text = (PROMETHEUS / "alerts.yml").read_text(encoding="utf-8")
    (tmp_path / "alerts.yml").write_text(text.replace("> 60", "> 6000"), encoding="utf-8")
    shutil.copy(PROMETHEUS / "alerts_test.yml", tmp_path)
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "FlashbulbQueueOld" in done.stdout + done.stderr
