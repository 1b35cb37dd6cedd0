"""DMD, DMD2, LADD and LCM against what is known exactly: who moves, and where to."""

import numpy as np
import pytest
import torch

from flashbulb_distill.core.times import logit_normal_times
from flashbulb_distill.networks.discriminators import VectorDiscriminator
from flashbulb_distill.networks.point import PointDenoiser
from flashbulb_distill.teachers.mixture import MixtureDenoiser
from flashbulb_distill.train.dmd import Dmd
from flashbulb_distill.train.fake import pull
from flashbulb_distill.train.ladd import Ladd
from flashbulb_distill.train.lcm import Lcm
from support.mixture_methods import SHAPE, make_method


def weights(method):
    return {
        role: torch.cat([p.detach().flatten().clone() for p in m.parameters()])
        for role, m in method.modules.items()
    }


@pytest.mark.parametrize(
    ("kind", "warm"),
    [
        ("dmd", {"fake"}),
        ("dmd2", {"fake", "latent"}),
        ("ladd", {"latent"}),
    ],
)
def test_each_loss_moves_its_own_role_and_the_student_only_after_the_warm_up(kind, warm):
    method = make_method(kind, warmup_steps=1)
    start = weights(method)
    method.step(0)
    middle = weights(method)
    assert {role for role in start if not torch.equal(start[role], middle[role])} == warm
    logs = method.step(1)
    end = weights(method)
    assert not torch.equal(middle["student"], end["student"])
    assert logs["student_norm"] > 0


@pytest.mark.parametrize("kind", ["dmd", "dmd2", "ladd"])
def test_the_students_loss_moves_the_student_alone(kind):
    """With the other roles' rates at nought nobody else moves, though the loss runs through the heads."""
    method = make_method(kind)
    for role, optimizer in method.optimizers.items():
        if role != "student":
            optimizer.param_groups[0]["lr"] = 0.0
    start = weights(method)
    method.step(0)
    end = weights(method)
    assert {role for role in start if not torch.equal(start[role], end[role])} == {"student"}


def test_dmd_without_its_gan_term_has_no_heads_and_with_weight_nought_the_term_moves_nothing():
    assert set(make_method("dmd").modules) == {"student", "fake"}
    ends = []
    for heads_rate in (0.0, 1.0):
        method = make_method("dmd2", gan_weight=0.0)
        method.optimizers["latent"].param_groups[0]["lr"] = heads_rate
        method.step(0)
        method.step(1)
        ends.append(weights(method)["student"])
    assert torch.equal(*ends)


class Shift(PointDenoiser):
    """A student of one weight: its sample is the noise, scaled and shifted."""

    def __init__(self, std):
        super().__init__(2)
        self.body = None
        self.std = std
        self.mean = torch.nn.Parameter(torch.zeros(2))

    def forward(self, xt, t, cond):
        return self.mean[:, None, None] + self.std * xt


class ItsScore(PointDenoiser):
    """The exact score of a Shift student, whatever it has learnt."""

    def __init__(self, student):
        super().__init__(2)
        self.student = (student,)

    def forward(self, xt, t, cond):
        (student,) = self.student
        exact = MixtureDenoiser(student.mean.detach()[None], student.std)
        return exact(xt, t, cond) + 0 * sum(p.sum() for p in self.parameters())


def test_dmd_brings_a_gaussian_student_to_its_teacher():
    """With both scores exact the only fixed point is the teacher's mean."""
    centre = torch.tensor([[1.0, -2.0]])
    student = Shift(0.3)
    method = make_method(
        "dmd", teacher=MixtureDenoiser(centre, 0.3), student=student, fake_updates=1, batch_size=32
    )
    method = Dmd(**{**vars(method), "fake": ItsScore(student)})
    method.optimizers["student"].param_groups[0]["lr"] = 0.05
    for step in range(150):
        method.step(step)
    torch.testing.assert_close(student.mean.detach(), centre[0], atol=0.05, rtol=0)


class ExactFlow(PointDenoiser):
    """The endpoint of the probability flow of one Gaussian, in closed form."""

    def __init__(self, centre, std, gain=1.0):
        super().__init__(2)
        self.centre, self.std = centre.reshape(2, 1, 1), std
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def forward(self, xt, t, cond):
        at = t.reshape(-1, 1, 1, 1)
        spread = ((1 - at) ** 2 * self.std**2 + at**2).sqrt()
        return self.gain * (self.centre + self.std * (xt - (1 - at) * self.centre) / spread)


def test_the_flows_own_endpoint_is_consistent_and_another_map_is_not():
    """LCM's loss of the exact answer vanishes with the grid's spacing; of one that is 10 % off it does not."""
    centre, std = torch.tensor([[1.0, -2.0]]), 0.3
    losses = {}
    for gain in (1.0, 1.1):
        for num_times in (20, 400):
            student = ExactFlow(centre, std, gain)
            method = make_method(
                "lcm", teacher=MixtureDenoiser(centre, std), student=student, num_times=num_times
            )
            method = Lcm(**{**vars(method), "target": ExactFlow(centre, std, gain)})
            losses[gain, num_times] = method.step(0)["loss"]
    assert losses[1.0, 400] < 0.1 * losses[1.0, 20] < 0.01
    # Only the grid's first time has a target of the data's own, which the wrong map misses.
    wrong = make_method(
        "lcm", teacher=MixtureDenoiser(centre, std), student=ExactFlow(centre, std, 1.1), num_times=2
    )
    wrong = Lcm(**{**vars(wrong), "target": ExactFlow(centre, std, 1.1)})
    assert wrong.step(0)["loss"] > 0.05


def test_lcms_target_follows_the_student_and_has_no_optimiser():
    method = make_method("lcm", target_ema=0.9)
    before = weights(method)
    method.step(0)
    after = weights(method)
    assert set(method.optimizers) == {"student"}
    assert not torch.equal(before["student"], after["student"])
    torch.testing.assert_close(after["target"], 0.9 * before["target"] + 0.1 * after["student"])


class Recorder(VectorDiscriminator):
    """A discriminator that keeps what it was shown."""

    def __init__(self):
        super().__init__(2)
        self.seen = []

    def forward(self, xt, t, cond):
        self.seen.append((xt.detach(), t))
        return super().forward(xt, t, cond)


def test_ladds_two_sides_have_one_noise_and_one_time_and_reals_are_the_pairs():
    method = make_method("ladd", batch_size=64)
    recorder = Recorder()
    method = Ladd(**{**vars(method), "latent": recorder})
    method.optimizers["latent"].param_groups[0]["params"] = list(recorder.parameters())
    method.step(0)
    both, times = recorder.seen[0]
    real, _ = both.chunk(2)
    s, again = times.chunk(2)
    assert torch.equal(s, again)
    picks = torch.from_numpy(method.draws.integers("ladd/pair", 0, range(64), 64))
    eps = torch.from_numpy(method.draws.normal("ladd/latent-noise", 0, range(64), SHAPE))
    at = s.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(real, (1 - at) * method.pairs.x_0[picks] + at * eps)
    assert s.median() > 0.6, "logit-normal with mean 1: the median is .73"


def test_logit_normal_times_have_normal_logits_and_are_cut_off_at_the_ends():
    u = (np.arange(4000) + 0.5) / 4000
    t = logit_normal_times(u, mean=0.5, std=1.5)
    logits = np.log(t / (1 - t))
    assert (logits.mean(), logits.std()) == (pytest.approx(0.5, abs=0.01), pytest.approx(1.5, abs=0.02))
    cut = logit_normal_times(u, mean=0.5, std=1.5, low=0.2, high=0.6)
    assert cut.min() >= 0.2
    assert cut.max() <= 0.6
    inside = t[(t > 0.2) & (t < 0.6)]
    assert np.median(cut) == pytest.approx(np.median(inside), abs=0.01)
    assert np.isfinite(logit_normal_times(np.array([0.0, 1 - 1e-17]), mean=0, std=1)).all()


def test_pulling_moves_the_fake_scores_weights_by_their_share_of_the_way():
    fake, student = PointDenoiser(2), PointDenoiser(2)
    before = [p.clone() for p in fake.parameters()]
    pull(fake, student, 0.03)
    for old, new, goal in zip(before, fake.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.97 * old + 0.03 * goal)
