"""Diffusion arithmetic: noise, schedules, the sampler. Runs without torch."""
