"""ADM against what is known exactly."""

from pathlib import Path

import pytest
import torch

from flashbulb_distill.bundle import Shape
from flashbulb_distill.core.draws import Draws
from flashbulb_distill.core.schedule import add_noise, ode_step
from flashbulb_distill.networks.discriminators import LatentDiscriminator, VectorDiscriminator
from flashbulb_distill.networks.point import PointDenoiser
from flashbulb_distill.teachers.denoiser import Condition, spread
from flashbulb_distill.teachers.mixture import MixtureDenoiser, ring
from flashbulb_distill.teachers.open import open_teacher
from flashbulb_distill.train.adm import Adm, keep_position
from flashbulb_distill.train.recipe import AdmRecipe, Rates, load_recipe
from support.tiny_pipelines import make_tiny_pipeline

RECIPES = Path(__file__).parents[3] / "distill" / "recipes"
NO_PROMPT = Condition(torch.zeros(1, 1, 1), torch.zeros(1, 1))


class Recorder(VectorDiscriminator):
    """A discriminator that keeps the pairs it was shown."""

    def __init__(self):
        super().__init__(2)
        self.seen = []

    def forward(self, xt, t, cond):
        self.seen.append((xt.detach().clone(), t.clone()))
        return super().forward(xt, t, cond)


def make(latent, *, fake=None, student=None, teacher=None, time_steps=(1.0,), **overrides):
    torch.manual_seed(0)
    options = {
        "steps": 10,
        "batch_size": 16,
        "rates": Rates(student=1e-3, heads=1e-3, fake=1e-3),
        "taps": (-1,),
    }
    options |= {"guidance": 1.0, "delta_t": 1 / 16, "time_range": (0.1, 0.9)} | overrides
    recipe = AdmRecipe(**options)
    student, fake = student or PointDenoiser(2), fake or PointDenoiser(2)
    rate = {"student": student, "fake": fake, "latent": latent}
    optimizers = {
        role: torch.optim.SGD(list(module.parameters()) or [torch.zeros(1, requires_grad=True)], lr=1e-2)
        for role, module in rate.items()
    }
    return Adm(
        recipe=recipe,
        draws=Draws(0),
        cond=NO_PROMPT,
        uncond=NO_PROMPT,
        latent_shape=(2, 1, 1),
        time_steps=time_steps,
        teacher=teacher or MixtureDenoiser(ring(4), 0.2),
        student=student,
        fake=fake,
        latent=latent,
        optimizers=optimizers,
    )


class FrozenCopy(MixtureDenoiser):
    """The teacher as a fake score that no update can move."""

    def __init__(self):
        super().__init__(ring(4), 0.2)
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, xt, t, cond):
        return super().forward(xt, t, cond) + 0 * self.unused


def test_with_fake_equal_to_teacher_and_no_guidance_the_discriminator_sees_one_and_the_same_point():
    """Both steps are then identical, so no discriminator can do better than zero information: hinge 2 at best."""
    latent = Recorder()
    method = make(latent, fake=FrozenCopy())
    for step in range(3):
        logs = method.step(step)
        both, times = latent.seen[2 * step]
        real, fake = both.chunk(2)
        assert torch.equal(real, fake)
        assert torch.equal(*times.chunk(2))
        assert logs["margin"] == 0
        assert logs["latent_hinge"] >= 2 - 1e-6
        assert logs["dmd"] == 0


def test_the_two_points_differ_by_delta_t_times_the_difference_of_velocities():
    latent = Recorder()
    method = make(latent, warmup_steps=5)
    method.step(0)
    both, times = latent.seen[0]
    real, fake = both.chunk(2)
    rows, draws = range(16), method.draws
    noise, eps = (
        torch.from_numpy(draws.normal(f"adm/{name}", 0, rows, (2, 1, 1))) for name in ("start/0", "noise")
    )
    t = torch.from_numpy(0.1 + 0.8 * draws.uniform("adm/time", 0, rows)).float()
    torch.testing.assert_close(times[:16], t - 1 / 16)
    at = t[:, None, None, None]
    with torch.no_grad():
        xt = (1 - at) * method.student(noise, torch.ones(16), NO_PROMPT) + at * eps
        guesses = [network(xt, t, NO_PROMPT) for network in (method.fake, method.teacher)]
    fake_velocity, real_velocity = ((xt - guess) / at for guess in guesses)
    torch.testing.assert_close(fake, xt - fake_velocity / 16)
    torch.testing.assert_close(fake - real, (real_velocity - fake_velocity) / 16, atol=1e-6, rtol=1e-4)


def test_the_discriminator_is_conditioned_on_the_time_after_the_step():
    latent = Recorder()
    make(latent, warmup_steps=1).step(0)
    times = latent.seen[0][1]
    assert times.min() >= 0.1 - 1 / 16
    assert times.max() <= 0.9 - 1 / 16


@pytest.mark.parametrize("jacobian", ["detach", "full"])
def test_each_role_moves_by_its_own_loss_only(jacobian):
    """During the warm-up the student stands still; the teacher never moves."""
    method = make(VectorDiscriminator(2), warmup_steps=1, jacobian=jacobian)

    def snapshot():
        return {role: [p.clone() for p in m.parameters()] for role, m in method.modules.items()}

    before = snapshot()
    method.step(0)
    middle = snapshot()
    method.step(1)
    after = snapshot()
    for role in method.modules:
        moved_first = any(not torch.equal(a, b) for a, b in zip(before[role], middle[role], strict=True))
        moved_second = any(not torch.equal(a, b) for a, b in zip(middle[role], after[role], strict=True))
        assert moved_first == (role != "student"), role
        assert moved_second, role


@pytest.mark.parametrize("schedule", ["rectified-flow", "variance-preserving"])
def test_keep_position_changes_no_value_and_passes_the_positions_gradient(schedule):
    x0, eps = torch.randn(2, 3, 2, 1, 1)
    t, s = torch.tensor(0.6), torch.tensor(0.5)
    xt = add_noise(schedule, x0, eps, t).requires_grad_()
    xs = ode_step(schedule, x0, xt, t, s)
    kept = keep_position(schedule, xt, xs, t, s)
    assert torch.equal(kept, xs)
    (gradient,) = torch.autograd.grad(kept.sum(), xt)
    k = (
        1.0
        if schedule == "rectified-flow"
        else float(torch.cos(s * torch.pi / 2) / torch.cos(t * torch.pi / 2))
    )
    torch.testing.assert_close(gradient, torch.full_like(xt, k))


def test_full_jacobian_adds_the_score_networks_own_gradient():
    gradients = {}
    for jacobian in ("detach", "full"):
        method = make(VectorDiscriminator(2), jacobian=jacobian)
        before = [p.clone() for p in method.student.parameters()]
        method.step(0)
        gradients[jacobian] = torch.cat(
            [(b - p.detach()).flatten() for b, p in zip(before, method.student.parameters(), strict=True)]
        )
    assert gradients["detach"].norm() > 0
    assert not torch.allclose(gradients["detach"], gradients["full"], rtol=1e-3)


def test_the_fake_score_learns_the_students_distribution():
    """Against the exact answer: a student whose every output is one point makes E[x0 | xt] that point."""
    method = make(VectorDiscriminator(2), warmup_steps=10_000)
    method.optimizers["fake"].param_groups[0]["lr"] = 5e-2
    point = torch.tensor([0.8, -0.5])
    for parameter in method.student.parameters():
        parameter.data.zero_()
    method.student.body[-1].bias.data.copy_(point)
    xt, t = torch.randn(64, 2, 1, 1), torch.full((64,), 0.5)

    def error():
        with torch.no_grad():
            return float((method.fake(xt, t, NO_PROMPT).flatten(1) - point).abs().mean())

    before = error()
    for step in range(150):
        method.step(step)
    assert error() < 0.3 * before


class VideoStyleMixture(MixtureDenoiser):
    """The exact mixture in the terms of a video teacher: it predicts v, and keeps the variance."""

    prediction = "v"
    schedule = "variance-preserving"

    def forward(self, xt, t, cond):
        alpha, sigma = (spread(f(t * torch.pi / 2), xt) for f in (torch.cos, torch.sin))
        return (alpha * xt - super().forward(xt, t, cond)) / sigma.clamp(min=1e-6)


class WatchedStudent(VideoStyleMixture):
    """A student of one weight that keeps what it was shown, and whether gradients were on."""

    def __init__(self):
        super().__init__(ring(4), 0.2)
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.calls = []

    def forward(self, xt, t, cond):
        self.calls.append((xt.detach().clone(), float(t[0]), torch.is_grad_enabled()))
        return self.weight * super().forward(xt, t, cond)


FOUR_STEPS = (1.0, 0.75, 0.5, 0.25)


def multi_step():
    options = {
        "teacher": VideoStyleMixture(ring(4), 0.2),
        "student": WatchedStudent(),
        "time_steps": FOUR_STEPS,
    }
    latent = Recorder()
    return make(latent, fake=WatchedStudent(), **options), latent


def test_a_multi_step_student_is_trained_on_the_states_that_it_will_meet_when_it_is_used():
    """Backward simulation: the inputs are the student's own, re-noised; only the last, drawn step has a gradient."""
    method, _ = multi_step()
    stops = set()
    for step in range(12):
        method.student.calls.clear()
        method.step(step)
        calls = method.student.calls
        stops.add(len(calls))
        assert [t for _, t, _ in calls] == list(FOUR_STEPS[: len(calls)])
        assert [grad for *_, grad in calls] == [False] * (len(calls) - 1) + [True]
        noises = [
            torch.from_numpy(method.draws.normal(f"adm/start/{i}", step, range(16), (2, 1, 1)))
            for i in range(len(calls))
        ]
        torch.testing.assert_close(calls[0][0], noises[0])
        with torch.no_grad():
            for (xt, t, _), (met, s, _), noise in zip(calls, calls[1:], noises[1:], strict=False):
                # The weight moved by one small step since; what it was shown must lead from one state to the next.
                x0 = VideoStyleMixture.x0(method.teacher, xt, torch.full((16,), t), NO_PROMPT)
                angle = torch.tensor(s) * torch.pi / 2
                torch.testing.assert_close(met, angle.cos() * x0 + angle.sin() * noise, atol=0.1, rtol=0.1)
    assert stops == {1, 2, 3, 4}


def test_where_the_variance_is_preserved_both_steps_follow_that_flow():
    method, latent = multi_step()
    method.step(0)
    both, times = latent.seen[0]
    real, fake = both.chunk(2)
    assert torch.equal(*times.chunk(2))
    # Student, teacher and fake score are one and the same here, but for what the fake score just learnt.
    torch.testing.assert_close(real, fake, atol=0.05, rtol=0.05)
    assert torch.isfinite(both).all()


def test_at_a_short_step_the_order_of_the_two_sides_shows_a_seeing_discriminator_and_their_signs_do_not():
    """The story: hinge 2 and accuracy .50 were read as blind, while the student went where it should."""
    teacher = MixtureDenoiser(torch.tensor([[2.0, 0.0]]), 0.2)
    method = make(VectorDiscriminator(2), teacher=teacher, warmup_steps=999, delta_t=1 / 64, batch_size=64)
    method.optimizers["latent"] = torch.optim.Adam(method.latent.parameters(), lr=2e-3)
    method.optimizers["fake"].param_groups[0]["lr"] = 0.0  # a fake score that never gets better: plain to see
    logs = [method.step(step) for step in range(60)]
    last = {name: sum(log.get(name, 0.0) for log in logs[-10:]) / 10 for name in logs[-1]}
    assert last["ordered"] > 0.8
    signs = [value for name, value in last.items() if name.startswith("accuracy")]
    assert max(signs) < 0.65
    assert last["latent_hinge"] > 1.8


def best_accuracy(delta_t, t, std=0.5):
    """Return how often the best discriminator of all is right, for the student N(0, std^2) beside a ring of modes.

    Both sides push the density p of xt along their own velocity, so they differ by dt div(p dv) to first order, and the
    total variation is half of that's integral.
    """
    axis = torch.linspace(-4, 4, 401)
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], 1)[..., None, None]
    variance = (1 - t) ** 2 * std**2 + t**2
    density = torch.exp(-(x**2 + y**2) / (2 * variance)) / (2 * torch.pi * variance)
    real = MixtureDenoiser(ring(8), 0.2)(points, torch.full((len(points),), t), NO_PROMPT).flatten(1)
    fake = (1 - t) * std**2 / variance * points.flatten(1)
    flux = density[..., None] * ((fake - real) / t).reshape(401, 401, 2)
    step = 8 / 400
    divergence = sum(torch.gradient(flux[..., i], spacing=step, dim=i)[0] for i in (0, 1))
    return float(0.5 + delta_t * divergence.abs().sum() * step**2 / 4)


def test_at_a_short_step_even_the_best_discriminator_is_hardly_ever_right_about_one_side_alone():
    """So accuracy .5 and hinge 2 say nothing there: a blob that misses every mode is as invisible as a good student."""
    assert [best_accuracy(1 / 64, t) for t in (0.1, 0.3, 0.6, 0.9)] == [
        pytest.approx(value, abs=0.003) for value in (0.552, 0.542, 0.513, 0.501)
    ]
    assert best_accuracy(1 / 16, 0.1) == pytest.approx(0.707, abs=0.005)


@torch.no_grad()
@pytest.mark.parametrize(
    ("recipe", "family"),
    [
        ("sdxl_1step", "sdxl"),
        ("sd3_medium_4step", "sd3"),
        ("sd35_large_4step", "sd35-large"),
        ("cogvideox_2b_8step", "cogvideox-2b"),
        ("cogvideox_5b_8step", "cogvideox-5b"),
    ],
)
def test_the_discriminator_of_a_recipe_in_bfloat16_sees_what_bfloat16_would_round_away(
    recipe, family, tmp_path
):
    """At dt = 1/64 both sides differ by no more than that; the recipes read blocks alone, which round their input."""
    loaded = load_recipe(RECIPES / f"{recipe}.yaml")
    assert loaded.precision == "bfloat16"
    folder = str(make_tiny_pipeline(tmp_path, family))
    shape = Shape(width=64, height=64, frames=9 if loaded.is_video else 1)
    teacher = open_teacher(loaded.family, folder, shape=shape, bf16=True)
    last = len(teacher.denoiser.blocks) - 1
    channels, *axes = teacher.latent_shape
    torch.manual_seed(0)
    latent = LatentDiscriminator(
        teacher.denoiser,
        sorted({min(tap, last) for tap in loaded.adm.taps}),
        channels=channels,
        axes=len(axes),
    )
    xs = torch.randn(2, *teacher.latent_shape)
    s, cond = torch.tensor([0.5, 0.5]), teacher.encode(["a red dog", "dog"])
    assert not torch.equal(latent(xs, s, cond), latent(xs.bfloat16().float(), s, cond))
