"""Checks before the first training step: is the teacher what we take it for, and does it compute here?"""
