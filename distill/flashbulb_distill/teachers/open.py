"""Open the teacher that a recipe names."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..bundle import Shape
from ..errors import UsageError
from .emoji import load_emoji_teacher
from .emoji_motion import load_motion_teacher
from .load import open_source
from .pretrained import PretrainedTeacher
from .teacher import Teacher

_DEMOS: dict[str, Callable[..., Teacher]] = {"emoji": load_emoji_teacher, "emoji-motion": load_motion_teacher}


def open_teacher(
    family: str,
    place: str,
    *,
    shape: Shape | None = None,
    bf16: bool = False,
    variant: str | None = None,
    revision: str | None = None,
    loras: Sequence[str] = (),
    device: torch.device | None = None,
    embeddings: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Teacher:
    """Open a teacher, frozen, on a device: a folder, or the hub id of a pipeline.

    Args:
        shape: what is drawn; the demo families have one size each.
        bf16: compute in bfloat16.
        variant, revision: of a pipeline's files.
        loras: files of LoRA weights that are part of the teacher.
        embeddings: where embeddings of prompts are kept.   progress: of encoding them, rows done and in all.
    Raises:
        FileNotFoundError: there is no such teacher.
        UsageError: it is of another family.
    """
    if family in _DEMOS:
        return _DEMOS[family](Path(place), bf16=bf16, device=device)
    source = open_source(place, bf16=bf16, variant=variant, revision=revision)
    if source.family != family:
        raise UsageError(f"family: expected {source.family}, which {place} holds, got {family}")
    if shape is None:
        raise UsageError(f"shape: expected the size to distil {family} at, got none")
    source = replace(source, loras=tuple(Path(lora) for lora in loras))
    if bf16:
        source = replace(source, dtype=torch.bfloat16, bf16=False)
    return PretrainedTeacher(source, shape, device or torch.device("cpu"), embeddings, progress)
