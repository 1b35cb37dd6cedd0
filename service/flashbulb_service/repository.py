"""What appears in and disappears from a model repository while a worker runs."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from flashbulb_distill.bundle import BundleError, list_models
from flashbulb_service.catalog import Model, open_model
from flashbulb_service.errors import BundleRejected
from flashbulb_service.pipeline import LoadedModel

log = logging.getLogger(__name__)

Fingerprint = tuple[tuple[str, int, int], ...]


class Repository:
    """Scans a folder of bundles; a bundle is verified, loaded and warmed up once, and refused once."""

    def __init__(self, folder: Path, load: Callable[[Model], LoadedModel], known: Iterable[Model]) -> None:
        """Take the models that are loaded already."""
        self._folder = folder
        self._load = load
        self._seen = {model.id: _fingerprint(model.bundle.path) for model in known}

    def scan(self) -> tuple[list[LoadedModel], set[str]]:
        """Look once; blocks while new models load.

        Returns:
            models that are ready now, and the ids of those that are gone. A folder whose files changed
            is judged again: it may have been copied in only by half.
        """
        found = {
            f"{name}@{version}": (name, version, path) for name, version, path in list_models(self._folder)
        }
        gone = set(self._seen) - set(found)
        for model_id in gone:
            del self._seen[model_id]
        ready = []
        for model_id, (name, version, path) in found.items():
            fingerprint = _fingerprint(path)
            if self._seen.get(model_id) == fingerprint:
                continue
            self._seen[model_id] = fingerprint
            try:
                ready.append(self._load(open_model(path, name, version, verify=True)))
            except (BundleRejected, BundleError) as error:
                log.error("model %s refused, the others go on: %s", model_id, error)
            except Exception as error:  # noqa: BLE001  whatever a runtime raises at load belongs to that model
                log.error("model %s cannot be loaded, the others go on: %s", model_id, error)
        return ready, gone


def _fingerprint(folder: Path) -> Fingerprint:
    entries = []
    for file in sorted(folder.rglob("*")):
        try:
            stat = file.stat()
        except FileNotFoundError:  # being removed
            continue
        entries.append((file.name, stat.st_size, stat.st_mtime_ns))
    return tuple(entries)
