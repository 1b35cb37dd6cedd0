"""Model time of one picture or clip: the few-step student beside its teacher's guided sampling, in one run.

    python -m benchmarks student [--bundle BUNDLE] [--teacher FOLDER] [--rounds 15] [--write]
    python -m benchmarks student --bundle models/emoji-motion/1 --teacher examples/emoji_motion/teacher

CPU time of this process on one thread, medians, the two sides by turns. Each side is whole: text encoder, network,
decoder. The teacher is measured twice: as it is sampled in torch, and with its network on the same runtime as the
student's, which is the fairer comparison and the smaller ratio. Guidance costs two rows a step, in one batch.
"""

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnxruntime
import rig
import torch

from flashbulb_distill.bundle import open_bundle
from flashbulb_distill.core.noise import draw_noise
from flashbulb_distill.core.sampler import sample, sample_ode
from flashbulb_distill.export.generate import teacher_images
from flashbulb_distill.export.parity import open_session
from flashbulb_distill.teachers.open import open_teacher
from flashbulb_distill.teachers.text import load_tokenizer, tokenise

PROMPTS = {"emoji": "red apple", "emoji-motion": "rocket flying up"}
NAMES = {"emoji": "student_vs_teacher", "emoji-motion": "motion_student_vs_teacher"}
STEPS, GUIDANCE = 50, 2.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = rig.plain_arguments(__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("models/emoji/1"))
    parser.add_argument("--teacher", type=Path, default=Path("examples/emoji/teacher"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None, help="also write the result as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    bundle = open_bundle(args.bundle)
    manifest, family = bundle.manifest, bundle.manifest.family
    prompt = PROMPTS[family]
    teacher = open_teacher(family, str(args.teacher))
    tokenizer, takes_pooled = load_tokenizer(), family == "emoji"
    sessions = {
        part: open_session(bundle.file(name)) for part, name in manifest.components.model_dump().items()
    }

    def text(prompts: list[str]) -> list[np.ndarray]:
        ids, mask = tokenise(tokenizer, prompts)
        return sessions["text_encoder"].run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})

    def network(latents: np.ndarray, t: float, tokens: np.ndarray, pooled: np.ndarray) -> np.ndarray:
        times = np.full(len(latents), t * bundle.manifest.timestep_scale, np.float32)
        inputs = {
            "latents": latents,
            "timestep": times,
            "prompt_embeds": tokens,
        } | ({"pooled_prompt_embeds": pooled} if takes_pooled else {})
        return sessions["denoiser"].run(None, inputs)[0]

    noise = draw_noise(0, 0, teacher.latent_shape)[None]
    schedule = {"prediction": manifest.prediction, "schedule": manifest.schedule}
    empty = text([""])

    def student() -> None:
        tokens, pooled = text([prompt])
        steps = bundle.manifest.time_steps
        x0 = sample(
            lambda xt, t: network(xt.astype(np.float32), t, tokens, pooled),
            noise,
            steps,
            renoise=lambda step: draw_noise(0, 0, teacher.latent_shape, step)[None],
            **schedule,
        )
        sessions["decoder"].run(None, {"latents": x0.astype(np.float32)})

    def teacher_same_runtime() -> None:
        tokens, pooled = (np.concatenate(pair) for pair in zip(text([prompt]), empty, strict=True))

        def guided(xt: np.ndarray, t: float) -> np.ndarray:
            cond, uncond = network(np.concatenate([xt, xt]).astype(np.float32), t, tokens, pooled)
            return (uncond + GUIDANCE * (cond - uncond))[None]

        x0 = sample_ode(guided, noise, STEPS, **schedule)
        sessions["decoder"].run(None, {"latents": x0.astype(np.float32)})

    in_torch = teacher_images(teacher, STEPS, GUIDANCE)
    sides = {
        "student": student,
        "teacher, same runtime": teacher_same_runtime,
        "teacher, torch": lambda: in_torch([prompt], [0]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds + 1):  # the first round warms up
        for name, run in sides.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    medians = {name: statistics.median(values[1:]) * 1000 for name, values in seconds.items()}
    result = {
        "cpu_ms": {name: round(value, 2) for name, value in medians.items()},
        "ratio_same_runtime": round(medians["teacher, same runtime"] / medians["student"], 1),
        "ratio_torch": round(medians["teacher, torch"] / medians["student"], 1),
        "student": f"{manifest.name}@{manifest.version}, {len(manifest.time_steps)} steps",
        "steps": STEPS,
        "guidance": GUIDANCE,
        "rounds": args.rounds,
        "threads": 1,
        "versions": {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__},
    }
    rig.finish(NAMES[family], result, write=args.write, out=args.out)


if __name__ == "__main__":
    main()
