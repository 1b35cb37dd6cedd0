"""Batch invariance over random mixes on the real student, calibration files, and what determinism asks for."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashbulb_distill.bundle import Bundle, open_bundle
from flashbulb_service import calibration
from flashbulb_service.backends import Embeddings, ImageRequest, OnStep, Student
from flashbulb_service.backends.embeddings import EmbeddingCache
from flashbulb_service.backends.onnx import OnnxBackend
from flashbulb_service.calibration import (
    Calibration,
    Verdict,
    batch_sizes,
    calibrate,
    judge,
    load_student,
    place,
    read_calibration,
    write_calibration,
)
from flashbulb_service.settings import Settings

EMOJI = Path(__file__).resolve().parents[3] / "models" / "emoji" / "1"


@pytest.fixture(scope="module")
def emoji() -> OnnxBackend:
    backend = OnnxBackend(threads=2, cache=EmbeddingCache(0))
    backend.load(open_bundle(EMOJI))
    return backend


ROWS = st.tuples(
    st.sampled_from(["red apple", "dog", "", "a 🚀 at night", "x" * 300]), st.integers(0, 2**63 - 1)
)


@settings(max_examples=15)
@given(rows=st.lists(ROWS, min_size=1, max_size=16), data=st.data())
def test_a_picture_of_the_real_student_has_the_same_bytes_in_any_mix(
    emoji: OnnxBackend, rows: list[tuple[str, int]], data: st.DataObject
) -> None:
    batch = [ImageRequest(prompt, seed, index, 64, 64) for index, (prompt, seed) in enumerate(rows)]
    place = data.draw(st.integers(0, len(batch) - 1))
    alone = Student(emoji).generate([batch[place]])[0]
    assert Student(emoji).generate(batch)[place].tobytes() == alone.tobytes()


class Leaky(OnnxBackend):
    """Kernels that change with the batch size, as they do on some devices."""

    by_position = False

    def denoise(
        self, requests: Sequence[ImageRequest], embeddings: Embeddings, on_step: OnStep | None = None
    ) -> np.ndarray:
        latents = super().denoise(requests, embeddings, on_step)
        rows = np.arange(len(latents), dtype=np.float32) if self.by_position else np.float32(0)
        return latents + (len(latents) + rows).reshape(-1, 1, 1, 1) / 10


@pytest.mark.parametrize("by_position", [False, True])
def test_calibrate_finds_out_what_a_batch_changes(bundle: Bundle, by_position: bool) -> None:
    where = place(bundle, "onnx", 1)
    honest, leaky = OnnxBackend(threads=1), Leaky(threads=1)
    leaky.by_position = by_position
    for backend in (honest, leaky):
        backend.load(bundle)
    found = calibrate(honest, bundle, where, max_batch=64, rounds=1)
    assert found.batch_invariant
    assert tuple(found.times_ms) == (1, 2, 4, 8)
    assert all(ms > 0 for ms in found.times_ms.values())
    found = calibrate(leaky, bundle, where, max_batch=64, rounds=1)
    assert not found.batch_invariant
    assert found.canonical == 1 or not by_position
    batch = [ImageRequest("dog", seed, 0, 64, 64) for seed in range(3)]
    strict = Student(leaky, Verdict.of(found, 8).canonical)
    together = strict.generate(batch)
    for request, picture in zip(batch, together, strict=True):
        assert strict.generate([request])[0].tobytes() == picture.tobytes()


def test_a_calibration_is_read_back_only_where_it_was_made(tmp_path: Path, bundle: Bundle) -> None:
    where = place(bundle, "onnx", 1)
    found = Calibration(where=where, times_ms={1: 2.5}, batch_invariant=True, canonical=1, num_mixes=3)
    assert read_calibration(tmp_path, where) is None
    file = write_calibration(tmp_path, found)
    assert read_calibration(tmp_path, where) == found
    assert read_calibration(tmp_path, where | {"threads": 2}) is None
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    file.write_text(file.read_text()[:20])
    assert read_calibration(tmp_path, where) is None


def test_batch_sizes_are_powers_of_two_and_the_largest() -> None:
    assert batch_sizes(1) == (1,)
    assert batch_sizes(6) == (1, 2, 4, 6)
    assert batch_sizes(8) == (1, 2, 4, 8)


@pytest.mark.parametrize(("by_position", "canonical"), [(False, 8), (True, 1)])
def test_a_verdict_is_tried_on_this_machine(bundle: Bundle, by_position: bool, canonical: int) -> None:
    honest, leaky = OnnxBackend(threads=1), Leaky(threads=1)
    leaky.by_position = by_position
    for backend in (honest, leaky):
        backend.load(bundle)
    assert judge(honest, bundle, {}, 8).canonical is None
    assert judge(leaky, bundle, {}, 8).canonical == canonical
    late = iter(range(0, 10**6, 100))  # seconds: too slow to be tried in time
    assert judge(honest, bundle, {}, 8, clock=lambda: float(next(late))).canonical == 1


def test_the_exporter_s_verdict_is_not_taken_for_this_machine_s(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle that says it is invariant, on a machine where it is not: strict pads, and remembers that."""
    manifest = bundle.manifest.model_copy(update={"batch_invariant": {"onnx": True}})
    claimed = replace(bundle, manifest=manifest)
    monkeypatch.setattr(calibration, "create_backend", lambda *_, **__: Leaky(threads=1))
    strict = Settings(data=tmp_path, threads=1)
    assert load_student(claimed, strict).student.canonical == 8
    assert load_student(claimed, strict.model_copy(update={"determinism": "fast"})).student.canonical is None
    monkeypatch.setattr(calibration, "is_invariant", lambda *_, **__: pytest.fail("tried a second time"))
    assert load_student(claimed, strict).student.canonical == 8
    here = Calibration(
        where=place(claimed, "onnx", 1), times_ms={1: 1.0}, batch_invariant=False, canonical=4, num_mixes=1
    )
    write_calibration(tmp_path, here)  # measured by the operator: it counts before the trial
    assert load_student(claimed, strict).student.canonical == 1  # its knee is one row
