"""client.videos of the unmodified OpenAI client, against a real server with a real student of videos."""

import io
import json
import time

import av
import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from support.tiny_bundle import FPS, FRAMES

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")

SECONDS = FRAMES / FPS


def frames_of(data):
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        seconds = float(stream.duration * stream.time_base)
        return seconds, np.array([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])


def test_create_and_poll_then_download_list_and_delete(client):
    video = client.videos.create_and_poll(prompt="red apple", extra_body={"seed": 7})
    assert (video.object, video.status, video.progress, video.error) == ("video", "completed", 100, None)
    assert (video.model, video.size, video.seconds) == ("tiny-video@1", "64x64", "1.5")
    assert video.prompt == "red apple"
    assert video.created_at <= video.completed_at < video.expires_at
    assert video.seed == 7

    file = client.videos.download_content(video.id)
    assert file.response.headers["content-type"] == "video/mp4"
    seconds, frames = frames_of(file.read())
    assert seconds == SECONDS
    assert frames.shape == (FRAMES, 64, 64, 3)
    assert frames.std() > 10
    thumbnail = Image.open(io.BytesIO(client.videos.download_content(video.id, variant="thumbnail").read()))
    sheet = Image.open(io.BytesIO(client.videos.download_content(video.id, variant="spritesheet").read()))
    assert (thumbnail.format, thumbnail.size, sheet.size) == ("WEBP", (64, 64), (192, 128))

    assert client.videos.retrieve(video.id) == video
    assert video in list(client.videos.list())
    gone = client.videos.delete(video.id)
    assert (gone.id, gone.deleted, gone.object) == (video.id, True, "video.deleted")
    for ask in (client.videos.retrieve, client.videos.delete, client.videos.download_content):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(video.id)
        assert caught.value.code == "video_not_found"
    assert video.id not in [one.id for one in client.videos.list()]


def test_equal_seeds_give_equal_bytes_and_others_other_ones(client):
    seeds = (7, 7, 8)
    videos = [client.videos.create_and_poll(prompt="dog", extra_body={"seed": seed}) for seed in seeds]
    first, again, other = [client.videos.download_content(video.id).read() for video in videos]
    assert first == again != other


def test_the_list_comes_in_pages(client):
    made = [client.videos.create(prompt="dog").id for _ in range(3)]
    assert [one.id for one in client.videos.list(limit=2)][:3] == made[::-1], "pages follow by themselves"
    page = client.videos.list(limit=2)
    assert (len(page.data), page.has_more, page.last_id) == (2, True, made[1])
    assert [one.id for one in client.videos.list(after=made[0], order="asc", limit=5).data] == made[1:]
    with pytest.raises(openai.NotFoundError, match="after"):
        client.videos.list(after="video_" + "0" * 32)


def test_videos_are_listed_as_jobs_by_their_task(client):
    made = [client.videos.create(prompt="dog").id for _ in range(2)]
    videos = client.get("/jobs", cast_to=object, options={"params": {"task": "text-to-video", "limit": 2}})
    assert [(job["id"], job["task"]) for job in videos["data"]] == [
        (one, "text-to-video") for one in made[::-1]
    ]
    assert client.get("/jobs", cast_to=object)["data"] == []
    with pytest.raises(openai.BadRequestError, match="task"):
        client.get("/jobs", cast_to=object, options={"params": {"task": "dance"}})


def test_a_remix_is_the_same_noise_under_other_words(client):
    video = client.videos.create_and_poll(prompt="red apple", seconds="1.5", extra_body={"seed": 9})
    remix = client.videos.remix(video.id, prompt="green dog")
    assert (remix.remixed_from_video_id, remix.prompt, remix.seed) == (video.id, "green dog", 9)
    remix = client.videos.poll(remix.id)
    own = client.videos.create_and_poll(prompt="green dog", extra_body={"seed": 9})
    contents = [client.videos.download_content(one.id).read() for one in (video, remix, own)]
    assert contents[0] != contents[1] == contents[2]


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"size": "1280x720"}, "size", "64x64"),
        ({"seconds": "4"}, "seconds", r"offers 1\.5, got '4'"),
        ({"seconds": "soon"}, "seconds", r"offers 1\.5"),
        ({"extra_body": {"fps": 24}}, "fps", "offers 4, got 24"),
        ({"extra_body": {"num_frames": 49}}, "num_frames", "offers 6, got 49"),
        ({"extra_body": {"steps": 50}}, "steps", r"\(4\), got 50"),
        ({"extra_body": {"guidance_scale": 7.5}}, "guidance_scale", "2 baked in"),
        ({"extra_body": {"negative_prompt": "blur"}}, "negative_prompt", "leave it out"),
        ({"input_reference": ("a.png", b"png", "image/png")}, "input_reference", "words alone"),
        ({"extra_body": {"input_reference": {"file_id": "file-1"}}}, "input_reference", "words alone"),
        ({"model": "tiny"}, "model", "draws pictures: POST /v1/images/generations"),
        ({"extra_body": {"num_frame": 6}}, "num_frame", "did you mean 'num_frames'"),
        ({"extra_body": {"seed": "x"}}, "seed", "integer"),
        ({"prompt": " "}, "prompt", "blanks"),
    ],
)
def test_what_the_student_does_not_offer_is_refused_with_what_it_does(client, fields, param, told):
    with pytest.raises(openai.BadRequestError, match=told) as caught:
        client.videos.create(**{"prompt": "red apple", **fields})
    assert caught.value.param == param


def test_every_field_goes_through_a_form_as_through_json(client, server_url):
    fields = {"seed": 3, "steps": 4, "num_frames": 6, "fps": 4, "metadata": {"who": "me", "why": "tests"}}
    by_form = client.videos.create(prompt="true", size="64x64", seconds="1.5", extra_body=fields)
    asked = {"prompt": "true", "size": "64x64", "seconds": 1.5, "model": "sora-2", **fields}
    by_json = httpx2.post(f"{server_url}/v1/videos", json=asked).json()
    for name in ("prompt", "seed", "size", "seconds", "num_frames", "fps", "steps", "metadata", "model"):
        assert by_json[name] == getattr(by_form, name), name
    assert by_json["metadata"] == {"who": "me", "why": "tests"}
    videos = [client.videos.poll(one) for one in (by_form.id, by_json["id"])]
    assert len({client.videos.download_content(video.id).read() for video in videos}) == 1


def test_openais_names_mean_the_default_of_their_medium(client):
    assert client.videos.create(prompt="dog", model="sora-2-pro").model == "tiny-video@1"
    with pytest.raises(openai.BadRequestError, match="POST /v1/images/generations"):
        client.videos.create(prompt="dog", model="tiny")
    with pytest.raises(openai.BadRequestError, match="makes videos: POST /v1/videos"):
        client.images.generate(prompt="dog", model="tiny-video")
    assert client.images.generate(prompt="dog").model == "tiny@1"
    models = {model.id: model for model in client.models.list()}
    told = models["tiny-video"]
    assert (told.task, told.fps, told.num_frames, told.seconds) == ("text-to-video", 4.0, [6], ["1.5"])
    assert told.aliases == ["sora-2", "sora-2-pro"]


def test_a_remix_takes_the_prompts_that_a_video_does(client, server_url):
    video = client.videos.create(prompt="dog")
    for prompt, code in (("a\0b", "invalid_value"), ("", "empty_string"), (" ", "empty_string")):
        answer = httpx2.post(f"{server_url}/v1/videos/{video.id}/remix", json={"prompt": prompt})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
        assert answer.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("route", ["edits", "extensions", "characters"])
def test_routes_that_take_a_video_say_that_no_student_does(server_url, route):
    answer = httpx2.post(f"{server_url}/v1/videos/{route}", files={"video": b"x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_task")


def test_parts_of_a_file_are_served_by_their_range(client, server_url):
    video = client.videos.create_and_poll(prompt="dog", extra_body={"seed": 1})
    url = f"{server_url}/v1/videos/{video.id}/content"
    whole = httpx2.get(url)
    assert (whole.status_code, whole.headers["accept-ranges"]) == (200, "bytes")
    size = len(whole.content)
    for asked, start, end in [
        ("0-99", 0, 100),
        ("100-", 100, size),
        ("-50", size - 50, size),
        ("5-999999", 5, size),
    ]:
        part = httpx2.get(url, headers={"range": f"bytes={asked}"})
        assert part.status_code == 206
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert part.content == whole.content[start:end]
    beyond = httpx2.get(url, headers={"range": f"bytes={size}-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{size}")
    assert beyond.json()["error"]["code"] == "range_not_satisfiable"
    for ignored in ("bytes=0-1,3-4", "lines=0-1", "bytes=-", "bytes=9-3"):
        assert httpx2.get(url, headers={"range": ignored}).content == whole.content
    tag = whole.headers["etag"]
    assert httpx2.get(url, headers={"range": "bytes=0-1", "if-range": tag}).status_code == 206
    assert httpx2.get(url, headers={"range": "bytes=0-1", "if-range": '"other"'}).status_code == 200
    assert httpx2.get(url, params={"variant": "gif"}).status_code == 400


def test_an_idempotency_key_makes_one_video(client):
    headers = {"Idempotency-Key": f"once-{time.time_ns()}"}
    first, again = [client.videos.create(prompt="dog", extra_headers=headers) for _ in range(2)]
    assert first.id == again.id


def test_the_same_words_for_a_video_are_no_repetition_of_a_picture_or_of_another_remix(client, server_url):
    """The second one was answered with the first one's work, under a key and by a client's own retry."""
    key = {"Idempotency-Key": f"mixed-{time.time_ns()}"}
    client.images.generate(prompt="dog", extra_headers=key)
    with pytest.raises(openai.ConflictError) as caught:
        client.videos.create(prompt="dog", extra_headers=key)
    assert caught.value.code == "idempotency_conflict"
    videos = [client.videos.create(prompt=word, extra_body={"seed": 1}).id for word in ("dog", "apple")]
    for headers, statuses in (
        ({"Idempotency-Key": f"remix-{time.time_ns()}"}, [200, 409]),
        ({"x-stainless-retry-count": "1"}, [200, 200]),
    ):
        answers = [
            httpx2.post(f"{server_url}/v1/videos/{video}/remix", json={"prompt": "heart"}, headers=headers)
            for video in videos
        ]
        assert [answer.status_code for answer in answers] == statuses
    assert [answer.json()["remixed_from_video_id"] for answer in answers] == videos


# ------------------------------------------------------------------------------------- while it is made


def test_progress_grows_by_steps_and_the_header_says_when_to_ask_again(slow_client):
    raw = slow_client.videos.with_raw_response.create(prompt="red apple")
    video, seen, waits = raw.parse(), [], [int(raw.headers["openai-poll-after-ms"])]
    with pytest.raises(openai.NotFoundError, match="is not ready"):
        slow_client.videos.download_content(video.id)
    while video.status in ("queued", "in_progress"):
        raw = slow_client.videos.with_raw_response.retrieve(video.id)
        video = raw.parse()
        seen.append(video.progress)
        if "openai-poll-after-ms" in raw.headers:
            waits.append(int(raw.headers["openai-poll-after-ms"]))
    assert seen == sorted(seen)
    assert {25, 50, 75, 100} <= set(seen)
    assert all(50 <= wait <= 5_000 for wait in waits)
    assert "openai-poll-after-ms" not in raw.headers, "it has ended"


def test_the_client_comes_back_about_when_a_video_is_done(slow_client):
    """Its own second between two looks would cost more than the video takes."""
    slow_client.videos.create_and_poll(prompt="red apple")  # the worker has published its times since
    video = slow_client.videos.create(prompt="red apple", extra_body={"seed": 1})
    start = time.monotonic()
    done = slow_client.videos.poll(video.id)
    assert done.status == "completed"
    assert time.monotonic() - start < 1.0 + done.timings["batch_ms"] / 1000


def test_deleting_a_video_that_is_made_cancels_it_and_frees_the_device(slow_client):
    first = slow_client.videos.create(prompt="red apple")
    second = slow_client.videos.create(prompt="dog", extra_body={"num_frames": FRAMES})
    while slow_client.videos.retrieve(first.id).status != "in_progress":
        time.sleep(0.01)
    assert slow_client.videos.delete(first.id).deleted
    with pytest.raises(openai.NotFoundError):
        slow_client.videos.retrieve(first.id)
    assert slow_client.videos.poll(second.id).status == "completed"


def test_a_cancelled_video_says_so(slow_client, slow_url):
    video = slow_client.videos.create(prompt="red apple")
    assert httpx2.delete(f"{slow_url}/v1/jobs/{video.id}").json()["status"] == "cancelled"
    polled = slow_client.videos.poll(video.id)
    assert (polled.status, polled.error) == ("cancelled", None)
    with pytest.raises(openai.NotFoundError, match="was cancelled"):
        slow_client.videos.download_content(video.id)


def test_the_events_of_a_video_tell_every_step(slow_client, slow_url):
    video = slow_client.videos.create(prompt="red apple")
    events = []
    with httpx2.stream("GET", f"{slow_url}/v1/jobs/{video.id}/events", timeout=20) as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                events.append([line.removeprefix("event: ")])
            elif line.startswith("data: "):
                events[-1].append(json.loads(line.removeprefix("data: ")))
    steps = [(data["step"], data["steps"]) for name, data in events if name == "video.progress"]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    names = [name for name, _ in events if name != "job.status"]
    assert (names[0], names[-2:]) == ("video.queued", ["video.done", "job.completed"])
    last = events[-1][1]
    assert (last["id"], last["task"], last["output_format"]) == (video.id, "text-to-video", "mp4")
    assert httpx2.get(last["data"][0]["url"]).headers["content-type"] == "video/mp4"
