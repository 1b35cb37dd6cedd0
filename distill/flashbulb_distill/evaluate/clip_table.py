"""Clip evaluations side by side: the student as a share of its teacher, a table, and a contact sheet."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .clips import FRAME_STRIDE, ClipEvaluation, Clips, Share
from .errors import EvaluationError


def clip_shares(student: ClipEvaluation, teacher: ClipEvaluation) -> dict[str, float]:
    """Return the student's figures as shares of the teacher's, over trained and held-out pairs alike.

    Raises:
        EvaluationError: the two were not measured alike.
    """
    if (student.reference_sha256, student.seeds) != (teacher.reference_sha256, teacher.seeds):
        raise EvaluationError(
            "student and teacher were measured on other clips or seeds: evaluate both alike"
        )
    shares = {}
    for name in ("motion_correct", "subject_correct"):
        ours, theirs = (
            (getattr(result.trained, name).value + getattr(result.held_out, name).value) / 2
            for result in (student, teacher)
        )
        shares[name] = ours / max(theirs, 1e-9)
    return shares


_ROWS = (
    ("Motion as asked", "motion_correct"),
    ("Subject as asked", "subject_correct"),
    ("Both", "both_correct"),
    ("Amplitude of the motion, 1 is exact", "amplitude"),
    ("Nothing moves", "still"),
    ("Jerk, sides", "jerk"),
    ("Frames alike, cosine", "consistency"),
    ("Diversity over seeds", "diversity"),
    ("Frechet distance of clips", "frechet"),
)


def clip_table(results: Mapping[str, ClipEvaluation]) -> str:
    """Return a Markdown table: each model on trained and on held-out pairs, beside the real clips."""
    columns = {
        f"{name}, {split}": figures
        for name, result in results.items()
        for split, figures in (("trained", result.trained), ("held out", result.held_out))
    }
    first = next(iter(results.values()))
    columns["real clips"] = first.real
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for title, field in _ROWS:
        lines.append("| " + " | ".join([title, *(_cell(getattr(c, field)) for c in columns.values())]) + " |")
    settings = (
        f"{first.trained.clips} clips of trained pairs, {first.held_out.clips} of held-out pairs, "
        f"{len(first.seeds)} seeds each; features {first.embedding} of every second frame; 95 % intervals over prompts."
    )
    return "\n".join([*lines, "", settings, ""])


def _cell(figure: Share | float | None) -> str:
    if figure is None:
        return "–"
    if isinstance(figure, Share):
        return f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"
    return f"{figure:.3f}"


def save_clip_sheet(
    path: Path, rows: Sequence[tuple[str, Clips]], prompts: Sequence[str], scale: int = 2
) -> None:
    """Write a picture: for each prompt one line of every second frame of each model's clip, side by side.

    Args:
        rows: (model, its clips uint8 [prompts, frames, h, w, 3]).
    """
    font, gap, label = ImageFont.load_default(13), 10, 190
    strips = [[np.concatenate(list(clip[::FRAME_STRIDE]), axis=1) for clip in clips] for _, clips in rows]
    height, width = strips[0][0].shape[0] * scale, strips[0][0].shape[1] * scale
    canvas = Image.new(
        "RGB", (label + len(rows) * (width + gap), 24 + len(prompts) * (height + 2)), "#ffffff"
    )
    draw = ImageDraw.Draw(canvas)
    for column, (name, _) in enumerate(rows):
        draw.text((label + column * (width + gap), 4), name, fill="#222222", font=font)
    for line, prompt in enumerate(prompts):
        top = 24 + line * (height + 2)
        draw.text((6, top + height // 2 - 8), prompt, fill="#222222", font=font)
        for column, clips in enumerate(strips):
            strip = Image.fromarray(clips[line]).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(strip, (label + column * (width + gap), top))
    canvas.save(path, format="PNG", optimize=True)
