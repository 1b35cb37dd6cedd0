"""The real pictures an evaluation compares with: a folder of one tensor file and one list of labels.

    reference.safetensors   images: uint8 [n, h, w, 3]
    reference.json          [{"concept": "red apple", "style": "noto", "split": "train"}, ...], n entries

A held-out picture is a (concept, style) pair that training never saw; it saw the concept in other styles.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from flashbulb_distill.evaluate.errors import ReferenceDataError
from flashbulb_distill.evaluate.features import Images
from flashbulb_distill.evaluate.metrics import Bools, Strings


class Label(BaseModel):
    """What one real picture shows, in which style, and whether training saw it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    concept: str
    style: str
    split: Literal["train", "held-out"]


@dataclass(frozen=True)
class Reference:
    """Real pictures uint8 [n, h, w, 3] with their n labels."""

    images: Images
    labels: tuple[Label, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[-1] != 3:
            raise ReferenceDataError(
                f"expected pictures uint8 [n, h, w, 3], got {self.images.dtype} {list(self.images.shape)}"
            )
        if len(self.images) != len(self.labels) or not self.labels:
            raise ReferenceDataError(
                f"expected a label per picture, got {len(self.images)} and {len(self.labels)}"
            )
        pairs = [(label.concept, label.style) for label in self.labels]
        if len(set(pairs)) != len(pairs):
            twice = next(pair for pair in pairs if pairs.count(pair) > 1)
            raise ReferenceDataError(
                f"expected one picture of each concept and style, got several of {twice}"
            )

    @cached_property
    def concepts(self) -> Strings:
        """The concept of each picture [n]."""
        return np.array([label.concept for label in self.labels])

    @cached_property
    def styles(self) -> Strings:
        """The style of each picture [n]."""
        return np.array([label.style for label in self.labels])

    @cached_property
    def trained(self) -> Bools:
        """Whether each picture was there to train on: bool [n]."""
        return np.array([label.split == "train" for label in self.labels])

    @cached_property
    def sha256(self) -> str:
        """The hash of the pictures and labels, to name exactly what was compared with."""
        labels = json.dumps([label.model_dump() for label in self.labels])
        return hashlib.sha256(np.ascontiguousarray(self.images).tobytes() + labels.encode()).hexdigest()


def load_reference(folder: Path) -> Reference:
    """Load the real pictures of a folder.

    Raises ReferenceDataError when a file is missing, damaged, or does not fit the other.
    """
    tensors, labels = Path(folder) / "reference.safetensors", Path(folder) / "reference.json"
    try:
        images = load_file(tensors)["images"]
        parsed = TypeAdapter(tuple[Label, ...]).validate_json(labels.read_bytes())
    except OSError as error:
        raise ReferenceDataError(
            f"expected the real pictures as {tensors.name} and {labels.name} in {folder}"
        ) from error
    except (SafetensorError, KeyError) as error:
        raise ReferenceDataError(f"{tensors}: expected a tensor 'images', got {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise ReferenceDataError(f"{labels}: {where}: {first['msg']}") from error
    return Reference(images, parsed)
