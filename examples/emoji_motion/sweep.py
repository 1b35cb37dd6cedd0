"""How many steps should the student have? Distil one student for each number, measure all, and time them.

    python examples/emoji_motion/sweep.py --runs runs/motion-sweep [--steps 1 2 4 8] [--write FILE.json]

Every student is distilled by the same recipe with other time steps, n evenly from 1, and measured as the recipe says;
beside each stands the teacher asked to draw in so few steps without guidance, which is where the student began.
Resumable: what a run folder holds is not done again. CPU time of one thread, a clip in a batch of 8.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from flashbulb_distill.evaluate.clips import ClipEvaluation
from flashbulb_distill.export.generate import student_images, teacher_images
from flashbulb_distill.provenance import code_version
from flashbulb_distill.run import Run, start_run
from flashbulb_distill.train.recipe import load_recipe

BATCH = 8
FIGURES = ("motion_correct", "subject_correct", "both_correct", "frechet", "diversity")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=Path("distill/recipes/emoji_motion.yaml"))
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--set", action="append", default=[], help="override a value of the recipe")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for steps in args.steps:
        times = [1 - index / steps for index in range(steps)]
        recipe = load_recipe(args.recipe, [*args.set, f"time_steps={times}"])
        run = start_run(recipe, args.runs / str(steps), resume=True)
        run.evaluate()
        by_student = student_images(run.teacher, run.student, recipe.time_steps)
        before = args.runs / str(steps) / "before.json"
        if not before.exists():
            untrained = student_images(run.teacher, run.teacher.denoiser, recipe.time_steps)
            before.write_text(run.measurement.measure("before", untrained, {}).model_dump_json())
        student, start = (run.measurement.read(p) for p in (run.out / "evaluation/student.json", before))
        rows.append({"steps": steps, "cpu_ms_a_clip": cpu_ms(by_student), **figures(student)})
        rows[-1]["before_adm"] = figures(start)
        print(rows[-1], flush=True)
    teacher = run.measurement.read(run.out / "teacher" / "evaluation.json")
    result = {
        "machine": f"{platform.processor() or platform.machine()}, one thread, CPU time",
        "commit": code_version(),
        "recipe": str(args.recipe),
        "updates": run.recipe.adm.steps if run.recipe.adm else 0,
        "students": rows,
        "teacher": {"cpu_ms_a_clip": cpu_ms(teacher_of(run)), **figures(teacher)},
    }
    print(json.dumps(result, indent=2))
    if args.write:
        args.write.write_text(json.dumps(result, indent=2) + "\n")


def teacher_of(run: Run) -> Callable:
    """Return the teacher's guided sampler, as it is measured."""
    recipe = run.recipe.measures
    return teacher_images(run.teacher, recipe.teacher_steps, recipe.teacher_guidance)


def cpu_ms(generate: Callable, rounds: int = 5) -> float:
    """Return the median CPU time of a clip in a batch, text and decoder included."""
    times = []
    for turn in range(rounds + 1):
        started = time.process_time()
        generate([f"rocket flying up {turn}"] * BATCH, list(range(BATCH)))
        times.append((time.process_time() - started) * 1000 / BATCH)
    return round(float(np.median(times[1:])), 2)


def figures(result: ClipEvaluation) -> dict[str, float]:
    """Return the figures of trained and of held-out pairs, averaged."""
    found = {}
    for name in FIGURES:
        both = [getattr(part, name) for part in (result.trained, result.held_out)]
        found[name] = round(float(np.mean([getattr(one, "value", one) for one in both])), 4)
    return found


if __name__ == "__main__":
    main()
