"""Every component of every family as an ONNX graph: what torch computes, at shapes that were not traced."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from filelock import FileLock
from numpy.typing import NDArray

from flashbulb_distill.export.families import Component, components_of, variants
from flashbulb_distill.export.graph import content_hash, export_component
from flashbulb_distill.export.parity import open_session
from support.tiny_families import make_tiny_family

# Largest difference over the outputs' standard deviation, float32. Measured: 4.3e-5 (CogVideoX decoder), 8e-6 (image
# decoders), else below 4e-6.
TOLERANCE = 1e-4

WHOLE = {
    "sdxl": "sdxl",
    "sd3": "sd3",
    "sd35": "sd3",
    "cogvideox-2b": "cogvideox",
    "cogvideox-5b": "cogvideox",
}
# What differs from an earlier line; the rest is the same class with the same flags.
CASES = [
    *(("sdxl", name) for name in ("text_encoder", "text_encoder_2", "unet", "vae_decoder")),
    *(("sd3", name) for name in ("text_encoder_3", "transformer", "vae_decoder")),
    ("sd35", "transformer"),
    ("cogvideox-2b", "transformer"),
    *(("cogvideox-5b", name) for name in ("transformer", "vae_decoder")),
]

Export = Callable[[str, str], tuple[Component, Path]]


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Return a function that exports a component once for all tests and test processes."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared
    cache = shared / "onnx"
    cache.mkdir(exist_ok=True)

    def exported(family: str, name: str) -> tuple[Component, Path]:
        component = find(family, name)
        folder = tmp_path_factory.mktemp("graph") / name
        with FileLock(cache / f"{family}-{name}.lock"):
            return component, export_component(component, folder, cache=cache)

    return exported


def find(family: str, name: str) -> Component:
    """Return a component of a tiny family."""
    parts = make_tiny_family(family)
    return next(one for one in components_of(WHOLE[family], parts) if one.name == name)


def difference(component: Component, path: Path) -> float:
    """Return the largest difference over all cases, relative to each output's standard deviation."""
    session = open_session(path)
    names = {node.name for node in session.get_inputs()}
    worst = 0.0
    for case in variants(component):
        with torch.no_grad():
            expected = component.module(*case.values())
        arrived = session.run(None, {name: value.numpy() for name, value in case.items() if name in names})
        for want, got in zip(expected if isinstance(expected, tuple) else (expected,), arrived, strict=True):
            reference: NDArray[np.float32] = want.numpy()
            assert got.shape == reference.shape
            worst = max(worst, float(np.abs(reference - got).max() / reference.std()))
    return worst


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_graph_computes_what_its_module_does_at_every_shape(family: str, name: str, export: Export) -> None:
    component, path = export(family, name)
    assert len(variants(component)) >= 3
    assert difference(component, path) < TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_planted_weight_is_seen_in_what_a_graph_computes(export: Export) -> None:
    component, path = export("sd3", "transformer")
    next(component.module.parameters()).data.flatten()[0] += 1.0
    assert difference(component, path) > TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_equal_component_is_not_traced_again(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    component, path = export("sd3", "text_encoder_3")
    cache = tmp_path / "cache"
    kept = cache / content_hash(component, 18)
    kept.mkdir(parents=True)
    (kept / "model.onnx").write_bytes(path.read_bytes())
    monkeypatch.setattr("torch.onnx.export", lambda *_, **__: pytest.fail("traced again"))
    again = export_component(find("sd3", "text_encoder_3"), tmp_path / "again", cache=cache)
    assert again.read_bytes() == path.read_bytes()


def test_the_hash_of_a_component_follows_weights_and_opset() -> None:
    component = find("sd3", "transformer")
    same, other = content_hash(find("sd3", "transformer"), 18), content_hash(component, 23)
    assert content_hash(component, 18) == same != other
    next(component.module.parameters()).data.flatten()[0] += 1e-3
    assert content_hash(component, 18) != same


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_axes_that_may_vary_have_no_fixed_size(export: Export) -> None:
    component, path = export("sd3", "transformer")
    graph = onnx.load(path).graph
    for node in graph.input:
        for axis, dimension in enumerate(node.type.tensor_type.shape.dim):
            assert bool(dimension.dim_param) == (axis in component.axes[node.name]), (node.name, axis)


def test_an_unknown_family_and_a_missing_part_are_named() -> None:
    with pytest.raises(ValueError, match="sdxl, sd3, cogvideox, got 'sd4'"):
        components_of("sd4", {})
    with pytest.raises(ValueError, match="missing: \\['vae'\\]"):
        components_of("sd3", {name: part for name, part in make_tiny_family("sd3").items() if name != "vae"})


def test_an_existing_folder_and_an_unknown_opset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="expected a new folder"):
        export_component(find("sd3", "transformer"), tmp_path)
    with pytest.raises(ValueError, match="opset of"):
        export_component(find("sd3", "transformer"), tmp_path / "new", opset=17)
