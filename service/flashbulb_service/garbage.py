"""Python's collector of cycles, kept out of the way of requests."""

import gc

# Python's own 700 starts a collection in nearly every request. This many objects take some ten megabytes.
YOUNG, MIDDLE, OLD = 50_000, 20, 50


def settle_heap() -> None:
    """Look no more at what lives since the start, and at the rest less often; call it when all is loaded."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, OLD)
