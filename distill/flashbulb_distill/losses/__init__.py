"""Losses: pure functions of logits and estimates. Networks are called elsewhere, detaching is the caller's business."""

from .denoising import velocity_loss
from .hinge import discriminator_hinge, generator_hinge

__all__ = ["discriminator_hinge", "generator_hinge", "velocity_loss"]
