"""What appears in and disappears from a model repository while a worker runs."""

import logging
from collections.abc import Iterable
from pathlib import Path

from flashbulb_distill.bundle import BundleError, Fingerprint, fingerprint, list_models
from flashbulb_service.catalog import Model, open_model
from flashbulb_service.errors import BundleRejected

log = logging.getLogger(__name__)


class Repository:
    """Scans a folder of bundles; a bundle is verified once, and refused once."""

    def __init__(self, folder: Path, known: Iterable[Model]) -> None:
        """Take the models that are served already."""
        self._folder = folder
        self._seen: dict[str, Fingerprint | None] = {model.id: model.bundle.verified for model in known}

    def scan(self) -> tuple[list[Model], set[str]]:
        """Look once; blocks while new bundles are verified.

        Returns:
            models that are new or replaced, and the ids of those that are gone. A folder whose files changed
            is judged again: it may have been copied in only by half; so is one that could not be read.
        """
        found = {
            f"{name}@{version}": (name, version, path) for name, version, path in list_models(self._folder)
        }
        gone = set(self._seen) - set(found)
        for model_id in gone:
            del self._seen[model_id]
        new = []
        for model_id, (name, version, path) in found.items():
            try:
                seen = fingerprint(path)
                if self._seen.get(model_id) == seen:
                    continue
                new.append(open_model(path, name, version, verify=True))
            except (BundleRejected, BundleError) as error:
                log.error("model %s refused, the others go on: %s", model_id, error)
            except OSError as error:
                log.warning("model %s cannot be read now, the others go on: %s", model_id, error)
                continue
            self._seen[model_id] = seen
        return new, gone
