"""Export: a student becomes a bundle, or nothing at all."""
