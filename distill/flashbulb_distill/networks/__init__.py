"""Networks that are trained or read beside the teacher: heads, discriminators, image features."""
