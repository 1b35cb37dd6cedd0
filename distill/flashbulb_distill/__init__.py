"""Distil a diffusion teacher into a one-step or few-step student."""
