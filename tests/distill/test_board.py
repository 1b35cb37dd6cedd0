"""Scalars for TensorBoard, read back by TensorBoard's own reader."""

import sys

import pytest
from PIL import Image

from flashbulb_distill.board import Board


def read(folder):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_scalars_are_there_by_stage_and_those_that_come_again_replace_the_others(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    board = Board(tmp_path)
    for step in (10, 20, 30):
        board.write("adm", step, {"loss": step / 10, "dmd": 0.5})
    board.write("adp", 10, {"loss": 9.0})
    Image.new("RGB", (5, 4), "red").save(tmp_path / "grid.png")
    board.picture("adm", 30, tmp_path / "grid.png")
    board.write("adm", 20, {"loss": 7.0})  # the guard went back
    board.close()
    assert [len(list((tmp_path / stage).iterdir())) for stage in ("adm", "adp")] == [2, 1]
    assert read(tmp_path / "adm")["loss"] == [(10, 1.0), (20, 7.0)]
    assert read(tmp_path / "adp") == {"loss": [(10, 9.0)]}


def test_without_tensorboard_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"--tensorboard: expected the package tensorboard.*pip install"):
        Board(tmp_path)
