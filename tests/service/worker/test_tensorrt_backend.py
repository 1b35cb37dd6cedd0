"""The host's part of the TensorRT backend, against stand-ins of TensorRT's and CUDA's interfaces. No GPU is used."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from flashbulb_distill.bundle import BundleError, hash_file, open_bundle
from flashbulb_distill.bundle.engines import (
    Engine,
    EngineManifest,
    Profile,
    engine_folder,
    write_engine_manifest,
)
from flashbulb_service.backends import ImageRequest, Student
from flashbulb_service.backends.cuda import Cuda
from flashbulb_service.backends.engine import EngineSession, find_profile, padded_rows
from flashbulb_service.backends.onnx import OnnxBackend
from flashbulb_service.backends.tensorrt import TensorRTBackend
from flashbulb_service.errors import BackendUnavailable, OutOfMemory
from support.standin_tensorrt import Engine as StandInEngine
from support.standin_tensorrt import RtxEngine, StandInCuda, standin_runtime
from support.tiny_bundle import make_tiny_bundle

LARGEST = 6
SHAPES = {
    "text_encoder": {"input_ids": (14,), "attention_mask": (14,)},
    "denoiser": {
        "latents": (64, 8, 8),
        "timestep": (),
        "prompt_embeds": (14, 384),
        "pooled_prompt_embeds": (384,),
    },
    "decoder": {"latents": (64, 8, 8)},
}


def profile(inputs):
    return {
        name: Profile(smallest=(1, *shape), usual=(3, *shape), largest=(LARGEST, *shape))
        for name, shape in inputs.items()
    }


def add_engines(bundle, **changes):
    """Put the bundle's own graphs where engines lie, which is what the stand-in runs."""
    version = changes.get("runtime_version", "11.4.0.106")
    folder = engine_folder(bundle.path, "standard", ("sm_89",), version, "NVIDIA L4")
    folder.mkdir(parents=True)
    engines = {}
    for part, inputs in SHAPES.items():
        path = folder / f"{part}.engine"
        path.write_bytes(bundle.file(f"{part}.onnx").read_bytes())
        engines[part] = Engine(
            file=path.name,
            sha256=hash_file(path),
            bytes=path.stat().st_size,
            graph="0" * 64,
            profiles=(profile(inputs),),
            build_s=1.0,
        )
    given = {
        "schema_version": 1,
        "flavor": "standard",
        "runtime_version": version,
        "targets": ("sm_89",),
        "gpu": "NVIDIA L4",
        "bundle_sha256": bundle.sha256,
        "shapes": ((64, 64),),
        "max_batch": LARGEST,
        "engines": engines,
    }
    write_engine_manifest(folder, EngineManifest.model_validate(given | changes))
    return folder


@pytest.fixture
def bundle(tmp_path):
    return open_bundle(make_tiny_bundle(tmp_path, time_steps=(1.0, 0.5)))


def backend_on(driver):
    return TensorRTBackend(cuda=Cuda(driver), runtimes={"standard": standin_runtime(driver)})


def session_on(driver, engine=StandInEngine):
    """Load an engine of x [b, 4] -> doubled [b, 4], pooled [b, 0]: T5's students have no pooled embeddings."""
    edges = [
        numpy_helper.from_array(np.array([value], np.int64), name)
        for name, value in (("zero", 0), ("one", 1))
    ]
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "x"], ["doubled"]),
            helper.make_node("Slice", ["x", "zero", "zero", "one"], ["pooled"]),
        ],
        "text_encoder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 4])],
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", w])
            for n, w in (("doubled", 4), ("pooled", 0))
        ],
        edges,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    trt = standin_runtime(driver, engine=engine)
    return EngineSession(trt, Cuda(driver), model.SerializeToString(), [profile({"x": (4,)})])


def runs(session, *sizes):
    """Run batches of these sizes one after another; each has its own numbers, and each is right."""
    for number, rows in enumerate(sizes):
        x = number + np.arange(4 * rows, dtype=np.float32).reshape(rows, 4)
        np.testing.assert_array_equal(session.run(["doubled"], {"x": x})[0], 2 * x)


def requests(count):
    return [ImageRequest(f"red apple {'dog ' * i}", 7 + i, 0, 64, 64, num_steps=2) for i in range(count)]


def test_pictures_are_those_of_the_onnx_backend_for_every_batch_size(bundle):
    add_engines(bundle)
    driver = StandInCuda()
    ours, theirs = backend_on(driver), OnnxBackend(threads=1)
    ours.load(bundle)
    theirs.load(bundle)
    for count in (1, 2, 3, 5, 6, 1, 3):
        expected = Student(theirs).generate(requests(count))
        for one, other in zip(Student(ours).generate(requests(count)), expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_batch_size_is_captured_once_and_replayed_after(bundle):
    add_engines(bundle)
    driver = StandInCuda()
    student = Student(backend := backend_on(driver))
    backend.load(bundle)
    student.generate(requests(3))
    assert driver.captures == 3  # text encoder, denoiser and decoder, four rows each
    student.generate(requests(4))
    assert driver.captures == 4  # the one prompt that was not encoded before runs alone
    launched = driver.launches
    student.generate(requests(4))
    assert driver.captures == 4
    assert driver.launches == launched + 3  # two steps and a decoder; no prompt is new


def test_an_output_of_width_0_has_an_address():
    session = session_on(driver := StandInCuda())
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    doubled, pooled = session.run(["doubled", "pooled"], {"x": x})
    np.testing.assert_array_equal(doubled, 2 * x)
    assert pooled.shape == (3, 0)
    session.close()
    assert not driver.buffers


def test_a_graph_is_replayed_only_where_its_context_is_as_it_was_captured():
    """One context took the shapes of every batch size, while the graphs that it had been captured in were replayed."""
    session = session_on(driver := StandInCuda())
    runs(session, 6, 4, 2, 1, 6, 4, 2, 1)
    assert driver.captures == 4 and driver.launches == 8


@pytest.mark.parametrize(
    ("driver", "engine"), [(StandInCuda(can_capture=False), StandInEngine), (StandInCuda(), RtxEngine)]
)
def test_an_engine_that_cannot_be_captured_runs_without_a_graph(driver, engine, caplog):
    session = session_on(driver, engine)
    runs(session, 3, 1, 3, 1)
    assert driver.launches == 0 and driver.capturing is None
    assert len(caplog.records) == 2 and "runs without a CUDA graph for {'x': (4, 4)}" in caplog.text


@pytest.mark.parametrize(("most", "memory"), [(1, 1 << 20), (32, 7_000)])
def test_shapes_for_which_there_is_no_context_more_share_one_without_a_graph(most, memory, monkeypatch):
    monkeypatch.setattr("flashbulb_service.backends.engine.MAX_CONTEXTS", most)
    session = session_on(driver := StandInCuda(memory=memory))
    runs(session, 6, 4, 2, 4, 6)
    assert driver.captures == 1 and driver.launches == 2
    session.close()
    assert driver.left == memory and not driver.buffers


def test_closing_gives_everything_back(bundle):
    add_engines(bundle)
    driver = StandInCuda()
    backend = backend_on(driver)
    backend.load(bundle)
    Student(backend).generate(requests(2))
    assert driver.buffers and driver.streams
    backend.close()
    assert not driver.buffers and not driver.streams


def test_too_little_memory_is_told_and_leaves_none_taken(bundle):
    add_engines(bundle)
    driver = StandInCuda(memory=200_000)
    with pytest.raises(OutOfMemory, match="CUDA: out of memory"):
        backend_on(driver).load(bundle)
    assert not driver.buffers and not driver.streams


def test_an_engine_that_finds_too_little_memory_to_run_in_is_out_of_memory():
    with pytest.raises(OutOfMemory, match="expected device memory for an engine to run in") as caught:
        session_on(driver := StandInCuda(memory=1000))
    assert "\n" not in str(caught.value)
    assert not driver.buffers and not driver.streams


@pytest.mark.parametrize(
    ("changes", "gpu", "told"),
    [
        ({"bundle_sha256": "0" * 64}, {}, "expected engines of bundle"),
        ({"runtime_version": "11.3.0"}, {}, "expected engines of TensorRT 11.4.0.106, got those of 11.3.0"),
        ({}, {"minor": 6}, "expected engines for sm_86, got those for sm_89"),
        (
            {},
            {"name": b"NVIDIA RTX 4000"},
            "expected engines tuned on NVIDIA RTX 4000, got those tuned on NVIDIA L4",
        ),
        ({"flavor": "rtx"}, {}, "expected the package tensorrt_rtx for rtx engines"),
    ],
)
def test_engines_that_do_not_belong_here_are_refused_in_one_line(bundle, changes, gpu, told):
    add_engines(bundle, **changes)
    with pytest.raises(BackendUnavailable, match=told) as caught:
        backend_on(StandInCuda(**gpu)).load(bundle)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("run: flashbulb export tensorrt")


def test_a_bundle_without_engines_says_so(bundle):
    with pytest.raises(BackendUnavailable, match="the bundle has no engines; run: flashbulb export tensorrt"):
        backend_on(StandInCuda()).load(bundle)


def test_a_changed_engine_is_refused(bundle):
    path = add_engines(bundle) / "denoiser.engine"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(BundleError, match=r"denoiser\.engine: expected sha256"):
        backend_on(StandInCuda()).load(bundle)


def test_an_engine_that_the_runtime_refuses_is_told_and_leaves_nothing(bundle):
    folder = add_engines(bundle)
    (folder / "decoder.engine").write_bytes(b"refused")
    manifest = (folder / "engine.json").read_text()
    old = open_bundle(bundle.path).file("decoder.onnx")
    changed = manifest.replace(hash_file(old), hash_file(folder / "decoder.engine"))
    (folder / "engine.json").write_text(changed.replace(str(old.stat().st_size), str(len(b"refused"))))
    driver = StandInCuda()
    with pytest.raises(BackendUnavailable, match="refused an engine"):
        backend_on(driver).load(bundle)
    assert not driver.buffers


def test_rows_are_padded_to_powers_of_two_within_the_engine():
    assert [padded_rows(rows, 6) for rows in range(1, 7)] == [1, 2, 4, 4, 6, 6]
    with pytest.raises(ValueError, match="expected 1 to 6 rows"):
        padded_rows(7, 6)


def test_the_profile_that_takes_a_shape_is_found():
    small, large = profile({"latents": (4, 8, 8)}), profile({"latents": (4, 16, 8)})
    assert find_profile([small, large], {"latents": (3, 4, 16, 8)}) == 1
    with pytest.raises(ValueError, match=r"got latents \[1, 4, 9, 9\]"):
        find_profile([small, large], {"latents": (1, 4, 9, 9)})


def test_missing_bindings_are_one_line():
    pytest.importorskip("onnxruntime")
    try:
        import cuda.bindings.runtime  # noqa: F401
    except ImportError:
        with pytest.raises(BackendUnavailable, match=r"pip install 'flashbulb\[tensorrt\]'"):
            Cuda()
    else:
        pytest.skip("cuda-bindings is installed")
