"""Distil a diffusion teacher into a one-step or few-step student."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of torchvision, which nothing here needs
