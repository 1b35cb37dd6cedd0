"""The methods for students of points: small networks in the places of a teacher's copies."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..core.draws import BatchDraws
from ..networks.discriminators import VectorDiscriminator
from ..networks.point import PointDenoiser
from ..pairs.store import Pairs
from ..teachers.denoiser import Condition
from ..train.adm import Adm
from ..train.adp import Adp
from ..train.build import load_parameters
from ..train.dmd import Dmd
from ..train.ladd import Ladd
from ..train.lcm import Lcm
from ..train.recipe import AdmRecipe, AdpRecipe, DmdRecipe, LaddRecipe, LcmRecipe, Rates, RegressionRecipe
from ..train.regression import Regression
from ..train.trainer import Method
from .course import Course
from .entries import Stage

SHAPE = (2, 1, 1)
ONE_STEP = (1.0,)
NO_PROMPT = Condition(torch.zeros(1, 1, 1), torch.zeros(1, 1))
INPUT = (-1,)
Weights = Mapping[str, Tensor]


def point_network(course: Course, weights: Weights | None = None) -> PointDenoiser:
    """Return a network of the course's size, with the given parameters."""
    network = PointDenoiser(2, course.width)
    if weights is not None:
        load_parameters(network, weights)
    return network


def build_for_points(
    stage: Stage, course: Course, seed: int, pairs: Pairs, start: Weights, weights: Weights
) -> tuple[Method, int]:
    """Return a stage's method and its number of warm-up steps.

    Args:
        start: the teacher as a network, from which the fake score starts.   weights: the student's.
    """
    torch.manual_seed(seed + 1)
    teacher, draws = course.teacher(), BatchDraws(seed)
    student = point_network(course, weights)
    rates = Rates(student=course.rate, heads=course.heads_rate, fake=course.fake_rate)
    alone = {"student": student}
    shared: dict[str, Any] = {"steps": course.moves, "batch_size": course.batch_size, "ema": course.ema}
    if stage == "regression":
        recipe = RegressionRecipe(rate=course.rate, **shared)
        return Regression(recipe, draws, pairs, NO_PROMPT, student, _optimizers(alone, rates)), 0
    if stage == "lcm":
        target = point_network(course, weights)
        lcm = LcmRecipe(rate=course.rate, guidance=1.0, **shared)
        optimizers = _optimizers(alone, rates)
        return Lcm(lcm, draws, pairs, NO_PROMPT, NO_PROMPT, teacher, student, target, optimizers), 0

    shared |= {"rates": rates, "warmup_steps": course.warmup}
    latent, fake = VectorDiscriminator(2), point_network(course, start)
    judged = _optimizers({"student": student, "latent": latent}, rates)
    if stage == "adp":
        adp = AdpRecipe(taps=INPUT, lambda_latent=1.0, lambda_pixel=0.0, **shared)
        return Adp(adp, draws, pairs, NO_PROMPT, student, latent, None, None, judged), course.warmup
    if stage == "ladd":
        ladd = LaddRecipe(taps=INPUT, **shared)
        return Ladd(ladd, draws, pairs, NO_PROMPT, ONE_STEP, student, latent, judged), course.warmup

    scored = _optimizers({"student": student, "fake": fake}, rates)
    if stage == "adm":
        adm = AdmRecipe(taps=INPUT, guidance=1.0, delta_t=course.delta_t, **shared)
        optimizers = judged | scored
        return Adm(
            adm, draws, NO_PROMPT, NO_PROMPT, SHAPE, ONE_STEP, teacher, student, fake, latent, optimizers
        ), course.warmup
    if stage == "dmd":
        dmd = DmdRecipe(guidance=1.0, fake_updates=1, **shared)
        return Dmd(
            dmd, draws, NO_PROMPT, NO_PROMPT, SHAPE, ONE_STEP, teacher, student, fake, scored
        ), course.warmup
    dmd2 = DmdRecipe(guidance=1.0, fake_updates=5, gan_weight=course.gan_weight, taps=INPUT, **shared)
    optimizers = judged | scored
    return Dmd(
        dmd2,
        draws,
        NO_PROMPT,
        NO_PROMPT,
        SHAPE,
        ONE_STEP,
        teacher,
        student,
        fake,
        optimizers,
        latent,
        pairs,
    ), course.warmup


def _optimizers(roles: Mapping[str, nn.Module], rates: Rates) -> dict[str, Optimizer]:
    own = {"student": rates.student, "fake": rates.fake, "latent": rates.heads}
    return {
        role: AdamW(network.parameters(), lr=own[role], betas=rates.betas, weight_decay=0.0)
        for role, network in roles.items()
    }
