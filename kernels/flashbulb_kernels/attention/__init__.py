"""Attention for diffusion transformers and UNets: one function, several implementations."""

from .dispatch import Impl, Layout, attention

__all__ = ["Impl", "Layout", "attention"]
