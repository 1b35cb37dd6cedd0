"""Losses: pure functions of logits and estimates. Networks are called elsewhere, detaching is the caller's business."""

from .consistency import pseudo_huber
from .denoising import denoising_loss, velocity_loss
from .distribution_matching import dmd_gradient, dmd_loss
from .hinge import discriminator_hinge, generator_hinge
from .penalty import approximate_r1
from .softplus import discriminator_softplus, generator_softplus

__all__ = [
    "approximate_r1",
    "denoising_loss",
    "discriminator_hinge",
    "discriminator_softplus",
    "dmd_gradient",
    "dmd_loss",
    "generator_hinge",
    "generator_softplus",
    "pseudo_huber",
    "velocity_loss",
]
