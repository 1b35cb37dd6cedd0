"""Draw the demo's pictures: every concept in three open art styles, from npm packages.

    python examples/emoji/prepare.py [--out examples/emoji/data] [--variants 16]

Writes reference.safetensors + reference.json (one centred picture of each concept and style, 64 x 64, with its
split), train.safetensors + train.json (seeded shifted and scaled variants of the training split), and beside this
script prompts.txt and variants.json (the prompts that name a style, by the one that names none). One style of every
tenth concept is held out: it is in the reference as "held-out" and never in the training file.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from art import Art, emoji_codes, fetch, rasterise, read_concepts
from safetensors.numpy import save_file

HERE = Path(__file__).parent
STYLES = ("noto", "twemoji", "fluent")
SIZE_PX = 64
RENDER_PX = 128
HELD_OUT_EVERY = 10


def held_out_style(concept_index: int) -> str | None:
    """Return the style that concept number `concept_index` must never be trained in, if any."""
    if concept_index % HELD_OUT_EVERY != HELD_OUT_EVERY - 1:
        return None
    return STYLES[(concept_index // HELD_OUT_EVERY) % len(STYLES)]


def draw(svg: str) -> np.ndarray:
    """Rasterise on white: uint8 [64, 64, 3], each pixel the mean of 2 x 2 rendered ones."""
    image = rasterise(svg, RENDER_PX)
    alpha = image[..., 3:] / 255
    rgb = image[..., :3] * alpha + 255 * (1 - alpha)
    ratio = RENDER_PX // SIZE_PX
    rgb = rgb.reshape(SIZE_PX, ratio, SIZE_PX, ratio, 3).mean(axis=(1, 3))
    return np.round(rgb).astype(np.uint8)


def variants(count: int, *, key: tuple[int, int]) -> Iterator[tuple[float, tuple[float, float]]]:
    """Yield `count` seeded (zoom, shift) pairs: zoom .90 to 1, shift up to 3 % of the side."""
    rng = np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))
    for _ in range(count):
        zoom, dx, dy = rng.uniform((0.90, -0.03, -0.03), (1.0, 0.03, 0.03))
        yield float(zoom), (float(dx), float(dy))


def training_prompts(concepts: list[str]) -> list[str]:
    """List the prompts to distil with, half of them without a style word; held-out pairs are never named."""
    prompts = []
    for index, concept in enumerate(concepts):
        prompts += [concept] * 4 + [f"a {concept}"] * 2
        for style in STYLES:
            if style != held_out_style(index):
                prompts += [f"{concept}, {style} style", f"{style} emoji of {concept}"]
    return prompts


def prompt_variants(concepts: list[str]) -> dict[str, list[str]]:
    """List for each prompt without a style word those that name one; held-out pairs are never named."""
    table = {}
    for index, concept in enumerate(concepts):
        styles = [style for style in STYLES if style != held_out_style(index)]
        for prompt in (concept, f"a {concept}"):
            table[prompt] = [f"{concept}, {style} style" for style in styles]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("--variants", type=int, default=16)
    args = parser.parse_args()
    sources = json.loads((HERE / "sources.json").read_text())
    cache = args.out / "npm"

    def tarball(entry: dict) -> Path:
        return fetch(entry["package"], entry["version"], entry["sha256"], cache)

    codes = emoji_codes(tarball(sources["names"]))
    art = {style: Art(tarball(sources["styles"][style])) for style in STYLES}

    labels, centred, train_labels, train_images = [], [], [], []
    concepts = read_concepts(HERE / "concepts.txt")
    for index, concept in enumerate(concepts):
        for style_index, style in enumerate(STYLES):
            held_out = style == held_out_style(index)
            label = {"concept": concept, "style": style, "split": "held-out" if held_out else "train"}
            labels.append(label)
            centred.append(draw(art[style].svg(codes[concept], zoom=0.95, shift=(0.0, 0.0))))
            if not held_out:
                train_labels.append(label)
                moves = variants(args.variants, key=(index, style_index))
                train_images.append([draw(art[style].svg(codes[concept], zoom=z, shift=s)) for z, s in moves])
        if sys.stderr.isatty():
            print(f"\rdrawn {index + 1}/{len(concepts)}", end="", file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({"images": np.stack(centred)}, args.out / "reference.safetensors")
    (args.out / "reference.json").write_text(json.dumps(labels, indent=0))
    save_file({"images": np.array(train_images)}, args.out / "train.safetensors")
    (args.out / "train.json").write_text(json.dumps(train_labels, indent=0))
    (HERE / "prompts.txt").write_text("\n".join(training_prompts(concepts)) + "\n", encoding="utf-8")
    variants_of = json.dumps(prompt_variants(concepts), indent=0)
    (HERE / "variants.json").write_text(variants_of + "\n", encoding="utf-8")
    print(
        f"{len(concepts)} concepts, {len(labels)} pictures, {len(train_labels)} of them for training -> {args.out}"
    )


if __name__ == "__main__":
    main()
