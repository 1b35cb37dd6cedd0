"""Each switch of a recipe changes what it says, and nothing else by default."""

from pathlib import Path

import pytest
import torch

from flashbulb_distill.core.draws import Draws
from flashbulb_distill.core.times import logit_normal_times
from flashbulb_distill.losses import discriminator_hinge
from flashbulb_distill.networks.discriminators import VectorDiscriminator
from flashbulb_distill.networks.heads import Head, Heads
from flashbulb_distill.networks.point import PointDenoiser
from flashbulb_distill.pairs.store import Pairs
from flashbulb_distill.teachers.denoiser import Condition
from flashbulb_distill.teachers.emoji import load_emoji_teacher
from flashbulb_distill.teachers.mixture import MixtureDenoiser, ring
from flashbulb_distill.train.adm import Adm
from flashbulb_distill.train.build import Inputs, build
from flashbulb_distill.train.checkpoint import read_module
from flashbulb_distill.train.recipe import AdmRecipe, Rates, RecipeError, load_recipe
from flashbulb_distill.train.trainer import train
from support.tiny_teacher import make_tiny_teacher

RECIPE = Path(__file__).parents[3] / "distill" / "recipes" / "emoji.yaml"
NO_PROMPT = Condition(torch.zeros(1, 1, 1), torch.zeros(1, 1))


class Recorder(VectorDiscriminator):
    """A discriminator that keeps the times and points it was shown."""

    def __init__(self):
        super().__init__(2)
        self.seen = []

    def forward(self, xt, t, cond):
        self.seen.append((xt.detach().clone(), t))
        return super().forward(xt, t, cond)


def adm(**settings):
    torch.manual_seed(0)
    roles = {"student": PointDenoiser(2), "fake": PointDenoiser(2), "latent": Recorder()}
    shared = {"steps": 9, "batch_size": 64, "taps": (-1,), "guidance": 1.0, "delta_t": 1 / 16}
    return Adm(
        recipe=AdmRecipe(**shared | {"rates": Rates(student=1e-3, heads=1e-3)} | settings),
        draws=Draws(0),
        cond=NO_PROMPT,
        uncond=NO_PROMPT,
        latent_shape=(2, 1, 1),
        time_steps=(1.0,),
        teacher=MixtureDenoiser(ring(4), 0.2),
        optimizers={role: torch.optim.SGD(m.parameters(), lr=1e-2) for role, m in roles.items()},
        **roles,
    )


def flat(module):
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def test_the_ways_to_combine_heads_are_the_losses_that_they_say():
    torch.manual_seed(0)
    heads = [Head(5), Head(3)]
    maps = [torch.randn(4, 5, 8, 8), torch.randn(4, 3, 4, 4)]
    other = [torch.randn(4, 5, 8, 8), torch.randn(4, 3, 4, 4)]
    t = torch.rand(4)
    places = [[head(m, t) for head, m in zip(heads, side, strict=True)] for side in (maps, other)]

    def loss(combine):
        both = Heads(heads, combine)
        return discriminator_hinge(both(maps, t), both(other, t))

    torch.testing.assert_close(loss("places"), discriminator_hinge(*[torch.cat(side, 1) for side in places]))
    own = [
        discriminator_hinge(real.mean(1, keepdim=True), fake.mean(1, keepdim=True))
        for real, fake in zip(*places, strict=True)
    ]
    torch.testing.assert_close(loss("heads"), sum(own) / 2)
    means = [sum(head.mean(1, keepdim=True) for head in side) / 2 for side in places]
    torch.testing.assert_close(loss("sample"), discriminator_hinge(*means))


def test_the_penalty_is_off_by_default_and_makes_the_heads_flatter_around_the_reals():
    changes = {}
    for weight in (0.0, 1e5):
        method = adm(warmup_steps=100, r1_weight=weight, r1_std=0.01, delta_t=0.5)
        method.optimizers["latent"] = torch.optim.Adam(method.latent.parameters(), lr=3e-3)
        for step in range(60):
            method.step(step)
        real, t = (
            torch.randn(256, 2, 1, 1, generator=torch.Generator().manual_seed(1)),
            torch.full((256,), 0.5),
        )
        with torch.no_grad():
            here, there = (method.latent(x, t, NO_PROMPT) for x in (real, real + 0.05))
        changes[weight] = (here - there).abs().mean().item()
    assert changes[1e5] < 0.5 * changes[0.0]
    assert AdmRecipe.model_fields["r1_weight"].default == 0


def test_without_the_penalty_no_reals_are_shaken():
    for weight, calls in ((0.0, 1), (1.0, 2)):
        method = adm(warmup_steps=100, r1_weight=weight)
        method.step(0)
        assert len(method.latent.seen) == calls


def test_ida_pulls_the_fake_score_by_its_share_after_a_student_update_only():
    plain, pulled = adm(warmup_steps=1), adm(warmup_steps=1, ida=0.25)
    for method in (plain, pulled):
        method.step(0)
    assert torch.equal(flat(plain.fake), flat(pulled.fake)), "the student stood still"
    for method in (plain, pulled):
        method.step(1)
    torch.testing.assert_close(flat(pulled.fake), 0.75 * flat(plain.fake) + 0.25 * flat(plain.student))
    assert torch.equal(flat(pulled.student), flat(plain.student))


def test_adms_times_are_uniform_or_logit_normal_within_their_range():
    uniform, normal = adm(), adm(time_distribution="logit-normal", time_mean=1.0, time_std=0.5)
    for method in (uniform, normal):
        method.step(0)
    u = Draws(0).uniform("adm/time", 0, range(64))
    low = 1 / 16
    cut = logit_normal_times(u, mean=1.0, std=0.5, low=low, high=0.98)
    for method, times in ((uniform, low + (0.98 - low) * u), (normal, cut)):
        after = torch.from_numpy(times).float() - 1 / 16
        torch.testing.assert_close(method.latent.seen[0][1][:64], after, atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_emoji_teacher(make_tiny_teacher(tmp_path_factory.mktemp("teacher")))


def inputs(teacher, *overrides, start=None, heads=None):
    small = ["precision=float32", "adp.batch_size=4", "adp.pixel_batch=2", "adm.batch_size=4"]
    taps = ["adp.taps=[-1,0,1]", "adm.taps=[-1,0,1]", "adp.warmup_steps=1", "adp.pixel_backbone=none"]
    recipe = load_recipe(RECIPE, [*small, *taps, *overrides])
    draws = Draws(0)
    pairs = Pairs(
        torch.from_numpy(draws.normal("x_T", 0, range(6), (64, 8, 8))),
        torch.from_numpy(draws.normal("x_0", 0, range(6), (64, 8, 8))),
        torch.tensor([0, 1, 0, 1, 0, 1]),
        ("red apple", "a rocket"),
    )
    cond, uncond = teacher.encode(pairs.prompts), teacher.encode_uncond()
    return Inputs(recipe, teacher, cond, uncond, pairs, start, heads)


def test_without_a_pixel_backbone_there_is_no_pixel_discriminator(teacher):
    assert set(build("adp", inputs(teacher)).modules) == {"student", "latent"}
    with_lite0 = build("adp", inputs(teacher, "adp.pixel_backbone=lite0", "adp.pixel_size=32"))
    assert set(with_lite0.modules) == {"student", "latent", "pixel"}


def test_adm_starts_from_adps_heads_where_it_carries_them_over(teacher, tmp_path):
    adp = build("adp", inputs(teacher))
    train(adp, tmp_path, stage="adp", steps=2, ema=0.9, identity="a")
    heads = read_module(tmp_path, "latent")
    fresh, carried = build("adm", inputs(teacher)), build("adm", inputs(teacher, heads=heads))
    assert torch.equal(flat(carried.modules["latent"]), flat(adp.modules["latent"]))
    assert not torch.equal(flat(fresh.modules["latent"]), flat(adp.modules["latent"]))
    with pytest.raises(FileNotFoundError, match="with the role pixel, found none"):
        read_module(tmp_path, "pixel")


@pytest.mark.parametrize(
    ("section", "roles"),
    [
        (
            "dmd={steps: 2, batch_size: 2, rates: {student: 1e-5, heads: 1e-4}, guidance: 2.0}",
            {"student", "fake"},
        ),
        (
            "dmd={steps: 2, batch_size: 2, rates: {student: 1e-5, heads: 1e-4}, guidance: 2, gan_weight: 1, taps: [0]}",
            {"student", "fake", "latent"},
        ),
        (
            "ladd={steps: 2, batch_size: 2, rates: {student: 1e-5, heads: 1e-4}, taps: [-1, 1]}",
            {"student", "latent"},
        ),
        ("lcm={steps: 2, batch_size: 2, rate: 1e-5, guidance: 2.0}", {"student", "target"}),
    ],
)
def test_a_recipes_further_stages_are_built_and_step_on_a_teacher_of_pictures(teacher, section, roles):
    made = inputs(teacher, section)
    stage = section.split("=")[0]
    assert list(made.recipe.stages) == ["regression", "adp", "adm", stage]
    method = build(stage, made)
    assert set(method.modules) == roles
    before = {role: flat(module) for role, module in method.modules.items()}
    logs = method.step(0)
    assert logs["student_norm"] > 0
    assert all(not torch.equal(before[role], flat(module)) for role, module in method.modules.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adm.carry_heads=true", "adp.taps=[0]"], "a section adp with adm's taps"),
        (["adm.carry_heads=true", "adp=null"], "a section adp with adm's taps"),
        (
            ["dmd={steps: 1, batch_size: 2, rates: {student: 1, heads: 1}, guidance: 1, gan_weight: 1}"],
            "expected blocks for the heads of the GAN term",
        ),
        (
            [
                "pairs=null",
                "regression=null",
                "adp=null",
                "lcm={steps: 1, batch_size: 2, rate: 1, guidance: 1}",
            ],
            "lcm learns from ODE pairs",
        ),
        (["adm.combine=all"], "'places', 'heads' or 'sample'"),
    ],
)
def test_a_switch_that_cannot_be_obeyed_is_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(RECIPE, overrides)
