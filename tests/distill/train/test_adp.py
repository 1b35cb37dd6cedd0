"""ADP on the tiny teacher: who moves, and that the student is paid by the discriminators alone."""

from pathlib import Path

import pytest
import torch

from flashbulb_distill.core.draws import Draws
from flashbulb_distill.pairs.store import Pairs
from flashbulb_distill.teachers.emoji import load_emoji_teacher
from flashbulb_distill.teachers.open import open_teacher
from flashbulb_distill.train.build import Inputs, build_adp
from flashbulb_distill.train.recipe import load_recipe
from support.tiny_pipelines import make_tiny_pipeline
from support.tiny_teacher import make_tiny_teacher

RECIPE = Path(__file__).parents[3] / "distill" / "recipes" / "emoji.yaml"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_emoji_teacher(make_tiny_teacher(tmp_path_factory.mktemp("teacher")))


def make(teacher, *overrides):
    settings = ["adp.batch_size=4", "adp.pixel_batch=2", "adp.taps=[-1,0,1]", "precision=float32"]
    recipe = load_recipe(RECIPE, [*settings, *overrides])
    draws = Draws(0)
    pairs = Pairs(
        torch.from_numpy(draws.normal("x_T", 0, range(6), (64, 8, 8))),
        torch.from_numpy(draws.normal("x_0", 0, range(6), (64, 8, 8))),
        torch.tensor([0, 1, 0, 1, 0, 1]),
        ("red apple", "a rocket"),
    )
    return build_adp(Inputs(recipe, teacher, teacher.encode(pairs.prompts), teacher.encode_uncond(), pairs))


def weights(modules):
    return {
        role: torch.cat([p.detach().flatten().clone() for p in m.parameters()]) for role, m in modules.items()
    }


def test_heads_learn_during_the_warm_up_and_the_student_only_after_it(teacher):
    method = make(teacher, "adp.warmup_steps=1")
    frozen = {"teacher": teacher.denoiser, "codec": teacher.codec}
    start, start_frozen = weights(method.modules), weights(frozen)
    method.step(0)
    middle = weights(method.modules)
    assert {role: torch.equal(start[role], middle[role]) for role in start} == {
        "student": True,
        "latent": False,
        "pixel": False,
    }
    logs = method.step(1)
    assert not torch.equal(middle["student"], weights(method.modules)["student"])
    assert logs["student_norm"] > 0
    end_frozen = weights(frozen)
    assert all(torch.equal(start_frozen[name], end_frozen[name]) for name in frozen)


def test_discriminators_learn_to_tell_the_pairs_from_the_students_guesses(teacher):
    method = make(teacher, "adp.warmup_steps=1000", "adp.rates.heads=0.003")
    first = method.step(0)
    for step in range(1, 12):
        last = method.step(step)
    assert last["pixel_hinge"] < first["pixel_hinge"] - 0.2
    assert last["latent_hinge"] < first["latent_hinge"] - 0.1


def test_without_the_pixel_weight_there_is_no_pixel_discriminator(teacher):
    method = make(teacher, "adp.lambda_pixel=0", "adp.warmup_steps=0")
    assert set(method.modules) == {"student", "latent"}
    assert "pixel_hinge" not in method.step(0)


def test_a_decoder_whose_blocks_are_recomputed_keeps_less_and_gives_the_same_gradient(tmp_path):
    """Of SDXL at 1024 pixels its activations are 22 GiB a picture, more than all that was recomputed before."""
    folder = make_tiny_pipeline(tmp_path / "teacher", "sdxl")
    small = [
        f"teacher={folder}",
        "variant=null",
        "shape.width=64",
        "shape.height=64",
        "adp.taps=[0]",
        "adm=null",
    ]
    made = {}
    for again in (False, True):
        recipe = load_recipe(
            RECIPE.with_name("sdxl_1step.yaml"), [*small, f"memory.checkpointing={str(again).lower()}"]
        )
        teacher = open_teacher(recipe.family, recipe.teacher, shape=recipe.shape)
        uncond = teacher.encode_uncond()
        latents = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
        pairs = Pairs(latents, latents, torch.tensor([0]), ("red",))
        decode = build_adp(Inputs(recipe, teacher, uncond, uncond, pairs)).decode
        kept = []

        def keep(tensor, kept=kept):
            kept.append(tensor.nbytes)
            return tensor

        latents.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            pixels = decode(latents)
        (gradient,) = torch.autograd.grad(pixels.square().sum(), latents)
        made[again] = pixels.detach(), gradient, sum(kept)
    assert torch.equal(made[True][0], made[False][0])
    assert torch.equal(made[True][1], made[False][1])
    assert made[True][2] < 0.5 * made[False][2]
