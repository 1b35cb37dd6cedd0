"""Train the video demo's teacher: a small CogVideoX transformer on clips, v-prediction, resumable to the step.

    python examples/emoji_motion/train_teacher.py --run RUN_FOLDER [--export examples/emoji_motion/teacher]

Start it again with the same arguments to go on from the newest checkpoint; every random draw is a function of
(seed, step), so with a codec that was fitted before, a resumed run follows the unbroken one bit for bit.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from clips import sample_clips, save_sheet
from safetensors.torch import load_file

from flashbulb_distill.bundle import hash_file
from flashbulb_distill.core.schedule import add_noise
from flashbulb_distill.teachers.clip_codec import ClipCodec, clips_to_pixels, fit_clip_codec
from flashbulb_distill.teachers.denoiser import Condition, spread
from flashbulb_distill.teachers.emoji_motion import MotionDenoiser, build_transformer
from flashbulb_distill.teachers.text import encode_prompts, load_text_encoder, load_tokenizer
from flashbulb_distill.train.build import load_parameters
from flashbulb_distill.train.checkpoint import State, load_checkpoint, save_checkpoint

HERE = Path(__file__).parent
SEED = 20261128
BATCH = 32
CHANNELS = 128  # 28.4 dB on held-out clips; 96 would give 27.3, 64 26.0
LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
EMA = 0.998
CAPTION_DROPOUT = 0.1
TEMPLATES = ("{subject} {motion}", "a {subject} {motion}")
SHEET_GUIDANCE, SHEET_STEPS = 2.0, 16


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then sqrt(1 - progress)."""
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--stop-at", type=int, default=None, help="stop early, at this step of the schedule")
    parser.add_argument("--export", type=Path, default=None, help="the teacher folder to write at the end")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--sheet-every", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run.mkdir(parents=True, exist_ok=True)

    # Data: latents of every variant, and every caption's embedding.
    clips = load_file(args.data / "train.safetensors")["clips"]
    labels = json.loads((args.data / "train.json").read_text())
    held_out = json.loads((args.data / "held-out.json").read_text())
    pairs, num_variants = clips.shape[:2]
    if not (args.run / "codec" / "config.json").exists():
        codec = ClipCodec(CHANNELS)
        fit_clip_codec(codec, clips_to_pixels(clips[:, ::4].flatten(0, 1)))
        codec.save_pretrained(args.run / "codec")
    codec = ClipCodec.from_pretrained(args.run / "codec")
    with torch.no_grad():
        latents = torch.stack([codec.encode(clips_to_pixels(group)) for group in clips])
    del clips
    captions = [template.format(**label) for label in labels for template in TEMPLATES]
    shown = [TEMPLATES[0].format(**label) for label in [*labels[::20], *held_out[::4]]]
    cond = Condition(*encode_prompts(load_text_encoder(), load_tokenizer(), [*captions, *shown, ""]))
    empty = len(cond) - 1

    # Network and optimiser.
    torch.manual_seed(SEED)  # here: fitting a codec draws numbers, loading one does not
    denoiser = MotionDenoiser(build_transformer(channels=CHANNELS))
    averages = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    identity = f"steps {args.steps}, data {hash_file(args.data / 'train.safetensors')}"
    state = State({"teacher": denoiser}, {"teacher": optimizer}, averages)
    step = load_checkpoint(args.run, state, identity)
    if step:
        print(f"going on from step {step}", flush=True)

    log = (args.run / "log.jsonl").open("a")
    started, cpu_started, started_step, losses = time.monotonic(), time.process_time(), step, []
    stop_at = args.stop_at or args.steps
    while step < stop_at:
        # Draw the batch.
        rng = np.random.Generator(np.random.Philox(key=np.array([SEED, step], dtype=np.uint64)))
        pair = rng.integers(0, pairs, BATCH)
        variant = rng.integers(0, num_variants, BATCH)
        caption = pair * len(TEMPLATES) + rng.integers(0, len(TEMPLATES), BATCH)
        caption = np.where(rng.uniform(0, 1, BATCH) < CAPTION_DROPOUT, empty, caption)
        t = torch.from_numpy(rng.uniform(0, 1, BATCH).astype(np.float32))
        x0 = latents[pair, variant]
        eps = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
        xt = add_noise(denoiser.schedule, x0, eps, spread(t, x0))
        # v = alpha eps - sigma x0 is the schedule's own derivative: noise where x0 stands, minus x0 where eps does.
        velocity = add_noise(denoiser.schedule, eps, -x0, spread(t, x0))

        # One step on the velocity's squared error.
        loss = (denoiser(xt, t, cond.take(torch.from_numpy(caption))) - velocity).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            decay = min(EMA, (1 + step) / (10 + step))
            for name, parameter in denoiser.named_parameters():
                averages[name].lerp_(parameter, 1 - decay)
        step += 1

        # Report, show and save.
        losses.append(loss.item())
        if step % 50 == 0:
            done = (step - started_step) * BATCH
            line = {
                "step": step,
                "loss": round(float(np.mean(losses)), 4),
                "clips_per_s": round(done / (time.monotonic() - started), 1),
                "clips_per_cpu_s": round(done / (time.process_time() - cpu_started), 1),
            }
            losses.clear()
            print(json.dumps(line), file=log, flush=True)
            print(line, flush=True)
        if step % args.save_every == 0 or step == stop_at:
            save_checkpoint(args.run, step, state, identity)
        if step % args.sheet_every == 0 or step == stop_at:
            rows = cond.take(torch.arange(len(captions), empty))
            draw_sheet(
                args.run / f"sheet-{step:05}.png",
                denoiser,
                averages,
                codec,
                rows,
                cond.take(torch.tensor([empty])),
            )
    if args.export:
        load_parameters(denoiser, averages)
        denoiser.transformer.half().save_pretrained(args.export / "transformer")
        codec.register_to_config(_name_or_path="")  # of this machine
        codec.half().save_pretrained(args.export / "codec")


@torch.no_grad()
def draw_sheet(
    path: Path,
    denoiser: MotionDenoiser,
    averages: dict[str, torch.Tensor],
    codec: ClipCodec,
    cond: Condition,
    uncond: Condition,
) -> None:
    """Draw each condition's clip with the averaged network, eight of its frames in a row."""
    kept = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    load_parameters(denoiser, averages)
    noise = torch.randn((len(cond), CHANNELS, 4, 4, 4), generator=torch.Generator().manual_seed(1))
    clips = sample_clips(denoiser, codec, noise, cond, uncond, num_steps=SHEET_STEPS, guidance=SHEET_GUIDANCE)
    save_sheet(path, clips)
    load_parameters(denoiser, kept)


if __name__ == "__main__":
    main()
