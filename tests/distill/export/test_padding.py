"""What a manifest calls padding "zeros" is held against the graph, with faults planted."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from flashbulb_distill.export.parity import ParityError, check_padding

IDS = torch.tensor([[1, 2, 0, 0], [3, 1, 2, 3]])
MASK = (IDS > 0).long()


def text_encoder(path, *, rows, pooled):
    """Write a graph whose embeddings are `rows` of the table's rows and the mask, and pooled by `pooled`."""
    table = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["flat"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["flat", "last"], ["mask"]),
        helper.make_node(*rows, ["prompt_embeds"]),
        helper.make_node(pooled, ["prompt_embeds", "middle"], ["pooled_prompt_embeds"], keepdims=0),
    ]
    constants = {"table": table, "last": np.array([2]), "middle": np.array([1])}
    graph = helper.make_graph(
        nodes,
        "text_encoder",
        [
            helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "l"])
            for n in ("input_ids", "attention_mask")
        ],
        [
            helper.make_tensor_value_info("prompt_embeds", TensorProto.FLOAT, ["b", "l", 3]),
            helper.make_tensor_value_info("pooled_prompt_embeds", TensorProto.FLOAT, ["b", 3]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def check(path):
    check_padding(path, {"input_ids": IDS, "attention_mask": MASK}, 1e-5)


def test_an_encoder_that_masks_its_padding_may_do_without(tmp_path):
    check(text_encoder(tmp_path / "t.onnx", rows=("Mul", ["rows", "mask"]), pooled="ReduceSum"))


def test_embeddings_of_padding_that_are_no_zeros_are_refused(tmp_path):
    with pytest.raises(ParityError, match="zeros for padding"):
        check(text_encoder(tmp_path / "t.onnx", rows=("Identity", ["rows"]), pooled="ReduceMax"))


def test_what_depends_on_the_number_of_padded_rows_is_refused(tmp_path):
    with pytest.raises(ParityError, match="needs its padding"):
        check(text_encoder(tmp_path / "t.onnx", rows=("Mul", ["rows", "mask"]), pooled="ReduceMean"))
