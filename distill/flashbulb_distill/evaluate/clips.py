"""The evaluation of clips: does the asked subject make the asked motion, how sharply, how variously, how steadily?

Motion is read off the pixels (`motion`). A clip's subject is that of the nearest real clip of the same motion, frame by
frame in pixels; the real clips' own score, each with itself left out, is the ceiling. Distances between distributions
are of features of every second frame: their mean beside their spread over the clip.

    train.safetensors, held-out.safetensors    clips: uint8 [pairs, variants, frames, h, w, 3]
    train.json, held-out.json                  [{"subject": "rocket", "motion": "flying up"}, ...], a label a pair
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..bundle import hash_file
from . import metrics
from .errors import EvaluationError, ReferenceDataError
from .features import Embed, Lite0Embed
from .motion import amplitudes, name_motion, track_subject

Clips = NDArray[np.uint8]
Generate = Callable[[list[str], list[int]], Clips]

FRAME_STRIDE = 2
NEIGHBOURS_PER_PAIR = 4  # real clips of a pair that a clip is compared with
REAL_PER_PAIR = 2  # whose features are taken


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClipLabel(_Frozen):
    """What a pair's clips show."""

    subject: str
    motion: str

    @property
    def prompt(self) -> str:
        """The words that ask for it."""
        return f"{self.subject} {self.motion}"


class Share(_Frozen):
    """A mean over clips, with its 95 % interval over prompts."""

    value: float
    low: float
    high: float


class ClipFigures(_Frozen):
    """What one set of clips scored."""

    clips: int
    motion_correct: Share
    subject_correct: Share
    both_correct: Share
    amplitude: float  # of the asked motion; 1 is exact
    still: float  # share in which nothing moves
    jerk: float  # mean change of the subject's step from frame to frame, in sides
    consistency: float  # cosine of neighbouring frames' features
    diversity: float | None  # cosine distance between seeds of a prompt
    frechet: float | None  # to the real clips of the same pairs


class ClipEvaluation(_Frozen):
    """The figures of one model with everything needed to repeat them."""

    trained: ClipFigures
    held_out: ClipFigures
    real: ClipFigures
    seeds: tuple[int, ...]
    reference_sha256: str
    embedding: str
    provenance: dict[str, str]


@dataclass(frozen=True)
class ClipReference:
    """Real clips uint8 [pairs, variants, frames, h, w, 3] and their labels, by split."""

    clips: Mapping[str, Clips]
    labels: Mapping[str, tuple[ClipLabel, ...]]
    sha256: str


SPLITS = ("train", "held-out")


def load_clip_reference(folder: Path) -> ClipReference:
    """Load the real clips that an evaluation compares with.

    Raises:
        ReferenceDataError: a file is missing, or is not what it should be.
    """
    clips: dict[str, Clips] = {}
    labels: dict[str, tuple[ClipLabel, ...]] = {}
    hashes = []
    for split in SPLITS:
        tensors, names = folder / f"{split}.safetensors", folder / f"{split}.json"
        try:
            clips[split] = load_file(tensors)["clips"]
            labels[split] = tuple(TypeAdapter(list[ClipLabel]).validate_json(names.read_bytes()))
        except FileNotFoundError:
            raise ReferenceDataError(
                f"{folder}: expected {tensors.name} and {names.name}, found not both; make them with "
                "python examples/emoji_motion/prepare.py"
            ) from None
        except (SafetensorError, KeyError, ValidationError) as error:
            raise ReferenceDataError(f"{folder}: expected clips and labels of {split}, got {error}") from None
        if clips[split].ndim != 6 or len(clips[split]) != len(labels[split]):
            raise ReferenceDataError(
                f"{folder}: expected [pairs, variants, frames, h, w, 3] and a label a pair, got "
                f"{list(clips[split].shape)} and {len(labels[split])} labels of {split}"
            )
        hashes += [hash_file(tensors), hash_file(names)]
    return ClipReference(clips, labels, hashlib.sha256("\n".join(hashes).encode()).hexdigest())


def evaluate_clips(
    generate: Generate,
    reference: ClipReference,
    seeds: Sequence[int],
    *,
    trained_stride: int = 5,
    num_components: int = 32,
    batch_size: int = 32,
    embed: Embed | None = None,
    provenance: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ClipEvaluation:
    """Draw every held-out pair and every `trained_stride`-th trained one with every seed, and measure the clips.

    Args:
        generate: (prompts, seeds) -> clips uint8 [n, frames, h, w, 3].
    Raises:
        EvaluationError: fewer than two seeds, or clips of another form.
    """
    if len(set(seeds)) < 2:
        raise EvaluationError(f"expected two or more distinct seeds, got {list(seeds)}")
    embed = embed or Lite0Embed()
    sets = {"train": reference.labels["train"][::trained_stride], "held-out": reference.labels["held-out"]}
    total, done = sum(len(labels) for labels in sets.values()) * len(seeds), 0
    measure = _Measure(reference, embed, num_components)
    figures = {}
    for split, labels in sets.items():
        rows = [label for label in labels for _ in seeds]
        drawn = []
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            these = [seeds[(start + place) % len(seeds)] for place in range(len(some))]
            clips = np.asarray(generate([label.prompt for label in some], these))
            if clips.dtype != np.uint8 or clips.ndim != 5 or len(clips) != len(some):
                raise EvaluationError(
                    f"expected {len(some)} clips uint8 [n, frames, h, w, 3], got {clips.dtype} {list(clips.shape)}"
                )
            drawn.append(clips)
            done += len(some)
            progress(done, total)
        figures[split] = measure.figures(np.concatenate(drawn), rows, len(seeds))
    return ClipEvaluation(
        trained=figures["train"],
        held_out=figures["held-out"],
        real=measure.real_figures(),
        seeds=tuple(seeds),
        reference_sha256=reference.sha256,
        embedding=str(getattr(embed, "name", type(embed).__name__)),
        provenance=dict(provenance or {}),
    )


class _Measure:
    """Figures of clips beside the real ones, whose features and neighbours are taken once."""

    def __init__(self, reference: ClipReference, embed: Embed, num_components: int) -> None:
        self.embed = embed
        self.real, self.labels = _flat(reference, NEIGHBOURS_PER_PAIR)
        few, few_labels = _flat(reference, REAL_PER_PAIR)
        self.few, self.few_labels = few, few_labels
        self.features, _ = self._features(few)
        self.project = metrics.fit_projection(self.features, min(num_components, len(few) - 1))

    def figures(self, clips: Clips, rows: Sequence[ClipLabel], num_seeds: int) -> ClipFigures:
        """Measure clips of these labels, a label's seeds one after another."""
        features, consistency = self._features(clips)
        subjects = [self._subject(clip, label) for clip, label in zip(clips, rows, strict=True)]
        pairs = {(label.subject, label.motion) for label in rows}
        same = [(label.subject, label.motion) in pairs for label in self.few_labels]
        frechet = metrics.frechet_distance(self.project(self.features[same]), self.project(features))
        groups = features.reshape(-1, num_seeds, features.shape[1])
        diversity = float(np.mean([metrics.diversity(group) for group in groups]))
        return _figures(clips, rows, subjects, num_seeds, consistency, diversity, frechet)

    def real_figures(self) -> ClipFigures:
        """Measure the real clips, each with itself left out: the ceiling."""
        subjects = [
            self._subject(clip, label, skip=place)
            for place, (clip, label) in enumerate(zip(self.real, self.labels, strict=True))
        ]
        _, consistency = self._features(self.few)
        return _figures(self.real, self.labels, subjects, NEIGHBOURS_PER_PAIR, consistency, None, None)

    def _subject(self, clip: Clips, label: ClipLabel, skip: int | None = None) -> str:
        """Return the subject of the nearest real clip of the label's motion."""
        same = [i for i, other in enumerate(self.labels) if other.motion == label.motion and i != skip]
        gaps = self.real[same].astype(np.float32) - clip.astype(np.float32)
        return self.labels[same[int(np.square(gaps).mean((1, 2, 3, 4)).argmin())]].subject

    def _features(self, clips: Clips) -> tuple[metrics.Floats, float]:
        """Return features [n, 2 d], and the mean cosine between neighbouring frames."""
        some = clips[:, ::FRAME_STRIDE]
        flat = self.embed(np.ascontiguousarray(some.reshape(-1, *some.shape[2:]))).astype(np.float64)
        frames = flat.reshape(*some.shape[:2], -1)
        unit = frames / np.maximum(np.linalg.norm(frames, axis=-1, keepdims=True), 1e-9)
        consistency = float((unit[:, 1:] * unit[:, :-1]).sum(-1).mean())
        return np.concatenate([frames.mean(1), frames.std(1)], axis=1), consistency


def _flat(reference: ClipReference, per_pair: int) -> tuple[Clips, list[ClipLabel]]:
    """Return some real clips of every pair in one array, and a label for each."""
    parts, labels = [], []
    for split in SPLITS:
        some = reference.clips[split][:, :per_pair]
        parts.append(some.reshape(-1, *some.shape[2:]))
        labels += [label for label in reference.labels[split] for _ in range(some.shape[1])]
    return np.concatenate(parts), labels


def _figures(
    clips: Clips,
    rows: Sequence[ClipLabel],
    subjects: Sequence[str],
    per_prompt: int,
    consistency: float,
    diversity: float | None,
    frechet: float | None,
) -> ClipFigures:
    tracks = [track_subject(clip) for clip in clips]
    named = [name_motion(clip) for clip in clips]
    moved = np.array([name == label.motion for name, label in zip(named, rows, strict=True)], dtype=float)
    right = np.array(
        [found == label.subject for found, label in zip(subjects, rows, strict=True)], dtype=float
    )
    asked = [amplitudes(track)[label.motion] for track, label in zip(tracks, rows, strict=True)]
    bends = [np.abs(np.diff(part, n=2)).mean() for track in tracks for part in (track.x, track.y)]
    return ClipFigures(
        clips=len(clips),
        motion_correct=_share(moved, per_prompt),
        subject_correct=_share(right, per_prompt),
        both_correct=_share(moved * right, per_prompt),
        amplitude=float(np.mean(asked)),
        still=float(np.mean([name is None for name in named])),
        jerk=float(np.mean(bends)),
        consistency=consistency,
        diversity=diversity,
        frechet=frechet,
    )


def _share(hits: metrics.Floats, per_prompt: int) -> Share:
    means = hits.reshape(-1, per_prompt).mean(1)
    if np.ptp(means) == 0:  # a bootstrap of equal values knows no doubt
        low, high = metrics.wilson_interval(float(means.sum()), len(means))
    else:
        low, high = metrics.bootstrap_interval(means)
    return Share(value=float(means.mean()), low=low, high=high)
