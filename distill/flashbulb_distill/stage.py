"""A stage's folder: what it was made from, and whether it is done."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .train.recipe import Recipe, RecipeError

RECORD = "stage.json"


@dataclass(frozen=True)
class StageFolder:
    """A folder with stage.json: the hash of all that the stage is made from, and whether it was finished."""

    path: Path
    identity: str
    recipe: Recipe

    def is_done(self) -> bool:
        """Tell whether the stage is there, whole.

        Raises:
            RecipeError: the folder holds what was made from something else.
        """
        record = self.path / RECORD
        if not record.exists():
            return False
        found = json.loads(record.read_text())
        if found["identity"] != self.identity:
            keys = differing_keys(found.get("recipe", {}), self.recipe.model_dump(mode="json"))
            what = f"a recipe with other {', '.join(keys)}" if keys else "another teacher or other data"
            raise RecipeError(
                f"{self.path}: was made from {what}; choose another --out, or delete this folder and those after it"
            )
        return bool(found["done"])

    def has_begun(self) -> bool:
        """Tell whether the stage was claimed before."""
        return (self.path / RECORD).exists()

    def claim(self) -> None:
        """Say that the stage has begun."""
        self._write(done=False)

    def finish(self) -> None:
        """Say that the stage is done."""
        self._write(done=True)

    def _write(self, *, done: bool) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / ".stage.json.tmp"
        record = {"identity": self.identity, "done": done, "recipe": self.recipe.model_dump(mode="json")}
        temporary.write_text(json.dumps(record) + "\n")
        temporary.replace(self.path / RECORD)


def is_finished(path: Path) -> bool:
    """Tell whether a stage was finished in a folder, whatever it was made from."""
    record = path / RECORD
    return record.exists() and bool(json.loads(record.read_text())["done"])


def differing_keys(old: Mapping[str, object], new: Mapping[str, object], prefix: str = "") -> list[str]:
    """Return the keys, written like adm.steps, in which two recipes differ."""
    keys: list[str] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(prefix + key)
    return keys
