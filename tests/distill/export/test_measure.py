"""The times in a manifest are those of whole batches, of which everything else makes its plans."""

from pathlib import Path

import numpy as np

from flashbulb_distill.export import measure

PASS_MS = {"text_encoder": 3, "denoiser": 5, "decoder": 2}  # and as much again for every row


def test_a_batch_of_a_student_of_several_steps_runs_its_denoiser_as_often(monkeypatch):
    """One pass was taken for the batch: a clip of four steps was said to take a third of its time."""
    clock = [0.0]

    class Session:
        def __init__(self, path):
            self.ms = PASS_MS[path.stem]

        def run(self, _, feeds):
            clock[0] += self.ms * (1 + len(feeds["rows"])) / 1000
            return []

    monkeypatch.setattr(measure, "open_session", Session)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    parts = {name: (Path(f"{name}.onnx"), {"rows": np.zeros((8, 1), np.float32)}) for name in PASS_MS}
    assert measure.batch_times_ms(parts, (1, 8), num_steps=1) == {1: 20.0, 8: 90.0}
    assert measure.batch_times_ms(parts, (1, 8), num_steps=4) == {1: 50.0, 8: 225.0}
