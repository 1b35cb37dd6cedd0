"""The README's figures are those of the files that it names."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_readme_names_where_its_table_comes_from(who: str) -> None:
    provenance = json.loads((ROOT / "docs" / "evaluation" / f"{who}.json").read_text(encoding="utf-8"))[
        "provenance"
    ]
    assert f"`{provenance['commit'].removesuffix('-dirty')}`" in README
    command = provenance["command"].partition(" --resume")[0]
    assert command in README.replace(".venv/bin/", "")


def test_readmes_table_is_of_the_evaluation() -> None:
    written = (ROOT / "docs" / "evaluation" / "table.md").read_text(encoding="utf-8").splitlines()
    shown = README[README.index("|  | student | teacher |") :].split("\n\n")[0].splitlines()
    assert len(shown) > 8
    assert not set(shown) - set(written)
