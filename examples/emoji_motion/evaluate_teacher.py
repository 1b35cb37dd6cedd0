"""Measure a teacher: does what it draws move as asked, for pairs it was trained on and for pairs held out?

    python examples/emoji_motion/evaluate_teacher.py --teacher examples/emoji_motion/teacher --out runs/evaluation

Writes teacher.json (figures of real clips, trained pairs and held-out pairs) and sheet.png: one row for each held-out
pair, in the order of held-out.json, its first seed.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from clips import sample_clips, save_sheet
from safetensors.numpy import load_file

from flashbulb_distill.core.noise import draw_noise
from flashbulb_distill.evaluate.motion import motion_figures
from flashbulb_distill.teachers.clip_codec import ClipCodec
from flashbulb_distill.teachers.denoiser import Condition
from flashbulb_distill.teachers.emoji_motion import MotionDenoiser, load_transformer
from flashbulb_distill.teachers.text import encode_prompts, load_text_encoder, load_tokenizer

HERE = Path(__file__).parent
FIRST_SEED = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, default=HERE / "teacher")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--num-steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    denoiser = MotionDenoiser(load_transformer(args.teacher)).requires_grad_(False).eval()
    codec = ClipCodec.from_pretrained(args.teacher, subfolder="codec", torch_dtype=torch.float32)
    codec.requires_grad_(False)
    encoder, tokenizer = load_text_encoder(), load_tokenizer()
    uncond = Condition(*encode_prompts(encoder, tokenizer, [""]))
    shape = (denoiser.transformer.config.in_channels, 4, 4, 4)

    labels = {split: json.loads((args.data / f"{split}.json").read_text()) for split in ("train", "held-out")}
    real = load_file(args.data / "held-out.safetensors")["clips"]
    asked = [label["motion"] for label in labels["held-out"] for _ in range(real.shape[1])]
    figures: dict[str, object] = {"real": motion_figures(real.reshape(-1, *real.shape[2:]), asked)}
    for split, pairs in labels.items():
        rows = [label for label in pairs for _ in range(args.seeds)]
        prompts = [f"{label['subject']} {label['motion']}" for label in rows]
        cond = Condition(*encode_prompts(encoder, tokenizer, prompts))
        drawn = []
        started = time.process_time()
        for start in range(0, len(rows), 32):
            some = torch.arange(start, min(start + 32, len(rows)))
            noise = [draw_noise(FIRST_SEED + int(i) % args.seeds, int(i) // args.seeds, shape) for i in some]
            drawn.append(
                sample_clips(
                    denoiser,
                    codec,
                    torch.from_numpy(np.stack(noise)),
                    cond.take(some),
                    uncond,
                    num_steps=args.num_steps,
                    guidance=args.guidance,
                )
            )
        clips = np.concatenate(drawn)
        cpu_s = (time.process_time() - started) / len(rows)
        figures[split] = {
            **motion_figures(clips, [label["motion"] for label in rows]),
            "clips": len(rows),
            "cpu_s_per_clip": round(cpu_s, 3),
        }
        print(split, figures[split], flush=True)
    save_sheet(args.out / "sheet.png", clips[:: args.seeds])
    about = {
        "num_steps": args.num_steps,
        "guidance": args.guidance,
        "seeds": args.seeds,
        "machine": platform.machine(),
    }
    (args.out / "teacher.json").write_text(json.dumps({**about, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
