"""What a video request may ask for, parts of files, and when a video will be done: pure functions."""

import pytest

from flashbulb_distill.bundle import Shape, open_bundle
from flashbulb_service.api.errors import RangeNotSatisfiable
from flashbulb_service.api.jobs import percent
from flashbulb_service.api.ranges import parse_range
from flashbulb_service.api.schemas import VideosRequest
from flashbulb_service.api.video_plan import choose_shape, offered_seconds
from flashbulb_service.catalog import Catalog, Model
from flashbulb_service.errors import InvalidRequest, ModelUnloaded, UnknownModel
from flashbulb_service.eta import poll_after_ms, queued_ms, running_ms
from flashbulb_service.jobs import JobState, JobView
from flashbulb_service.tasks import StepDone
from flashbulb_service.timing import Tau
from support.tiny_bundle import make_tiny_video_bundle

SHAPES = (
    Shape(width=64, height=64, frames=16),
    Shape(width=64, height=64, frames=49),
    Shape(width=64, height=128, frames=49),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = make_tiny_video_bundle(tmp_path_factory.mktemp("models"), shapes=SHAPES, fps=8.0)
    return Model("tiny-video", 1, open_bundle(path))


@pytest.mark.parametrize(
    ("name", "task", "told"),
    [
        ("gpt-image-1", "text-to-video", "model: tiny@1 draws pictures: POST /v1/images/generations"),
        ("sora-2", "text-to-image", "model: tiny-video@1 makes videos: POST /v1/videos"),
    ],
)
def test_openais_names_are_refused_on_the_route_of_the_other_medium(models_dir, name, task, told):
    """They led to their own medium's model there: a 500 on one route, jobs that no worker draws on the other."""
    catalog = Catalog.load(models_dir, verify=False, openai_aliases=True)
    with pytest.raises(InvalidRequest, match=told) as caught:
        catalog.find(name, task=task)
    assert (caught.value.param, caught.value.detail_code) == ("model", "unsupported_task")


@pytest.mark.parametrize("gone", [False, True], ids=["unloaded", "removed"])
def test_without_the_default_model_the_other_medium_is_served_on(models_dir, tmp_path, gone):
    """Every video that named no model, or one of OpenAI's, was 503 or 404 while the default drew pictures."""
    catalog = Catalog.load(models_dir, verify=False, default="tiny", openai_aliases=True)
    if gone:
        make_tiny_video_bundle(tmp_path)
        catalog.refresh(tmp_path, lambda model, bundle: True)
    else:
        catalog.follow({}, frozenset({"tiny@1"}))
    videos = [catalog.find(name, task="text-to-video") for name in (None, "sora-2", "tiny-video")]
    assert {model.id for model in videos} == {"tiny-video@1"}
    assert catalog.aliases_of(videos[0]) == ("sora-2", "sora-2-pro")
    with pytest.raises(UnknownModel if gone else ModelUnloaded, match="tiny"):
        catalog.find(None, task="text-to-image")


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ({}, 0),
        ({"seconds": "2"}, 0),
        ({"seconds": 6.125}, 1),
        ({"seconds": "6"}, 1),
        ({"num_frames": 49}, 1),
        ({"size": "64x128"}, 2),
        ({"size": "64x128", "seconds": "6", "fps": 8}, 2),
        ({"num_frames": 49, "seconds": "6.125"}, 1),
    ],
)
def test_the_first_shape_that_is_what_is_asked_for_is_taken(model, asked, shape):
    assert choose_shape(VideosRequest(prompt="x", **asked), model) == SHAPES[shape]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"seconds": "5"}, "seconds: tiny-video@1 offers 2, 6.125, got '5'"),
        ({"seconds": "2.2"}, "offers 2, 6.125"),
        ({"seconds": "nan"}, "offers 2, 6.125"),
        ({"seconds": 10**400}, "offers 2, 6.125, got 1000"),  # no float: was a 500
        ({"num_frames": 16, "seconds": "6"}, "offers 2, got '6'"),
        ({"num_frames": 16, "size": "64x128"}, "num_frames: tiny-video@1 offers 49, got 16"),
        ({"fps": 24.0}, "fps: tiny-video@1 offers 8, got 24"),
        ({"size": "32x32"}, "64x64, 64x128"),
    ],
)
def test_what_no_shape_is_is_refused_with_what_there_is(model, asked, told):
    with pytest.raises(InvalidRequest, match=told):
        choose_shape(VideosRequest(prompt="x", **asked), model)


def test_lengths_are_offered_in_seconds(model):
    assert offered_seconds(model.bundle.manifest) == ["2", "6.125"]


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (None, None),
        ("bytes=0-0", (0, 1)),
        ("bytes=90-", (90, 100)),
        ("bytes=-10", (90, 100)),
        ("bytes=-1000", (0, 100)),
        ("bytes=0-999", (0, 100)),
        ("Bytes = 2-3", (2, 4)),
        ("bytes=3-2", None),
        ("bytes=0-1, 3-4", None),
        ("items=0-1", None),
        ("bytes=-", None),
    ],
)
def test_a_range_is_read_as_the_standard_says(header, part):
    assert parse_range(header, 100) == part


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=100-200", "bytes=-0"])
def test_a_range_outside_the_file_is_refused_with_its_size(header):
    with pytest.raises(RangeNotSatisfiable) as caught:
        parse_range(header, 100)
    assert caught.value.size == 100


def test_a_queued_video_is_predicted_behind_full_batches():
    known = [(Tau(0.0, 100.0, 50.0), 4)]  # 150 ms alone, 300 ms full
    assert queued_ms(known, 0) == 150.0
    assert queued_ms(known, 3) == 300.0
    assert queued_ms(known, 9) == 2 * 300.0 + 200.0
    assert queued_ms(known * 2, 9) == 300.0 + 200.0, "two workers"
    assert queued_ms([], 0) is None


def test_a_running_video_is_predicted_by_its_own_steps_once_it_has_some():
    known = [(Tau(0.0, 0.0, 400.0), 1)]
    assert running_ms(known, 100.0, 0, 4) == 300.0
    assert running_ms(known, 900.0, 0, 4) == 0.0
    slow = running_ms(known, 1000.0, 2, 4)  # others use the device: 400 ms a step
    assert slow == pytest.approx(600.0)
    assert running_ms([], 1000.0, 0, 4) is None


def test_asking_again_is_worth_it_about_when_the_video_is_done_and_within_bounds():
    assert poll_after_ms(300.0) == 320
    assert poll_after_ms(0.0) == 50
    assert poll_after_ms(1e9) == 5_000
    assert poll_after_ms(None) == 500


def test_progress_is_whole_only_at_the_end():
    def view(state):
        return JobView("a", state, "m", "b", 1, 0.0, 0.0, None, None, None)

    running = [view(JobState.RUNNING)]
    assert percent(running, None) == 0
    assert percent(running, StepDone(step=3, steps=4)) == 75
    assert percent(running, StepDone(step=4, steps=4)) == 99
    assert percent([view(JobState.DONE)], None) == 100
    assert percent([view(JobState.DONE), view(JobState.RUNNING)], None) == 50
