"""Train the demo codec's de-blocking decoder; the linear part, and so the latents, stay as they were fitted.

    python examples/emoji/train_codec.py --codec RUN_FOLDER/codec [--steps 3000]

Latents are perturbed with noise of random strength, so that the decoder learns to draw clean edges from latents
that a denoiser got slightly wrong. The loss is the absolute error: flat art has sharp edges, and its median does too.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from flashbulb_distill.teachers.patch_codec import PatchCodec, to_pixels

HERE = Path(__file__).parent
SEED = 20261123
BATCH = 32
LEARNING_RATE = 2e-3
MAX_NOISE = 0.4  # standard deviation, of latents with standard deviation 1


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio of pixels in [-1, 1], in dB."""
    return float(-10 * torch.log10(((a - b).clamp(-2, 2) / 2).square().mean()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    images = load_file(args.data / "train.safetensors")["images"]
    codec = PatchCodec.from_pretrained(args.codec)
    codec.analysis.requires_grad_(False)
    codec.synthesis.requires_grad_(False)
    trained = [p for p in codec.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(args.steps):
        rng = np.random.Generator(np.random.Philox(key=np.array([SEED, step], dtype=np.uint64)))
        rows = rng.integers(0, images.shape[0], BATCH), rng.integers(0, images.shape[1] - 1, BATCH)
        pixels = to_pixels(images[rows])
        strength = torch.from_numpy(rng.uniform(0, MAX_NOISE, (BATCH, 1, 1, 1)).astype(np.float32))
        with torch.no_grad():
            latents = codec.encode(pixels)
            latents = latents + strength * torch.from_numpy(
                rng.standard_normal(latents.shape, dtype=np.float32)
            )
        loss = (codec.decode(latents) - pixels).abs().mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 100) * (1 - step / args.steps)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print({"step": step + 1, "loss": round(loss.item(), 4)}, flush=True)
    # The last variant of each picture was never trained on.
    with torch.no_grad():
        pixels = to_pixels(images[:, -1])
        latents = codec.encode(pixels)
        for noise in (0.0, 0.2):
            noisy = latents + noise * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
            linear, full = codec.synthesis(noisy), codec.decode(noisy)
            print(
                f"noise {noise}: linear {psnr(linear, pixels):.2f} dB, de-blocked {psnr(full, pixels):.2f} dB"
            )
    codec.save_pretrained(args.codec)


if __name__ == "__main__":
    main()
