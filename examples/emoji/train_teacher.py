"""Train the demo teacher: a small SD3 transformer on emoji, flow matching, resumable to the step.

    python examples/emoji/train_teacher.py --run RUN_FOLDER [--export examples/emoji/teacher]

Run train_codec.py on RUN_FOLDER/codec before it ends: the export takes the codec from there. Start it again with the
same arguments to go on from the newest checkpoint; every random draw is a function of (seed, step), so a resumed run
follows the unbroken one.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from flashbulb_distill.bundle import hash_file
from flashbulb_distill.teachers.patch_codec import PatchCodec, fit_linear, to_pixels
from flashbulb_distill.teachers.text import encode_prompts, load_text_encoder, load_tokenizer
from flashbulb_distill.train.checkpoint import State, load_checkpoint, save_checkpoint

HERE = Path(__file__).parent
SEED = 20261122
BATCH = 32
LEARNING_RATE = 1e-3
WARMUP_STEPS = 300
EMA = 0.9995
CAPTION_DROPOUT = 0.1
# Templates of a caption and how often each is drawn; a style word is in six of ten.
TEMPLATES = ("{name}", "a {name}", "{name}, {style} style", "{style} emoji of {name}")
TEMPLATE_WEIGHTS = (0.3, 0.1, 0.4, 0.2)


def build_transformer() -> SD3Transformer2DModel:
    """Build the teacher's network: 4 joint blocks of width 192 over 8 x 8 latent tokens and 14 text tokens."""
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=64,
        out_channels=64,
        num_layers=4,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=384,
        caption_projection_dim=192,
        pooled_projection_dim=384,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    for block in model.transformer_blocks:  # each block starts as the identity
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1_context.linear.weight)
    torch.nn.init.zeros_(model.norm_out.linear.weight)
    torch.nn.init.zeros_(model.proj_out.weight)
    return model


def optimizer_of(model: SD3Transformer2DModel) -> torch.optim.AdamW:
    """Return the teacher's optimiser; its learning rate is set at each step."""
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then sqrt(1 - progress)."""
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps) ** 0.5


def ema_decay(step: int) -> float:
    """Short memory early, so that the average forgets the start."""
    return min(EMA, (1 + step) / (10 + step))


def draw_times(rng: np.random.Generator, count: int) -> np.ndarray:
    """Logit-normal times centred a little above the middle, a tenth of them uniform to reach both ends."""
    times = 1 / (1 + np.exp(-rng.normal(0.3, 1.0, count)))
    uniform = rng.uniform(0, 1, count)
    return np.where(rng.uniform(0, 1, count) < 0.1, uniform, times).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument(
        "--stop-at", type=int, default=None, help="stop early, at this step of the same schedule"
    )
    parser.add_argument("--export", type=Path, default=None, help="the teacher folder to write at the end")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--save-every", type=int, default=500)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    args.run.mkdir(parents=True, exist_ok=True)

    # Data: latents of every variant [images, variants, 64, 8, 8], and every caption's embedding.
    images = load_file(args.data / "train.safetensors")["images"]
    labels = json.loads((args.data / "train.json").read_text())
    count, num_variants = images.shape[:2]
    codec = PatchCodec()
    fit_linear(codec, to_pixels(images[:, 0]))
    if (args.run / "codec" / "config.json").exists():
        codec = PatchCodec.from_pretrained(args.run / "codec")
    else:
        codec.save_pretrained(args.run / "codec")
    with torch.no_grad():
        latents = torch.stack([codec.encode(to_pixels(group)) for group in images])
    captions = [t.format(name=lb["concept"], style=lb["style"]) for lb in labels for t in TEMPLATES]
    tokens, pooled = encode_prompts(load_text_encoder(), load_tokenizer(), [*captions, ""])
    empty = len(captions)

    # Networks and optimiser.
    model = build_transformer()
    averages = {name: p.detach().clone() for name, p in model.named_parameters()}
    modules, optimizers = {"teacher": model}, {"teacher": optimizer_of(model)}
    optimizer = optimizers["teacher"]
    identity = f"steps {args.steps}, data {hash_file(args.data / 'train.safetensors')}"
    state = State(modules, optimizers, averages)
    step = load_checkpoint(args.run, state, identity)
    if step:
        print(f"going on from step {step}")

    log = (args.run / "log.jsonl").open("a")
    started, started_step, losses = time.monotonic(), step, []
    stop_at = args.stop_at or args.steps
    while step < stop_at:
        # Draw the batch.
        rng = np.random.Generator(np.random.Philox(key=np.array([SEED, step], dtype=np.uint64)))
        image = rng.integers(0, count, BATCH)
        variant = rng.integers(0, num_variants, BATCH)
        template = rng.choice(len(TEMPLATES), BATCH, p=TEMPLATE_WEIGHTS)
        caption = np.where(
            rng.uniform(0, 1, BATCH) < CAPTION_DROPOUT, empty, image * len(TEMPLATES) + template
        )
        t = torch.from_numpy(draw_times(rng, BATCH))
        x0 = latents[image, variant]
        eps = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
        at = t[:, None, None, None]
        xt = (1 - at) * x0 + at * eps

        # One step: the network predicts x0; the weight makes it the velocity's squared error.
        with torch.autocast("cpu", torch.bfloat16):
            out = model(
                hidden_states=xt,
                timestep=t * 1000,
                encoder_hidden_states=tokens[caption],
                pooled_projections=pooled[caption],
                return_dict=False,
            )[0]
        loss = ((out.float() - x0) / at.clamp(min=0.1)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            decay = ema_decay(step)
            for name, parameter in model.named_parameters():
                averages[name].lerp_(parameter, 1 - decay)
        step += 1

        # Report and save.
        losses.append(loss.item())
        if step % 100 == 0:
            rate = (step - started_step) * BATCH / (time.monotonic() - started)
            line = {"step": step, "loss": round(float(np.mean(losses)), 4), "samples_per_s": round(rate, 1)}
            losses.clear()
            print(json.dumps(line), file=log, flush=True)
            print(line, flush=True)
        if step % args.save_every == 0 or step == stop_at:
            save_checkpoint(args.run, step, state, identity)
    if step == args.steps and args.export:
        export(args.export, model, averages, PatchCodec.from_pretrained(args.run / "codec"))


def export(
    folder: Path, model: SD3Transformer2DModel, averages: dict[str, torch.Tensor], codec: PatchCodec
) -> None:
    """Write the averaged network and the codec as a teacher folder, in float16."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(averages[name])
    model.half().save_pretrained(folder / "transformer")
    codec.half().save_pretrained(folder / "codec")


if __name__ == "__main__":
    main()
