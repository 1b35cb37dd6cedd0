"""What onnxruntime should leave alone in a bundle's graphs: for parity, calibration and the service alike."""

# Joins a sum and the LayerNorm after it into one kernel, which on the CPU is slower than the two apart: the emoji
# student's text encoder took 2.96 ms with it and 2.73 ms without (onnxruntime 1.32, one thread, medians by turns).
DISABLED_OPTIMIZERS = ("SkipLayerNormFusion",)
