"""Two evaluations side by side: the student as a share of its teacher, and a table to print."""

from collections.abc import Mapping

import numpy as np
from pydantic import BaseModel, ConfigDict

from flashbulb_distill.evaluate import metrics
from flashbulb_distill.evaluate.errors import EvaluationError
from flashbulb_distill.evaluate.run import Estimate, EvaluationResult


class Comparison(BaseModel):
    """The student's figures divided by the teacher's, with 95 % intervals over prompts (paired)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    retrieval_top1: Estimate
    style_coverage: Estimate | None
    recognised_style_coverage: Estimate | None
    diversity: Estimate | None


def compare(student: EvaluationResult, teacher: EvaluationResult) -> Comparison:
    """Divide the student's figures by the teacher's, on the prompts for trained pictures.

    Raises EvaluationError when the two were not measured alike, or the teacher scores zero.
    """
    for field in ("seeds", "reference_sha256", "embedding"):
        if getattr(student, field) != getattr(teacher, field):
            raise EvaluationError(
                f"student and teacher were measured with different {field}: evaluate both alike"
            )
    if [r.prompt for r in student.per_prompt] != [r.prompt for r in teacher.per_prompt]:
        raise EvaluationError("student and teacher were measured on different prompts: evaluate both alike")
    retrieval = _ratio(student, teacher, "retrieval_top1")
    if retrieval is None:
        raise EvaluationError("expected some prompts for trained pictures, got none")
    return Comparison(
        retrieval_top1=retrieval,
        style_coverage=_ratio(student, teacher, "style_coverage"),
        recognised_style_coverage=_ratio(student, teacher, "recognised_style_coverage"),
        diversity=_ratio(student, teacher, "diversity"),
    )


def _ratio(student: EvaluationResult, teacher: EvaluationResult, field: str) -> Estimate | None:
    pairs = [
        (getattr(s, field), getattr(t, field))
        for s, t in zip(student.per_prompt, teacher.per_prompt, strict=True)
        if not t.held_out and getattr(s, field) is not None and getattr(t, field) is not None
    ]
    if not pairs:
        return None
    ours, theirs = np.array(pairs, dtype=np.float64).T
    if theirs.sum() == 0:
        raise EvaluationError(f"the teacher's {field} is zero: there is nothing to compare with")
    low, high = metrics.bootstrap_interval(ours, weights=theirs)
    n = len(pairs) * len(student.seeds)
    return Estimate(value=float(ours.sum() / theirs.sum()), low=low, high=high, n=n, num_groups=len(pairs))


_ROWS = (
    ("Frechet distance", "frechet"),
    ("Kernel distance", "kernel_distance"),
    ("Precision", "precision"),
    ("Recall", "recall"),
    ("Density", "density"),
    ("Coverage", "coverage"),
    ("Retrieval, top 1", "retrieval_top1"),
    ("Retrieval, top 5", "retrieval_top5"),
    ("Held-out pairs: retrieval, top 1", "held_out_retrieval_top1"),
    ("Held-out pairs: retrieval, top 5", "held_out_retrieval_top5"),
    ("Style coverage", "style_coverage"),
    ("Style coverage, recognised only", "recognised_style_coverage"),
    ("Style entropy", "style_entropy"),
    ("Style as asked for", "style_accuracy"),
    ("Diversity over seeds", "diversity"),
)


def markdown_table(results: Mapping[str, EvaluationResult]) -> str:
    """Return a Markdown table, a column per model, with 95 % intervals and the ceilings of real pictures.

    Raises EvaluationError when there is no result or their reference pictures differ.
    """
    if len({result.reference_sha256 for result in results.values()}) != 1:
        raise EvaluationError("expected one or more results measured on the same reference pictures")
    first = next(iter(results.values()))
    lines = [_line(["", *results, "real pictures"]), _line(["---"] * (len(results) + 2))]
    ceilings = _ceiling_cells(first)
    for title, field in _ROWS:
        cells = [_cell(getattr(result.metrics, field)) for result in results.values()]
        lines.append(_line([title, *cells, ceilings.get(field, "")]))
    settings = (
        f"{len(first.per_prompt)} prompts x {len(first.seeds)} seeds; features {first.embedding}; "
        f"Frechet on {first.num_components} principal components; 95 % intervals over prompts."
    )
    return "\n".join([*lines, "", settings, ""])


def _ceiling_cells(result: EvaluationResult) -> dict[str, str]:
    ceilings = result.ceilings
    return {
        "retrieval_top1": f"{_cell(ceilings.retrieval_leave_one_out_top1)} (itself left out)",
        "retrieval_top5": f"{_cell(ceilings.retrieval_leave_one_out_top5)} (itself left out)",
        "held_out_retrieval_top1": _cell(ceilings.retrieval_held_out_top1),
        "held_out_retrieval_top5": _cell(ceilings.retrieval_held_out_top5),
        "style_coverage": _cell(ceilings.style_coverage),
        "diversity": _cell(ceilings.diversity),
    }


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(figure: Estimate | float | None) -> str:
    if figure is None:
        return "–"
    if isinstance(figure, Estimate):
        return f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"
    return f"{figure:.3f}"
