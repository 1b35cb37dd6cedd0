"""Every method on a mixture of Gaussians, with roles that are small networks of their own: milliseconds a step."""

import torch
from torch import Tensor, nn

from flashbulb_distill.core.draws import Draws
from flashbulb_distill.networks.discriminators import VectorDiscriminator
from flashbulb_distill.networks.point import PointDenoiser
from flashbulb_distill.pairs.store import Pairs
from flashbulb_distill.teachers.denoiser import Condition
from flashbulb_distill.teachers.mixture import MixtureDenoiser, ring
from flashbulb_distill.train.adm import Adm
from flashbulb_distill.train.adp import Adp
from flashbulb_distill.train.dmd import Dmd
from flashbulb_distill.train.ladd import Ladd
from flashbulb_distill.train.lcm import Lcm
from flashbulb_distill.train.recipe import (
    AdmRecipe,
    AdpRecipe,
    DmdRecipe,
    LaddRecipe,
    LcmRecipe,
    Rates,
    RegressionRecipe,
)
from flashbulb_distill.train.regression import Regression

NO_PROMPT = Condition(torch.zeros(1, 1, 1), torch.zeros(1, 1))
SHAPE = (2, 1, 1)
KINDS = ("regression", "adp", "adm", "dmd", "dmd2", "ladd", "lcm")
_METHODS = {
    "regression": (Regression, RegressionRecipe),
    "adp": (Adp, AdpRecipe),
    "adm": (Adm, AdmRecipe),
    "dmd": (Dmd, DmdRecipe),
    "dmd2": (Dmd, DmdRecipe),
    "ladd": (Ladd, LaddRecipe),
    "lcm": (Lcm, LcmRecipe),
}


class PointPixels(nn.Module):
    """Judge what the points were decoded to."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [b, 3]."""
        logits: Tensor = self.body(pixels.flatten(1))
        return logits


def pairs_of(teacher: MixtureDenoiser, count: int = 64) -> Pairs:
    """Return noise beside samples of the teacher's distribution."""
    draws = Draws(5)
    noise = torch.from_numpy(draws.normal("x_T", 0, range(count), SHAPE))
    modes = torch.from_numpy(draws.integers("mode", 0, range(count), len(teacher.centres)))
    x_0 = teacher.sample(torch.from_numpy(draws.normal("x_0", 0, range(count), SHAPE)), modes)
    return Pairs(noise, x_0, torch.zeros(count, dtype=torch.int64), ("",))


def make_method(kind, *, teacher=None, student=None, rate=1e-2, optimizer=torch.optim.SGD, **settings):
    """Return a method of `KINDS` with its networks, an optimiser a role, and recipe settings changed."""
    torch.manual_seed(0)
    teacher = teacher or MixtureDenoiser(ring(4), 0.2)
    roles = {"student": student or PointDenoiser(2)}
    shared = {"steps": 10, "batch_size": 16}
    options = {"draws": Draws(0), "cond": NO_PROMPT}
    adversarial = {"rates": Rates(student=1e-3, heads=1e-3, fake=1e-3), "taps": (-1,)}
    if kind in ("adm", "dmd", "dmd2"):
        roles["fake"] = PointDenoiser(2)
        options |= {"uncond": NO_PROMPT, "latent_shape": SHAPE, "time_steps": (1.0,), "teacher": teacher}
        shared |= adversarial | {"guidance": 1.0}
    if kind in ("adp", "ladd"):
        shared |= adversarial
    if kind in ("adp", "adm", "dmd2", "ladd"):
        roles["latent"] = VectorDiscriminator(2)
    if kind not in ("adm", "dmd"):
        options["pairs"] = pairs_of(teacher)
    if kind in ("regression", "lcm"):
        shared["rate"] = 1e-3
    if kind == "adp":
        roles["pixel"] = PointPixels()
        options["decode"] = lambda latents: 2 * latents
        shared |= {"pixel_batch": 8, "pixel_taps": (0,)}  # what reads them stands in above
    elif kind == "adm":
        shared |= {"delta_t": 1 / 16, "time_range": (0.1, 0.9)}
    elif kind == "dmd2":
        shared["gan_weight"] = 0.1
    elif kind == "ladd":
        options["time_steps"] = (1.0, 0.5)
    elif kind == "lcm":
        roles["target"] = PointDenoiser(2)
        options |= {"uncond": NO_PROMPT, "teacher": teacher}
        shared["guidance"] = 1.0
    method, recipe = _METHODS[kind]
    optimizers = {
        role: optimizer(module.parameters(), lr=rate) for role, module in roles.items() if role != "target"
    }
    return method(recipe=recipe(**shared | settings), optimizers=optimizers, **options, **roles)
