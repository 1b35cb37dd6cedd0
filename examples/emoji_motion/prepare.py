"""Make the demo's clips: 24 emoji, six motions, 16 frames of 32 x 32 pixels, anti-aliased, seeded.

    python examples/emoji_motion/prepare.py [--out examples/emoji_motion/data] [--variants 16]

Writes train.safetensors (uint8 [pairs, variants, frames, h, w, 3]) and train.json, the same for held-out.* (the
subject x motion pairs that are never trained on; four variants), and prompts.txt beside this script.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

HERE = Path(__file__).parent
EMOJI = HERE.parent / "emoji"
sys.path.insert(0, str(EMOJI))

from art import Art, emoji_codes, fetch, rasterise, read_concepts  # noqa: E402
from motions import MOTIONS, is_held_out  # noqa: E402

STYLE = "fluent"
FRAMES, SIZE_PX, SUPERSAMPLING = 16, 32, 4
REST = 0.5  # the subject's resting size, in sides of the clip
HELD_OUT_VARIANTS = 4


def draw_clip(sprite: Image.Image, motion: str, rng: np.random.Generator) -> np.ndarray:
    """Draw one clip of a premultiplied RGBA sprite on white: uint8 [frames, h, w, 3]."""
    phase, strength, rest = rng.uniform((0.0, 0.9, 0.9 * REST), (1.0, 1.1, 1.1 * REST))
    dx, dy = rng.uniform(-0.03, 0.03, 2)
    xs, ys, scales = MOTIONS[motion](np.linspace(0, 1, FRAMES), float(phase), float(strength))
    side = SIZE_PX * SUPERSAMPLING
    frames = []
    for x, y, scale in zip(xs, ys, scales, strict=True):
        step = sprite.width / (rest * scale * side)  # sprite pixels for one canvas pixel
        left = (0.5 + x + dx) * side - sprite.width / (2 * step)
        top = (0.5 + y + dy) * side - sprite.height / (2 * step)
        placed = sprite.transform(
            (side, side),
            Image.Transform.AFFINE,
            (step, 0, -left * step, 0, step, -top * step),
            Image.Resampling.BILINEAR,
        )
        canvas = np.asarray(placed, dtype=np.float32)
        canvas = canvas.reshape(SIZE_PX, SUPERSAMPLING, SIZE_PX, SUPERSAMPLING, 4).mean((1, 3))
        frames.append(canvas[..., :3] + 255 - canvas[..., 3:])
    return np.round(np.clip(frames, 0, 255)).astype(np.uint8)


def premultiplied(svg: str) -> Image.Image:
    """Rasterise an SVG with its colours multiplied by alpha, as averaging needs them."""
    rgba = rasterise(svg, SIZE_PX * SUPERSAMPLING // 2)
    rgba[..., :3] *= rgba[..., 3:] / 255
    return Image.fromarray(np.round(rgba).astype(np.uint8), "RGBA")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("--variants", type=int, default=16)
    args = parser.parse_args()
    sources = json.loads((EMOJI / "sources.json").read_text())

    def tarball(entry: dict) -> Path:
        return fetch(entry["package"], entry["version"], entry["sha256"], args.out / "npm")

    art, codes = Art(tarball(sources["styles"][STYLE])), emoji_codes(tarball(sources["names"]))
    subjects = read_concepts(HERE / "subjects.txt")
    labels: dict[str, list[dict[str, str]]] = {"train": [], "held-out": []}
    clips: dict[str, list[list[np.ndarray]]] = {"train": [], "held-out": []}
    for i, subject in enumerate(subjects):
        sprite = premultiplied(art.svg(codes[subject], zoom=1.0, shift=(0.0, 0.0)))
        for j, motion in enumerate(MOTIONS):
            split = "held-out" if is_held_out(i, j) else "train"
            key = np.array([i, j], dtype=np.uint64)
            rng = np.random.Generator(np.random.Philox(key=key))
            count = HELD_OUT_VARIANTS if split == "held-out" else args.variants
            labels[split].append({"subject": subject, "motion": motion})
            clips[split].append([draw_clip(sprite, motion, rng) for _ in range(count)])
        if sys.stderr.isatty():
            print(f"\rdrawn {i + 1}/{len(subjects)}", end="", file=sys.stderr)
    for split in labels:
        save_file({"clips": np.array(clips[split])}, args.out / f"{split}.safetensors")
        (args.out / f"{split}.json").write_text(json.dumps(labels[split], indent=0))
    names = [f"{lb['subject']} {lb['motion']}" for lb in labels["train"]]
    (HERE / "prompts.txt").write_text(
        "\n".join(p for n in names for p in (n, f"a {n}")) + "\n", encoding="utf-8"
    )
    print(f"{len(labels['train'])} pairs to train on, {len(labels['held-out'])} held out -> {args.out}")


if __name__ == "__main__":
    main()
