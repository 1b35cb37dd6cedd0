"""Attention for diffusion transformers and UNets: one function, several implementations."""

from .dispatch import Impl, Layout, attention
from .preparation import Preparation

__all__ = ["Impl", "Layout", "Preparation", "attention"]
