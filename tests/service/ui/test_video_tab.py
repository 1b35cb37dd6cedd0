"""The playground's tab for videos as a visitor uses it."""

import base64
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from support.chromium import Page
from support.serving import Serving
from support.tiny_bundle import make_tiny_bundle, make_tiny_video_bundle

pytestmark = pytest.mark.browser

SLOW = '{"floor_ms": 5, "base_ms": 4, "row_ms": 1, "frame_ms": 15}'  # a video takes a third of a second
IDLE = "!document.getElementById('draw').disabled"
PLAYER = "document.querySelector('#pictures video')"


@pytest.fixture(scope="module")
def both_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("both")
    make_tiny_bundle(folder / "models")
    make_tiny_video_bundle(folder / "models")
    with Serving(
        folder / "models", folder / "data", "--backend", "synthetic", synthetic=SLOW, max_batch="1"
    ) as serving:
        yield serving.url


def open_tab(page: Page, url: str) -> None:
    page.open(url)
    page.until("document.getElementById('state').textContent === 'ready'")
    page.js("document.getElementById('tab-videos').click()")


def make(page: Page, prompt: str, seed: str) -> None:
    page.js(f"document.getElementById('seed').value = '{seed}'; document.getElementById('prompt').value = ''")
    page.js("document.getElementById('prompt').focus()")
    page.write(prompt)
    page.press("Enter", 13)


def test_a_prompt_becomes_a_video_that_plays_loops_and_shows_its_frames(page: Page, both_url: str) -> None:
    open_tab(page, both_url)
    assert page.js("document.getElementById('model').value") == "tiny-video"
    assert page.js("document.getElementById('seconds').innerText.trim()") == "1.5 s"
    page.js(
        "window.seen = new Set(), new MutationObserver(() => seen.add(document.getElementById('status').textContent))"
        ".observe(document.getElementById('status'), {childList: true, characterData: true, subtree: true})"
    )
    make(page, "rocket flying up", "7")
    seen = page.until(f"{PLAYER}?.readyState >= 2 && {IDLE} && [...window.seen].join('|')")
    assert "step " in seen and " of 4" in seen
    about = page.js(f"[{PLAYER}.videoWidth, {PLAYER}.videoHeight, {PLAYER}.duration, {PLAYER}.loop]")
    assert about == [64, 64, 1.5, True]
    page.until(f"{PLAYER}.currentTime > 0")  # it has begun by itself
    page.js("document.querySelector('.loop input').click()")
    assert page.js(f"{PLAYER}.loop") is False
    page.until(f"{PLAYER}.ended")
    page.js("document.querySelector('details summary').click()")
    sheet = "document.querySelector('details img')"
    assert page.js(f"[{sheet}.naturalWidth, {sheet}.naturalHeight]") == [192, 128]
    page.until(f"{sheet}.clientHeight > 0")
    shown = page.js("document.querySelector('figcaption a').href").partition(",")[2]
    listed = httpx2.get(f"{both_url}/v1/videos").json()["data"][0]
    assert listed["seed"] == 7
    assert base64.b64decode(shown) == httpx2.get(f"{both_url}/v1/videos/{listed['id']}/content").content
    assert "tiny-video@1" in page.js("document.getElementById('timings').innerText")
    assert page.complaints() == []
    assert {urlsplit(url).netloc for url in page.requested()} <= {urlsplit(both_url).netloc, ""}


def test_stop_cancels_the_video(page: Page, both_url: str) -> None:
    open_tab(page, both_url)
    make(page, "dog", "1-4")
    page.until("!document.getElementById('stop').hidden && document.getElementById('bar').value > 0")
    page.js("document.getElementById('stop').click()")
    page.until(IDLE)
    assert "Stopped" in page.js("document.getElementById('live').textContent")
    statuses = [video["status"] for video in httpx2.get(f"{both_url}/v1/videos?limit=4").json()["data"]]
    assert "cancelled" in statuses
    assert page.complaints() == []


def test_a_count_of_pictures_stops_no_video(page: Page, both_url: str) -> None:
    """The hidden field was checked all the same: "Make video" did nothing, and said nothing."""
    page.open(both_url)
    page.until("document.getElementById('state').textContent === 'ready'")
    page.js("document.getElementById('count').value = 99; document.getElementById('tab-videos').click()")
    make(page, "dog", "3")
    page.until(f"{PLAYER} && {IDLE}")
    page.js("document.getElementById('tab-images').click()")
    assert page.js("document.getElementById('form').checkValidity()") is False


def test_the_requests_shown_as_text_make_the_same_video(page: Page, both_url: str, tmp_path: Path) -> None:
    open_tab(page, both_url)
    make(page, 'a "red" dog\'s heart', "5")
    page.until(f"{PLAYER}?.readyState >= 2 && {IDLE}")
    shown = base64.b64decode(page.js("document.querySelector('figcaption a').href").partition(",")[2])
    curl = page.js("document.getElementById('curl').textContent")
    subprocess.run(["bash", "-c", curl], cwd=tmp_path, check=True, timeout=30)
    assert (tmp_path / "video-5.mp4").read_bytes() == shown
    program = page.js("document.getElementById('python').textContent")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=30, capture_output=True)
    assert (tmp_path / "video.mp4").read_bytes() == shown


def test_the_tab_fits_a_phone_and_the_keyboard_moves_between_tabs(page: Page, both_url: str) -> None:
    page.resize(360, 740)
    open_tab(page, both_url)
    make(page, "rocket flying up", "7")
    page.until(f"{PLAYER}?.readyState >= 2 && {IDLE}")
    assert page.js("document.documentElement.scrollWidth") <= 360
    assert page.js("document.getElementById('count-field').hidden") is True
    page.js("document.getElementById('tab-videos').focus()")
    page.press("ArrowLeft", 37)
    assert page.js("document.activeElement.id") == "tab-images"
    assert page.js("document.getElementById('model').value") == "tiny"
    assert page.js("document.getElementById('count-field').hidden") is False


def test_a_server_of_one_medium_has_no_tabs(page: Page, server_url: str) -> None:
    page.open(server_url)
    page.until("document.getElementById('state').textContent === 'ready'")
    assert page.js("document.getElementById('tabs').hidden") is True
