"""Every component of every family as an ONNX graph: what torch computes, at shapes that were not traced."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

from flashbulb_distill.export import graph as graph_module
from flashbulb_distill.export.families import components_of, variants
from flashbulb_distill.export.graph import content_hash, trace_graph
from flashbulb_distill.export.parity import ParityError, check_component
from flashbulb_distill.export.pipeline import export_component
from flashbulb_distill.export.positions import rotary_positions, sinusoidal_positions
from support.exported import COMPONENTS, export_tiny, find
from support.tiny_families import make_tiny_family

pytestmark = [pytest.mark.timeout(600)]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), COMPONENTS)
def test_a_graph_computes_what_its_module_does_at_every_shape(family, name):
    """Measured: at most 5e-5 of the outputs' size; eight times torch's own error is allowed."""
    exported = export_tiny(family, name)
    assert len(exported.cases) >= 3
    found = check_component(name, exported.path, exported.component.module, exported.cases)
    assert found.tolerance < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), COMPONENTS)
def test_a_half_precision_graph_of_opset_23_is_as_near_as_torch_is_in_half_precision(family, name):
    """And keeps attention whole. In SDXL's UNet, sizes in float32 were once joined with embeddings in float16."""
    exported = export_tiny(family, name, opset=23, dtype=torch.float16)
    found = check_component(name, exported.path, exported.component.module, exported.cases)
    assert 1e-4 < found.tolerance < 0.5
    graph = onnx.load(exported.path, load_external_data=False).graph
    weights = {t.data_type for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert weights == {onnx.TensorProto.FLOAT16}
    if name in ("transformer", "unet"):
        assert "Attention" in {node.op_type for node in graph.node}


@pytest.mark.slow
def test_a_bfloat16_graph_is_valid_and_holds_bfloat16():
    """onnxruntime's CPU has no bfloat16 kernels: the graph's types are checked, its twin in float32 is run."""
    exported = export_tiny("sd3", "text_encoder_3", dtype=torch.bfloat16)
    onnx.checker.check_model(exported.path, full_check=True)
    graph = onnx.load(exported.path, load_external_data=False).graph
    weights = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert {t.data_type for t in weights} == {onnx.TensorProto.BFLOAT16}
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.slow
def test_a_graph_holds_no_weight():
    exported = export_tiny("sdxl", "unet")
    files = {path.name for path in exported.path.parent.iterdir()}
    assert files == {"model.onnx", "weights-00000.safetensors"}
    inside = [
        tensor
        for tensor in onnx.load(exported.path, load_external_data=False).graph.initializer
        if tensor.data_location != onnx.TensorProto.EXTERNAL
    ]
    assert max((int(np.prod(tensor.dims)) for tensor in inside), default=0) <= 64


@pytest.mark.slow
def test_a_graph_of_other_weights_comes_from_the_cache(tmp_path, monkeypatch):
    first = trace_graph(find("sdxl", "text_encoder"), cache=tmp_path)
    monkeypatch.setattr(graph_module, "_trace", lambda *_: pytest.fail("traced again"))
    parts = make_tiny_family("sdxl", seed=5)
    other = next(one for one in components_of("sdxl", parts) if one.name == "text_encoder")
    path = export_component(other, tmp_path / "new", cache=tmp_path)
    assert [n.op_type for n in onnx.load(path).graph.node] == [n.op_type for n in first.graph]
    check_component("text_encoder", path, other.module, variants(other))


def test_the_hash_of_a_component_follows_types_flags_and_opset_not_weights():
    component = find("sd3", "transformer")
    kept = content_hash(component, 18)
    component.module.transformer.pos_embed.proj.weight.data += 1
    assert content_hash(component, 18) == kept
    others = [content_hash(component, 23), content_hash(find("sd35", "transformer"), 18)]
    others.append(content_hash(find("sd3", "transformer", torch.float16), 18))
    assert len({kept, *others}) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), COMPONENTS)
def test_axes_that_may_vary_have_no_fixed_size(family, name):
    exported = export_tiny(family, name)
    for node in onnx.load(exported.path, load_external_data=False).graph.input:
        for axis, dimension in enumerate(node.type.tensor_type.shape.dim):
            assert bool(dimension.dim_param) == (axis in exported.component.axes[node.name]), (
                node.name,
                axis,
            )


# ------------------------------------------------------------------------------------------- planted faults


@pytest.mark.slow
def test_one_changed_weight_of_the_file_is_refused(tmp_path):
    """The graph reads the file beside it; torch still has the true weights."""
    exported = export_tiny("sdxl", "text_encoder_2")
    for file in exported.path.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    weight = next(t for t in graph.initializer if t.name.endswith("fc1.weight"))
    place = {entry.key: entry.value for entry in weight.external_data}
    with (tmp_path / place["location"]).open("r+b") as handle:
        handle.seek(int(place["offset"]))
        first = np.frombuffer(handle.read(4), np.float32)
        handle.seek(int(place["offset"]))
        handle.write((first + np.float32(0.05)).tobytes())
    with pytest.raises(ParityError, match="text_encoder_2: expected ONNX Runtime within"):
        check_component("text_encoder_2", tmp_path / "model.onnx", exported.component.module, exported.cases)


@pytest.mark.slow
def test_a_transposed_head_is_refused():
    exported = export_tiny("sd35", "transformer")
    broken = find("sd35", "transformer")
    network = broken.module.transformer
    query = network.transformer_blocks[0].attn.to_q
    heads, width = network.config.num_attention_heads, network.config.attention_head_dim
    query.weight.data = query.weight.data.view(heads, width, -1).transpose(0, 1).reshape(query.weight.shape)
    with pytest.raises(ParityError, match="transformer: expected"):
        check_component("transformer", exported.path, broken.module, exported.cases)


@pytest.mark.slow
def test_overflow_in_half_precision_is_refused():
    exported = export_tiny("sd3", "text_encoder_3", dtype=torch.float16)
    broken = find("sd3", "text_encoder_3", torch.float16)
    broken.module.model.encoder.final_layer_norm.weight.data.fill_(6e4)
    with pytest.raises(ParityError, match="overflows there"):
        check_component("text_encoder_3", exported.path, broken.module, exported.cases)


@pytest.mark.slow
def test_a_graph_without_its_weights_does_not_open():
    exported = export_tiny("sdxl", "text_encoder_2")
    with pytest.raises(Exception, match=r"weights-00000\.safetensors"):
        onnxruntime.InferenceSession(exported.path.read_bytes(), providers=["CPUExecutionProvider"])


# -------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("grid", [(4, 8), (4, 4), (2, 8), (7, 3), (30, 45), (1, 5)])
def test_rotary_positions_are_diffusers_own(grid):
    base = (4, 8)
    expected = get_3d_rotary_pos_embed(16, get_resize_crop_region_for_grid(grid, base[1], base[0]), grid, 3)
    for ours, theirs in zip(rotary_positions(16, 3, grid, base), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=4e-6, rtol=0)


@pytest.mark.parametrize(("height", "width", "frames"), [(8, 8, 9), (4, 6, 13), (2, 2, 1)])
def test_sinusoidal_positions_are_diffusers_own(height, width, frames):
    embed = make_tiny_family("cogvideox-2b")["transformer"].patch_embed
    ours = sinusoidal_positions(embed, height, width, frames)
    theirs = embed._get_positional_embeddings(height, width, frames)
    torch.testing.assert_close(ours, theirs.float(), atol=4e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------- refusals


def test_an_unknown_family_and_a_missing_part_are_named():
    with pytest.raises(ValueError, match="sdxl, sd3, cogvideox, got 'sd4'"):
        components_of("sd4", {})
    with pytest.raises(ValueError, match=r"missing: \['vae'\]"):
        components_of("sd3", {name: part for name, part in make_tiny_family("sd3").items() if name != "vae"})


def test_an_existing_folder_and_an_unknown_opset_are_refused(tmp_path):
    with pytest.raises(FileExistsError, match="expected a new folder"):
        export_component(find("sd3", "transformer"), tmp_path)
    with pytest.raises(ValueError, match="opset of"):
        export_component(find("sd3", "transformer"), tmp_path / "new", opset=17)
