"""The onnxruntime backend against onnx's own reference evaluator, and its promise about seeds."""

import mmap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from flashbulb_distill.bundle import Bundle, Text, describe_files, open_bundle, write_manifest
from flashbulb_distill.core.noise import draw_noise
from flashbulb_service.backends import ImageRequest, Student, create_backend
from flashbulb_service.backends.embeddings import EmbeddingCache
from flashbulb_service.backends.onnx import OnnxBackend
from flashbulb_service.images import to_uint8
from support.tiny_bundle import WORDS, make_tiny_bundle


def request(prompt: str = "red apple", seed: int = 7, index: int = 0, side: int = 64) -> ImageRequest:
    return ImageRequest(prompt, seed, index, side, side)


def test_picture_equals_the_reference_evaluator_s(bundle: Bundle, onnx: OnnxBackend) -> None:
    """One step from t = 1 with x0 prediction: pixels = decoder(denoiser(noise, 1000, text))."""
    ids = np.zeros((1, 14), dtype=np.int64)
    ids[0, :2] = [WORDS.index("red") + 2, WORDS.index("apple") + 2]
    mask = (ids > 0).astype(np.int64)
    parts = {
        name: ReferenceEvaluator(str(bundle.path / f"{name}.onnx"))
        for name in ("text_encoder", "denoiser", "decoder")
    }
    embeds, pooled = parts["text_encoder"].run(None, {"input_ids": ids, "attention_mask": mask})
    latents = draw_noise(7, 3, (64, 8, 8))[None]
    inputs = {
        "latents": latents,
        "timestep": np.array([1000.0], dtype=np.float32),
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
    }
    (x0,) = parts["denoiser"].run(None, inputs)
    (pixels,) = parts["decoder"].run(None, {"latents": x0})
    expected = np.rint((pixels[0].transpose(1, 2, 0) + 1) * 127.5)
    got = Student(onnx).generate([request(index=3)])[0].astype(np.int64)
    assert np.abs(got - expected).max() <= 1  # float rounding may move a value across a half
    assert (got != expected).mean() < 1e-3


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("canonical", [None, 1, 8])
def test_same_seed_gives_same_image_in_any_batch(onnx: OnnxBackend, size: int, canonical: int | None) -> None:
    student = Student(onnx, canonical)
    alone = Student(onnx).generate([request()])[0]
    for position in range(size):
        rows = [request("dog", seed=row) for row in range(size)]
        rows[position] = request()
        np.testing.assert_array_equal(student.generate(rows)[position], alone)


def test_canonical_batches_have_one_size_in_every_stage(
    onnx: OnnxBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.cache = EmbeddingCache(0)
    seen: set[tuple[str, int]] = set()
    for name, session in list(onnx._sessions.items()):

        def run(
            names: Sequence[str] | None,
            inputs: dict[str, np.ndarray],
            name: str = name,
            session: Any = session,
        ) -> list[np.ndarray]:
            seen.add((name, len(next(iter(inputs.values())))))
            return session.run(names, inputs)  # type: ignore[no-any-return]

        monkeypatch.setitem(onnx._sessions, name, SimpleNamespace(run=run))
    for count in (1, 3, 4):
        Student(onnx, 4).generate([request("dog", seed=row) for row in range(count)])
    assert seen == {("text_encoder", 4), ("denoiser", 4), ("decoder", 4)}
    with pytest.raises(ValueError, match="at most 4"):
        Student(onnx, 4).decode(np.zeros((5, 64, 8, 8), dtype=np.float32))


def test_prompts_are_encoded_without_their_common_padding_to_the_same_pictures(tmp_path: Path) -> None:
    padded, cut = (OnnxBackend(threads=1, cache=EmbeddingCache(0)) for _ in range(2))
    text = Text(tokenizer="tokenizer.json", max_length=14, padding="zeros")
    padded.load(open_bundle(make_tiny_bundle(tmp_path / "padded")))
    cut.load(open_bundle(make_tiny_bundle(tmp_path / "cut", text=(text,))))
    session, lengths = cut._sessions["text_encoder"], []

    def run(names: Sequence[str], inputs: dict[str, np.ndarray]) -> Any:
        lengths.append(inputs["input_ids"].shape[1])
        return session.run(names, inputs)

    cut._sessions["text_encoder"] = SimpleNamespace(run=run)  # type: ignore[assignment]
    for prompts in (["dog"], ["red apple", "dog"], ["a red heart", "a green rocket dog", ""], [""]):
        rows = [request(prompt, seed=row) for row, prompt in enumerate(prompts)]
        np.testing.assert_array_equal(Student(cut).generate(rows), Student(padded).generate(rows))
    assert lengths == [1, 2, 4, 1]
    Student(cut, canonical=4).generate([request()])
    assert lengths[-1] == 14  # where bytes depend on sizes, the length is one of them


def test_cached_embeddings_have_the_bytes_of_fresh_ones(onnx: OnnxBackend) -> None:
    onnx.cache = EmbeddingCache()
    fresh = onnx.encode_prompts(["dog", "red apple"])
    again = onnx.encode_prompts(["red apple", "dog"])
    assert (onnx.cache.hits, onnx.cache.misses) == (2, 2)
    assert again.tokens[::-1].tobytes() == fresh.tokens.tobytes()
    assert again.pooled[::-1].tobytes() == fresh.pooled.tobytes()


def test_the_cache_drops_what_was_not_used_for_longest_and_stays_within_its_bytes() -> None:
    row = (np.zeros((14, 384), np.float32), np.zeros(384, np.float32))
    capacity = 3 * (row[0].nbytes + row[1].nbytes + 1024 + mmap.PAGESIZE)
    cache = EmbeddingCache(capacity)
    for prompt in ("a", "b", "c"):
        cache.put("sha", prompt, row)
    assert cache.get("sha", "a") is not None
    assert cache.get("other bundle", "a") is None
    cache.put("sha", "d", row)
    assert [cache.get("sha", prompt) is not None for prompt in "abcd"] == [True, False, True, True]
    for number in range(100):
        cache.put("sha", str(number), row)
    assert cache.bytes <= capacity


def test_a_kept_row_has_pages_of_its_own_and_the_bytes_that_it_had() -> None:
    """On the C heap rows would lie between the arrays of batches: its median grew by 1.2 % over 1,200 of them."""
    draw = np.random.default_rng(0)
    tokens, pooled = (draw.standard_normal(shape).astype(np.float32) for shape in ((2, 14, 384), (2, 384)))
    cache = EmbeddingCache()
    cache.put("sha", "dog", (tokens[1], pooled[1]))
    wanted = tokens[1].tobytes(), pooled[1].tobytes()
    tokens[:], pooled[:] = 0, 0
    row = cache.get("sha", "dog")
    assert row is not None
    assert (row[0].tobytes(), row[1].tobytes()) == wanted
    assert row[0].ctypes.data % mmap.PAGESIZE == 0
    assert cache.bytes >= row[0].nbytes + row[1].nbytes
    cache.put("sha", "empty", (tokens[0], pooled[0, :0]))  # of a family without a pooled embedding
    empty = cache.get("sha", "empty")
    assert empty is not None
    assert empty[1].shape == (0,)


def test_each_step_shows_its_estimate_and_may_stop_the_batch(tmp_path: Path) -> None:
    backend = OnnxBackend(threads=1)
    backend.load(_with(tmp_path, time_steps=(1.0, 0.5)))
    seen: list[np.ndarray] = []
    embeddings = backend.encode_prompts(["red apple"])

    def on_step(step: int, num_steps: int, x0: np.ndarray) -> None:
        assert (step, num_steps) == (len(seen), 2)
        seen.append(x0)

    latents = backend.denoise([request()], embeddings, on_step)
    np.testing.assert_array_equal(seen[1], latents)
    assert (seen[0] != seen[1]).mean() > 0.5

    def stop(step: int, num_steps: int, x0: np.ndarray) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        backend.denoise([request()], embeddings, stop)


def test_other_seed_index_or_prompt_gives_another_image(onnx: OnnxBackend) -> None:
    rows = [request(), request(seed=8), request(index=1), request("green apple")]
    pictures = Student(onnx).generate(rows)
    for first in range(4):
        for second in range(first):
            assert (pictures[first] != pictures[second]).mean() > 0.1


def test_equal_prompts_are_encoded_once(tmp_path: Path) -> None:
    backend = OnnxBackend(threads=1)
    backend.load(_with(tmp_path, batch_invariant={"onnx": True}))
    inner = backend._sessions["text_encoder"]
    batches: list[int] = []

    class Counting:
        def run(self, names: Sequence[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            batches.append(len(inputs["input_ids"]))
            return inner.run(names, inputs)  # type: ignore[no-any-return]

    backend._sessions["text_encoder"] = Counting()  # type: ignore[assignment]
    prompts = ["dog", "rocket", "dog", "dog"]
    pictures = Student(backend).generate([request(prompt, seed=row) for row, prompt in enumerate(prompts)])
    assert batches == [2]
    np.testing.assert_array_equal(pictures[3], Student(backend).generate([request("dog", seed=3)])[0])


def test_a_prompt_longer_than_the_model_reads_is_cut(onnx: OnnxBackend) -> None:
    long, longer = " ".join(["dog"] * 14), " ".join(["dog"] * 40)
    pictures = Student(onnx).generate([request(long), request(longer)])
    np.testing.assert_array_equal(pictures[0], pictures[1])


def test_a_few_step_student_uses_fresh_noise_at_every_step(tmp_path: Path) -> None:
    """x0 of the second step is computed from the first one's x0 and the noise of step 1, not of step 0."""
    backend = OnnxBackend(threads=1)
    backend.load(_with(tmp_path, time_steps=(1.0, 0.5)))
    bundle = open_bundle(tmp_path / "tiny" / "1")
    got = Student(backend).generate([request()])[0].astype(np.int64)
    parts = {name: ReferenceEvaluator(str(bundle.path / f"{name}.onnx")) for name in ("denoiser", "decoder")}
    encoded = backend.encode_prompts(["red apple"])
    embeds, pooled = encoded.tokens, encoded.pooled

    def denoise(latents: np.ndarray, t: float) -> np.ndarray:
        inputs = {"latents": latents, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        timestep = np.array([1000 * t], dtype=np.float32)
        return np.asarray(parts["denoiser"].run(None, {**inputs, "timestep": timestep})[0])

    x0 = denoise(draw_noise(7, 0, (64, 8, 8))[None], 1.0)
    x0 = denoise(((x0 + draw_noise(7, 0, (64, 8, 8), 1)[None]) / 2).astype(np.float32), 0.5)
    (pixels,) = parts["decoder"].run(None, {"latents": x0})
    expected = np.rint((pixels[0].transpose(1, 2, 0) + 1) * 127.5)
    assert np.abs(got - expected).max() <= 1


def test_mixed_sizes_and_empty_batches_are_refused(onnx: OnnxBackend) -> None:
    for batch in ([], [request(), request(side=128)]):
        with pytest.raises(ValueError, match="batch of one size"):
            Student(onnx).generate(batch)


def test_backend_without_a_bundle_says_so() -> None:
    with pytest.raises(RuntimeError, match="load"):
        Student(OnnxBackend(threads=1)).generate([request()])


def test_unknown_backend_is_never_replaced_by_another() -> None:
    with pytest.raises(ValueError, match="name of a backend, got 'cuda'"):
        create_backend("cuda", threads=1)


def test_to_uint8_rounds_and_clips() -> None:
    values = np.array([-2.0, -1.0, 0.0, 1 / 127.5, 1.0, 3.0], dtype=np.float32)
    pixels = np.broadcast_to(values, (1, 3, 1, 6))
    assert to_uint8(pixels)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]


def _with(folder: Path, **fields: object) -> Bundle:
    """Make a tiny bundle whose manifest says something else."""
    path = make_tiny_bundle(folder)
    manifest = open_bundle(path).manifest.model_copy(update={**fields, "files": describe_files(path)})
    write_manifest(path, manifest)
    return open_bundle(path)


def test_a_number_of_steps_draws_as_the_student_whose_own_it_is(tmp_path: Path) -> None:
    schedules = {2: (1.0, 0.5)}
    both, two = (OnnxBackend(threads=1) for _ in range(2))
    both.load(open_bundle(make_tiny_bundle(tmp_path / "both", step_schedules=schedules)))
    two.load(open_bundle(make_tiny_bundle(tmp_path / "two", time_steps=schedules[2])))
    asked = replace(request(), num_steps=2)
    (picture,) = Student(both).generate([asked])
    np.testing.assert_array_equal(picture, Student(two).generate([request()])[0])
    assert (picture != Student(both).generate([request()])[0]).mean() > 0.1
    with pytest.raises(ValueError, match=r"offers \(1, 2\), got 3"):
        Student(both).generate([replace(asked, num_steps=3)])
    with pytest.raises(ValueError, match="number of steps"):
        Student(both).generate([asked, request()])


def test_pixels_become_the_levels_that_rounding_says() -> None:
    """Clip, move to 0..255, round half to even; a video keeps its frames' axis."""
    values = np.random.default_rng(0).uniform(-1.3, 1.3, (2, 3, 4, 5, 6)).astype(np.float32)
    values[0, 0, 0, 0, :4] = -1, 1, -0.0, 2
    wanted = np.rint((np.clip(values, -1, 1) + np.float32(1)) * np.float32(127.5)).transpose(0, 2, 3, 4, 1)
    arrived = to_uint8(values)
    assert arrived.dtype == np.uint8 and arrived.flags.c_contiguous
    np.testing.assert_array_equal(arrived, wanted)
    np.testing.assert_array_equal(to_uint8(values[:, :, 0]), wanted[:, 0])
