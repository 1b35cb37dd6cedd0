"""The run on flat-coloured pictures: a concept is a hue, a style a tint of it, the features the mean colour.

So every figure can be worked out by hand, and the generators under test can fail in one chosen way.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashbulb_distill.evaluate.compare import compare, markdown_table
from flashbulb_distill.evaluate.errors import EvaluationError, GeneratedImagesError
from flashbulb_distill.evaluate.features import Images, Lite0Embed
from flashbulb_distill.evaluate.reference import Label, Reference
from flashbulb_distill.evaluate.run import (
    EvaluationResult,
    Generate,
    Prompt,
    evaluate,
    reference_prompts,
)

STYLES = ("dark", "middle", "light")
HUES = {
    "red": (200, 20, 20),
    "green": (20, 200, 20),
    "blue": (20, 20, 200),
    "yellow": (200, 200, 20),
    "cyan": (20, 200, 200),
    "violet": (200, 20, 200),
}
HELD_OUT = ("violet", "light")


def paint(concept: str, style: str) -> Images:
    """A picture whose colour says the concept; the style tilts it a little towards the next channel."""
    tilt = np.roll(HUES[concept], 1) // 8 * STYLES.index(style)
    return np.broadcast_to((np.array(HUES[concept]) + tilt).clip(0, 255).astype(np.uint8), (8, 8, 3))


def mean_colour(images: Images) -> NDArray[np.float32]:
    return images.astype(np.float32).mean(axis=(1, 2)) / 255


@pytest.fixture(scope="module")
def reference() -> Reference:
    labels = [
        Label(concept=concept, style=style, split="held-out" if (concept, style) == HELD_OUT else "train")
        for concept in HUES
        for style in STYLES
    ]
    return Reference(np.stack([paint(x.concept, x.style) for x in labels]), tuple(labels))


def generator(style_of: Callable[[int], str], concept_of: Callable[[str], str] = str) -> Generate:
    """Paint the prompt's concept in its style if it names one, else in that of the seed."""

    def generate(texts: list[str], seeds: list[int]) -> Images:
        pictures = []
        for text, seed in zip(texts, seeds, strict=True):
            concept, _, style = text.removesuffix(" style").partition(", ")
            pictures.append(paint(concept_of(concept), style or style_of(seed)))
        return np.stack(pictures)

    return generate


def varied(seed: int) -> str:
    return STYLES[seed % 3]


def collapsed(seed: int) -> str:
    return STYLES[0]


def run(reference: Reference, generate: Generate, **options: Any) -> EvaluationResult:
    settings: dict[str, Any] = {
        "prompts": reference_prompts(reference),
        "seeds": range(6),
        "embed": mean_colour,
        "num_components": 3,
        **options,
    }
    return evaluate(generate, reference, **settings)


def test_prompts_ask_for_each_concept_and_for_each_held_out_pair(reference: Reference) -> None:
    prompts = reference_prompts(reference)
    assert [p.text for p in prompts] == [*HUES, "violet, light style"]
    assert prompts[-1] == Prompt(text="violet, light style", concept="violet", style="light")
    assert [p.text for p in reference_prompts(reference, ["blue"])] == ["blue"]


def test_a_generator_of_the_training_pictures_scores_perfectly(reference: Reference) -> None:
    result = run(reference, generator(varied))
    figures = result.metrics
    assert figures.retrieval_top1.value == figures.retrieval_top5.value == 1
    assert figures.style_coverage is not None and figures.style_coverage.value == 1
    assert result.per_prompt[0].style_entropy == pytest.approx(1)
    assert figures.style_accuracy is not None and figures.style_accuracy.value == 1
    assert figures.frechet == pytest.approx(0, abs=0.01)


def test_mode_collapse_shows_in_style_coverage_and_not_in_retrieval(reference: Reference) -> None:
    full = run(reference, generator(varied))
    poor = run(reference, generator(collapsed))
    assert poor.metrics.retrieval_top1.value == full.metrics.retrieval_top1.value == 1
    # Five concepts with three trained styles, one with two.
    assert poor.metrics.style_coverage is not None
    assert poor.metrics.style_coverage.value == pytest.approx((5 * 1 / 3 + 1 / 2) / 6)
    assert poor.metrics.style_entropy is not None and poor.metrics.style_entropy.value == 0
    assert poor.metrics.diversity is not None and poor.metrics.diversity.value == pytest.approx(0, abs=1e-12)
    assert full.metrics.style_coverage is not None and full.metrics.style_coverage.value == 1
    assert poor.metrics.recall < full.metrics.recall


def test_pictures_of_the_wrong_concept_are_not_retrieved_and_cover_no_recognised_style(
    reference: Reference,
) -> None:
    swapped = run(reference, generator(varied, lambda concept: "blue"))
    by_text = {r.prompt.text: r for r in swapped.per_prompt}
    assert by_text["blue"].retrieval_top1 == 1
    assert by_text["red"].retrieval_top1 == 0
    assert by_text["red"].recognised_style_coverage == 0
    assert swapped.metrics.retrieval_top1.value == pytest.approx(1 / 6)
    assert swapped.metrics.retrieval_top1.n == 36
    assert swapped.metrics.retrieval_top1.num_groups == 6


def fails_at_the_held_out_pair(texts: list[str], seeds: list[int]) -> Images:
    usual = generator(varied)(texts, seeds)
    rare = [text == "violet, light style" for text in texts]
    return np.where(np.array(rare)[:, None, None, None], paint("green", "dark"), usual)


def test_held_out_pairs_are_scored_apart_from_the_trained_ones(reference: Reference) -> None:
    figures = run(reference, fails_at_the_held_out_pair).metrics
    assert figures.retrieval_top1.value == 1
    assert figures.held_out_retrieval_top1 is not None
    assert figures.held_out_retrieval_top1.value == 0
    assert figures.held_out_retrieval_top1.n == 6


def test_distribution_figures_look_at_the_concepts_asked_for_only(reference: Reference) -> None:
    some = [Prompt(text=c, concept=c) for c in ("red", "green", "blue")]
    figures = run(reference, generator(varied), prompts=some).metrics
    assert figures.coverage == figures.recall == 1
    assert figures.frechet == pytest.approx(0, abs=0.01)


def test_ceilings_ask_real_pictures_for_their_concept_in_other_styles(reference: Reference) -> None:
    ceilings = run(reference, generator(varied)).ceilings
    assert ceilings.retrieval_held_out_top1 is not None
    assert (ceilings.retrieval_held_out_top1.n, ceilings.retrieval_held_out_top1.value) == (1, 1.0)
    assert ceilings.retrieval_leave_one_out_top1.n == 17
    assert ceilings.style_coverage == pytest.approx((5 * (1 - (2 / 3) ** 6) + (1 - 0.5**6)) / 6)


def test_generate_gets_every_prompt_with_every_seed_in_batches(reference: Reference) -> None:
    calls: list[tuple[str, int]] = []
    sizes: list[int] = []
    ticks: list[tuple[int, int]] = []

    def generate(texts: list[str], seeds: list[int]) -> Images:
        calls.extend(zip(texts, seeds, strict=True))
        sizes.append(len(texts))
        return generator(varied)(texts, seeds)

    result = run(
        reference, generate, seeds=(3, 2**40), batch_size=4, progress=lambda *done: ticks.append(done)
    )
    prompts = reference_prompts(reference)
    assert calls == [(p.text, seed) for p in prompts for seed in (3, 2**40)]
    assert sizes == [4, 4, 4, 2]
    assert ticks == [(4, 14), (8, 14), (12, 14), (14, 14)]
    assert result.seeds == (3, 2**40)


def test_the_result_does_not_depend_on_the_batch_size(reference: Reference) -> None:
    one, many = (run(reference, generator(varied), batch_size=size) for size in (1, 32))
    assert one == many


def test_the_result_survives_json(reference: Reference) -> None:
    result = run(reference, generator(varied), provenance={"commit": "abc"})
    assert EvaluationResult.model_validate_json(result.model_dump_json()) == result
    assert result.provenance == {"commit": "abc"}
    assert result.reference_sha256 == reference.sha256
    assert {"numpy", "torch", "python"} <= result.versions.keys()


def test_the_same_run_gives_the_same_result(reference: Reference) -> None:
    assert run(reference, generator(varied)) == run(reference, generator(varied))


@pytest.mark.parametrize(
    "images",
    [
        lambda n: np.zeros((n, 8, 8, 3), np.float32),
        lambda n: np.zeros((n - 1, 8, 8, 3), np.uint8),
        lambda n: np.zeros((n, 3, 8, 8), np.uint8),
    ],
    ids=["floats", "one missing", "planar"],
)
def test_other_pictures_than_asked_for_are_refused(
    reference: Reference, images: Callable[[int], Images]
) -> None:
    with pytest.raises(GeneratedImagesError, match="expected 32 pictures uint8"):
        run(reference, lambda texts, seeds: images(len(texts)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "expected prompts and distinct seeds"),
        ({"seeds": [1, 1]}, "distinct seeds"),
        ({"prompts": [Prompt(text="x", concept="red")] * 2}, "distinct prompts"),
        ({"prompts": [Prompt(text="a bus", concept="bus")]}, "'a bus': no training picture"),
        ({"prompts": [Prompt(text="x", concept="red", style="oil")]}, "no 'red' in style 'oil'"),
        ({"prompts": [Prompt(text="x", concept="violet", style="light")]}, "held-out ones only"),
        ({"prompts": [Prompt(text="x", concept="red")]}, "got 3 and 6: ask for more concepts"),
        ({"num_components": 17}, "expected 1 to 16 components"),
    ],
    ids=[
        "no prompts",
        "seed twice",
        "prompt twice",
        "unknown concept",
        "unknown style",
        "held-out only",
        "few pictures",
        "components",
    ],
)
def test_requests_that_cannot_be_judged_are_refused_before_anything_is_generated(
    reference: Reference, options: dict[str, Any], message: str
) -> None:
    def generate(texts: list[str], seeds: list[int]) -> Images:
        raise AssertionError("nothing should be generated")

    with pytest.raises(EvaluationError, match=message):
        run(reference, generate, **options)


def test_comparison_divides_the_students_figures_by_the_teachers(reference: Reference) -> None:
    teacher = run(reference, generator(varied))
    student = run(reference, generator(collapsed))
    ratio = compare(student, teacher)
    assert ratio.retrieval_top1.value == ratio.retrieval_top1.low == ratio.retrieval_top1.high == 1
    assert ratio.style_coverage is not None
    assert ratio.style_coverage.value == pytest.approx((5 / 3 + 1 / 2) / 6)
    assert ratio.style_coverage.low <= ratio.style_coverage.value <= ratio.style_coverage.high
    assert ratio.diversity is not None and ratio.diversity.value == pytest.approx(0, abs=1e-9)


def test_comparison_leaves_the_held_out_pairs_out(reference: Reference) -> None:
    teacher = run(reference, generator(varied))
    assert compare(run(reference, fails_at_the_held_out_pair), teacher).retrieval_top1.value == 1


def test_comparison_of_different_measurements_is_refused(reference: Reference) -> None:
    teacher = run(reference, generator(varied))
    with pytest.raises(EvaluationError, match="different seeds"):
        compare(run(reference, generator(varied), seeds=range(5)), teacher)
    with pytest.raises(EvaluationError, match="different prompts"):
        compare(run(reference, generator(varied), prompts=reference_prompts(reference)[:-1]), teacher)


def test_comparison_with_a_teacher_that_scores_nothing_is_refused(reference: Reference) -> None:
    prompts = [Prompt(text="red", concept="red"), Prompt(text="blue", concept="blue")]
    blind = run(reference, generator(varied, lambda c: "green"), prompts=prompts)
    with pytest.raises(EvaluationError, match="teacher's retrieval_top1 is zero"):
        compare(blind, blind)


def test_the_table_has_a_column_per_model_and_a_dash_for_what_was_not_asked(reference: Reference) -> None:
    prompts = [p for p in reference_prompts(reference) if p.style is None]
    result = run(reference, generator(varied), prompts=prompts)
    lines = markdown_table({"teacher": result, "student": result}).splitlines()
    assert lines[0] == "|  | teacher | student | real pictures |"
    assert {line.count("|") for line in lines if line.startswith("|")} == {5}
    assert any(line.startswith("| Style as asked for | – | – |") for line in lines)
    assert any(line.startswith("| Retrieval, top 1 | 1.000 (") for line in lines)


def test_lite0_features_do_not_depend_on_the_batch_and_tell_pictures_apart() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    features = Lite0Embed(batch_size=2)(images)
    assert features.shape == (5, 1280)
    assert features.dtype == np.float32
    np.testing.assert_allclose(Lite0Embed(batch_size=5)(images), features, atol=1e-4)
    assert np.linalg.norm(features[0] - features[1]) > 0.1
