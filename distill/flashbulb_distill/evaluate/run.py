"""The evaluation run: prompts and seeds in, pictures judged, one result out.

Retrieval reads a picture as the concept of the nearest real picture of the training split. Two ceilings ask
the same of real pictures: held-out ones (few), and each training picture with itself left out (many). Both
have to recognise a concept by its *other* styles, so a model that has learnt its training pictures can pass:
compare `retrieval` between models, and `held_out_retrieval` (prompts for held-out pairs) with the ceilings.
"""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator

from flashbulb_distill.evaluate import metrics
from flashbulb_distill.evaluate.errors import EvaluationError, GeneratedImagesError
from flashbulb_distill.evaluate.features import Embed, Images, Lite0Embed
from flashbulb_distill.evaluate.metrics import Bools, Floats, Strings
from flashbulb_distill.evaluate.reference import Reference

Generate = Callable[[list[str], list[int]], Images]
Progress = Callable[[int, int], None]

TOP_K = 5
NEIGHBOURS = 3


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Prompt(_Frozen):
    """A prompt and what a right answer shows; no style means that each style is right."""

    text: str
    concept: str
    style: str | None = None


class Estimate(_Frozen):
    """A mean over `n` samples with its 95 % interval, which treats samples of one group as related."""

    value: float
    low: float
    high: float
    n: int
    num_groups: int


class PromptResult(_Frozen):
    """What one prompt's samples scored; the style figures only where every style is right."""

    prompt: Prompt
    held_out: bool
    retrieval_top1: float
    retrieval_top5: float
    style_coverage: float | None = None
    recognised_style_coverage: float | None = None
    style_entropy: float | None = None
    diversity: float | None = None
    style_accuracy: float | None = None


class Metrics(_Frozen):
    """All figures of one model. None where no prompt asks for it."""

    frechet: float
    kernel_distance: float
    precision: float
    recall: float
    density: float
    coverage: float
    retrieval_top1: Estimate
    retrieval_top5: Estimate
    held_out_retrieval_top1: Estimate | None
    held_out_retrieval_top5: Estimate | None
    # Share of the trained styles that the samples of a style-less prompt show; "recognised" counts only the
    # samples whose concept was found too, so that a shapeless picture cannot cover a style.
    style_coverage: Estimate | None
    recognised_style_coverage: Estimate | None
    style_entropy: Estimate | None
    diversity: Estimate | None
    # Share of the samples of prompts with a style that come nearest to this style of their concept.
    style_accuracy: Estimate | None


class Ceilings(_Frozen):
    """What real pictures, or an ideal sampler of them, would score."""

    retrieval_held_out_top1: Estimate | None
    retrieval_held_out_top5: Estimate | None
    retrieval_leave_one_out_top1: Estimate
    retrieval_leave_one_out_top5: Estimate
    style_coverage: float | None
    diversity: float | None


class EvaluationResult(_Frozen):
    """The figures of one model with everything needed to repeat them."""

    metrics: Metrics
    ceilings: Ceilings
    num_images: int
    num_real_images: int
    num_components: int
    num_neighbours: int
    seeds: tuple[int, ...]
    per_prompt: tuple[PromptResult, ...]
    reference_sha256: str
    embedding: str
    versions: dict[str, str]
    provenance: dict[str, str]

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        if self.num_images != len(self.seeds) * len(self.per_prompt):
            raise ValueError(
                f"expected {len(self.seeds)} x {len(self.per_prompt)} pictures, got {self.num_images}"
            )
        return self


def reference_prompts(
    reference: Reference,
    concepts: Sequence[str] | None = None,
    *,
    styled: str = "{concept}, {style} style",
) -> tuple[Prompt, ...]:
    """Return a style-less prompt for each concept, and a prompt with its style for each held-out picture.

    `concepts` chooses some; all by default. Held-out pictures are asked for in the wording of `styled`.
    """
    wanted = list(dict.fromkeys(reference.concepts.tolist())) if concepts is None else list(concepts)
    plain = [Prompt(text=concept, concept=concept) for concept in wanted]
    held_out = [
        Prompt(
            text=styled.format(concept=label.concept, style=label.style),
            concept=label.concept,
            style=label.style,
        )
        for label in reference.labels
        if label.split == "held-out" and label.concept in wanted
    ]
    return tuple(plain + held_out)


def evaluate(
    generate: Generate,
    reference: Reference,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    *,
    embed: Embed | None = None,
    batch_size: int = 32,
    num_components: int = 64,
    provenance: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Generate every prompt with every seed and measure the pictures against the real ones.

    `generate(texts, seeds)` returns pictures uint8 [n, h, w, 3] for n texts and n seeds (n <= `batch_size`).
    The distribution figures compare prompts for trained pictures with the training pictures of the same
    concepts; `num_components` principal components of all training pictures span the Frechet distance.
    `provenance` (command, commit, model) is stored as it comes; `progress(done, total)` is called per batch.
    Raises EvaluationError when prompts and reference do not fit, GeneratedImagesError for wrong pictures.
    """
    _check_request(reference, prompts, seeds)
    _check_sizes(reference, prompts, len(seeds), num_components)
    embed = embed or Lite0Embed()
    real = embed(reference.images).astype(np.float64)
    batches = list(_generated_features(generate, embed, prompts, seeds, batch_size, progress))
    generated = np.concatenate(batches).astype(np.float64)
    per_prompt = _judge_prompts(generated, real, reference, prompts, len(seeds))
    return EvaluationResult(
        metrics=_metrics(generated, real, reference, per_prompt, len(seeds), num_components),
        ceilings=_ceilings(real, reference, prompts, len(seeds)),
        num_images=len(generated),
        num_real_images=len(real),
        num_components=num_components,
        num_neighbours=NEIGHBOURS,
        seeds=tuple(seeds),
        per_prompt=per_prompt,
        reference_sha256=reference.sha256,
        embedding=str(getattr(embed, "name", type(embed).__name__)),
        versions={"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__},
        provenance=dict(provenance or {}),
    )


def _check_request(reference: Reference, prompts: Sequence[Prompt], seeds: Sequence[int]) -> None:
    if not prompts or not seeds or len(set(seeds)) != len(seeds):
        raise EvaluationError(f"expected prompts and distinct seeds, got {len(prompts)} and {list(seeds)}")
    if len(set(prompts)) != len(prompts):
        raise EvaluationError("expected distinct prompts, got one of them twice")
    trained = set(reference.concepts[reference.trained].tolist())
    pairs = {(label.concept, label.style) for label in reference.labels}
    for prompt in prompts:
        if prompt.concept not in trained:
            raise EvaluationError(
                f"{prompt.text!r}: no training picture of the reference shows {prompt.concept!r}"
            )
        if prompt.style is not None and (prompt.concept, prompt.style) not in pairs:
            raise EvaluationError(
                f"{prompt.text!r}: no {prompt.concept!r} in style {prompt.style!r} in the reference"
            )


def _check_sizes(
    reference: Reference, prompts: Sequence[Prompt], num_seeds: int, num_components: int
) -> None:
    """Refuse what could not be measured, before hours of generation."""
    seen = [prompt for prompt in prompts if not _is_held_out(reference, prompt)]
    if not seen:
        raise EvaluationError("expected some prompts for trained pictures, got held-out ones only")
    num_trained = int(reference.trained.sum())
    if not 1 <= num_components < num_trained:
        raise EvaluationError(
            f"expected 1 to {num_trained - 1} components for {num_trained} training pictures, "
            f"got {num_components}"
        )
    asked_for = np.isin(reference.concepts, [prompt.concept for prompt in seen]) & reference.trained
    if min(int(asked_for.sum()), len(seen) * num_seeds) <= NEIGHBOURS:
        raise EvaluationError(
            f"expected more than {NEIGHBOURS} real and generated pictures of trained pairs, "
            f"got {asked_for.sum()} and {len(seen) * num_seeds}: ask for more concepts or seeds"
        )


def _is_held_out(reference: Reference, prompt: Prompt) -> bool:
    same = (reference.concepts == prompt.concept) & (reference.styles == prompt.style)
    return bool(prompt.style is not None and not reference.trained[same].any())


def _generated_features(
    generate: Generate,
    embed: Embed,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    batch_size: int,
    progress: Progress | None,
) -> Iterator[NDArray[np.float32]]:
    """Yield the features of each batch, prompt by prompt with all its seeds; pictures are not kept."""
    requests = list(product(prompts, seeds))
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        images = np.asarray(generate([prompt.text for prompt, _ in batch], [seed for _, seed in batch]))
        if (
            images.dtype != np.uint8
            or images.ndim != 4
            or images.shape[0] != len(batch)
            or images.shape[3] != 3
        ):
            raise GeneratedImagesError(
                f"expected {len(batch)} pictures uint8 [n, h, w, 3], got {images.dtype} {list(images.shape)}"
            )
        yield embed(images)
        if progress:
            progress(start + len(batch), len(requests))


def _judge_prompts(
    generated: Floats, real: Floats, reference: Reference, prompts: Sequence[Prompt], num_seeds: int
) -> tuple[PromptResult, ...]:
    concepts = np.repeat([prompt.concept for prompt in prompts], num_seeds)
    trained = reference.trained
    corpus = real[trained], reference.concepts[trained]
    top1 = metrics.retrieval_hits(generated, concepts, *corpus, k=1)
    top5 = metrics.retrieval_hits(generated, concepts, *corpus, k=min(TOP_K, int(trained.sum())))
    trained_styles = metrics.nearest_styles(generated, concepts, *corpus, reference.styles[trained])
    all_styles = metrics.nearest_styles(generated, concepts, real, reference.concepts, reference.styles)

    results = []
    for i, prompt in enumerate(prompts):
        own = slice(i * num_seeds, (i + 1) * num_seeds)
        style_figures = (
            _free_style_figures(generated[own], trained_styles[own], top1[own], _styles_of(reference, prompt))
            if prompt.style is None
            else {"style_accuracy": float((all_styles[own] == prompt.style).mean())}
        )
        results.append(
            PromptResult(
                prompt=prompt,
                held_out=_is_held_out(reference, prompt),
                retrieval_top1=float(top1[own].mean()),
                retrieval_top5=float(top5[own].mean()),
                **style_figures,
            )
        )
    return tuple(results)


def _styles_of(reference: Reference, prompt: Prompt) -> Strings:
    styles: Strings = reference.styles[reference.trained & (reference.concepts == prompt.concept)]
    return styles


def _free_style_figures(
    features: Floats, styles: Strings, recognised: Bools, available: Strings
) -> dict[str, float | None]:
    return {
        "style_coverage": metrics.style_coverage(styles, available),
        "recognised_style_coverage": metrics.style_coverage(np.where(recognised, styles, ""), available),
        "style_entropy": metrics.style_entropy(styles, available),
        "diversity": metrics.diversity(features) if len(features) > 1 else None,
    }


def _metrics(
    generated: Floats,
    real: Floats,
    reference: Reference,
    per_prompt: Sequence[PromptResult],
    num_seeds: int,
    num_components: int,
) -> Metrics:
    seen = [result for result in per_prompt if not result.held_out]
    unseen = [result for result in per_prompt if result.held_out]
    trained = real[reference.trained]
    asked_for = np.isin(reference.concepts, [result.prompt.concept for result in seen])
    answers = generated[np.repeat([not result.held_out for result in per_prompt], num_seeds)]
    counterparts = real[reference.trained & asked_for]
    project = metrics.fit_projection(trained, num_components)
    shape = metrics.manifold(counterparts, answers, NEIGHBOURS)
    return Metrics(
        frechet=metrics.frechet_distance(project(counterparts), project(answers)),
        kernel_distance=metrics.kernel_distance(counterparts, answers),
        **shape._asdict(),
        retrieval_top1=_required(_mean_of(seen, "retrieval_top1", num_seeds)),
        retrieval_top5=_required(_mean_of(seen, "retrieval_top5", num_seeds)),
        held_out_retrieval_top1=_mean_of(unseen, "retrieval_top1", num_seeds),
        held_out_retrieval_top5=_mean_of(unseen, "retrieval_top5", num_seeds),
        style_coverage=_mean_of(seen, "style_coverage", num_seeds),
        recognised_style_coverage=_mean_of(seen, "recognised_style_coverage", num_seeds),
        style_entropy=_mean_of(seen, "style_entropy", num_seeds),
        diversity=_mean_of(seen, "diversity", num_seeds),
        style_accuracy=_mean_of(per_prompt, "style_accuracy", num_seeds),
    )


def _mean_of(results: Sequence[PromptResult], field: str, num_seeds: int) -> Estimate | None:
    values = np.array([value for result in results if (value := getattr(result, field)) is not None])
    return _estimate(values, np.ones(len(values)), num_seeds * len(values)) if len(values) else None


def _required(estimate: Estimate | None) -> Estimate:
    if estimate is None:
        raise EvaluationError("expected some prompts for trained pictures, got none")
    return estimate


def _ceilings(real: Floats, reference: Reference, prompts: Sequence[Prompt], num_seeds: int) -> Ceilings:
    trained = reference.trained
    corpus, concepts = real[trained], reference.concepts[trained]
    held_out, held_out_concepts = real[~trained], reference.concepts[~trained]
    itself = list(range(len(corpus)))
    k = min(TOP_K, len(corpus) - 1)

    def from_other_pictures(k: int) -> Estimate:
        return _accuracy(
            metrics.retrieval_hits(corpus, concepts, corpus, concepts, k=k, own_index=itself), concepts
        )

    def from_held_out(k: int) -> Estimate | None:
        if len(held_out) == 0:
            return None
        hits = metrics.retrieval_hits(held_out, held_out_concepts, corpus, concepts, k=k)
        return _accuracy(hits, held_out_concepts)

    free = [corpus[concepts == prompt.concept] for prompt in prompts if prompt.style is None]
    coverages = [metrics.ideal_style_coverage(num_seeds, len(pictures)) for pictures in free]
    diversities = [metrics.ideal_diversity(pictures) for pictures in free]
    return Ceilings(
        retrieval_held_out_top1=from_held_out(1),
        retrieval_held_out_top5=from_held_out(k),
        retrieval_leave_one_out_top1=from_other_pictures(1),
        retrieval_leave_one_out_top5=from_other_pictures(k),
        style_coverage=float(np.mean(coverages)) if coverages else None,
        diversity=float(np.mean(diversities)) if diversities else None,
    )


def _accuracy(hits: Bools, groups: Strings) -> Estimate:
    """Return the share of hits; pictures of one concept are one group."""
    _, group = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(group, weights=hits), np.bincount(group)
    return _estimate(sums.astype(np.float64), counts.astype(np.float64), len(hits))


def _estimate(sums: Floats, counts: Floats, n: int) -> Estimate:
    """Return sum / count over groups. Equal groups teach a bootstrap nothing: they get Wilson's interval."""
    value = float(sums.sum() / counts.sum())
    means = sums / counts
    if np.ptp(means) < 1e-12 and 0 <= value <= 1:
        low, high = metrics.wilson_interval(min(value * len(means), len(means)), len(means))
    else:
        low, high = metrics.bootstrap_interval(sums, weights=counts)
    return Estimate(value=value, low=low, high=high, n=n, num_groups=len(sums))
