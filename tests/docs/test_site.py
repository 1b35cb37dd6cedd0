"""The documentation as a site: it builds strictly, and a planted fault stops it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is not installed")

ROOT = Path(__file__).resolve().parents[2]


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a checkout strictly."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of what the site is made of."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from site_hooks import BESIDE
    finally:
        sys.path.pop(0)
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / "docs", copy / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", *BESIDE):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


def test_site_builds_strictly_and_holds_what_lies_beside_the_code(tmp_path: Path) -> None:
    built = build(ROOT, tmp_path / "site")
    assert built.returncode == 0, built.stderr
    deploy = (tmp_path / "site" / "repository" / "deploy" / "index.html").read_text(encoding="utf-8")
    assert 'href="../../runbooks/"' in deploy


def test_site_asks_nobody_else_for_anything(tmp_path: Path) -> None:
    assert build(ROOT, tmp_path / "site").returncode == 0
    page = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    for tag in ("<script src=", '<link rel="stylesheet" href='):
        for part in page.split(tag)[1:]:
            assert not part.lstrip('"').startswith(("http:", "https:", "//")), part[:80]


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        ("[gone](nowhere.md)", "nowhere.md"),
        ("[gone](http-api.md#nowhere)", "#nowhere"),
    ],
)
def test_a_planted_dead_link_stops_the_build(
    checkout: Path, tmp_path: Path, planted: str, complaint: str
) -> None:
    page = checkout / "docs" / "quick-start.md"
    page.write_text(page.read_text(encoding="utf-8") + f"\n{planted}\n", encoding="utf-8")
    built = build(checkout, tmp_path / "site")
    assert built.returncode != 0
    assert complaint in built.stderr


def test_a_planted_page_that_is_in_no_menu_stops_the_build(checkout: Path, tmp_path: Path) -> None:
    (checkout / "docs" / "forgotten.md").write_text("# Forgotten\n", encoding="utf-8")
    built = build(checkout, tmp_path / "site")
    assert built.returncode != 0
    assert "forgotten.md" in built.stderr
