"""`flashbulb generate` of a video, with no server."""

import io

import av
import numpy as np
from PIL import Image

from flashbulb_service.backends import ImageRequest, Student
from support.serving import run_flashbulb
from support.tiny_bundle import FRAMES


def test_a_file_name_that_ends_in_mp4_gets_a_video(models_dir, tmp_path):
    files = [tmp_path / name for name in ("a.mp4", "b.mp4", "c.mp4")]
    for file, seed in zip(files, ("7", "7", "8"), strict=True):
        done = run_flashbulb("generate", "red apple", "-o", file, "--seed", seed, "--models", models_dir)
        assert done.returncode == 0, done.stderr
        assert "tiny-video@1" in done.stderr
        assert "ms per video" in done.stderr
    first, second, third = (file.read_bytes() for file in files)
    assert first == second != third
    with av.open(io.BytesIO(first)) as container:
        assert sum(1 for _ in container.decode(video=0)) == FRAMES


async def test_a_webp_of_a_student_of_videos_moves_and_shows_what_the_server_draws(
    models_dir, tmp_path, mixed
):
    out = tmp_path / "a.webp"
    done = run_flashbulb(
        "generate", "dog", "-o", out, "--seed", "3", "--model", "tiny-video", "--models", models_dir
    )
    assert done.returncode == 0, done.stderr
    request = ImageRequest("dog", 3, 0, 64, 64, frames=FRAMES)
    (drawn,) = Student(mixed.videos.inner).generate([request])
    picture = Image.open(out)
    assert picture.n_frames == FRAMES
    for index, frame in enumerate(drawn):
        picture.seek(index)
        assert np.array_equal(np.asarray(picture.convert("RGB")), frame)


def test_a_file_of_the_other_medium_is_refused_in_one_line(models_dir, tmp_path):
    for model, name, told in (
        ("tiny-video", "a.png", "makes videos: expected a file name ending in .mp4 or .webp"),
        ("tiny", "a.mp4", "makes pictures: expected a file name ending in .png, .jpg or .webp"),
    ):
        arguments = ("generate", "dog", "-o", tmp_path / name, "--model", model, "--models", models_dir)
        done = run_flashbulb(*arguments)
        assert done.returncode == 2
        assert told in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / name).exists()
