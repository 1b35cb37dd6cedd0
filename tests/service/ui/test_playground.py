"""The playground as a visitor uses it."""

import base64
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from support.chromium import Page
from support.serving import Serving, run_flashbulb
from support.tiny_bundle import make_tiny_bundle

pytestmark = pytest.mark.browser

IMAGES = "[...document.querySelectorAll('#pictures img')]"
IDLE = "!document.getElementById('draw').disabled"
VISIBLE_ERROR = "!document.getElementById('error').hidden && document.getElementById('error').textContent"


def draw(page: Page, prompt: str, *, count: int = 3, seed: str = "") -> list[str]:
    page.js(f"document.getElementById('count').value = {count}")
    page.js(f"document.getElementById('seed').value = '{seed}'")
    page.js("document.getElementById('prompt').value = ''; document.getElementById('prompt').focus()")
    page.write(prompt)
    page.press("Enter", 13)
    page.until(
        f"{IMAGES}.length === {count} && {IMAGES}.every((image) => image.naturalWidth === 64) && {IDLE}"
    )
    sources = page.js(f"{IMAGES}.map((image) => image.src)")
    assert isinstance(sources, list)
    return sources


def open_ready(page: Page, url: str) -> None:
    page.open(url)
    page.until("document.getElementById('state').textContent === 'ready'")


def test_prompt_and_enter_draw_pictures_with_their_timings(page: Page, server_url: str) -> None:
    open_ready(page, server_url)
    sources = draw(page, "red apple", count=3, seed="7")
    assert len(set(sources)) == 3
    timings = page.js("document.getElementById('timings').innerText")
    for word in ("In the queue", "Model", "Encoding", "In all", "ms", "tiny@1"):
        assert word in timings
    body = {"prompt": "red apple", "n": 3, "seed": 7}
    direct = httpx2.post(f"{server_url}/v1/images/generations", json=body).json()["data"]
    assert [source.partition(",")[2] for source in sources] == [image["b64_json"] for image in direct]
    assert page.complaints() == []


def test_empty_seed_is_random_and_shown(page: Page, server_url: str) -> None:
    open_ready(page, server_url)
    first = draw(page, "dog", count=1)
    seed = page.js("document.getElementById('timings').lastElementChild.querySelector('dd').textContent")
    second = draw(page, "dog", count=1)
    assert first != second
    assert draw(page, "dog", count=1, seed=seed) == first


def test_the_curl_command_and_the_python_program_give_the_same_picture(
    page: Page, server_url: str, tmp_path: Path
) -> None:
    open_ready(page, server_url)
    sources = draw(page, 'a "red" dog\'s heart', count=2, seed="5")
    shown = [source.partition(",")[2] for source in sources]

    curl = page.js("document.getElementById('curl').textContent")
    done = subprocess.run(["bash", "-c", f"{curl} --silent"], capture_output=True, check=True, timeout=30)
    assert [image["b64_json"] for image in httpx2.Response(200, content=done.stdout).json()["data"]] == shown

    program = page.js("document.getElementById('python').textContent")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=30)
    written = [base64.b64encode((tmp_path / f"image-{i}.png").read_bytes()).decode() for i in range(2)]
    assert written == shown


def test_a_prompt_with_markup_stays_text(page: Page, server_url: str) -> None:
    open_ready(page, server_url)
    draw(page, "<img src=x onerror=alert(1)>", count=1)
    assert page.js("document.querySelectorAll('img[src=x]').length") == 0
    assert page.js("document.querySelector('#pictures img').alt").startswith("<img src=x")


def test_a_refused_request_is_shown_with_code_and_request_id(page: Page, server_url: str) -> None:
    open_ready(page, server_url)
    draw(page, "dog", count=1)
    page.js(
        "document.getElementById('prompt').value = 'a'.repeat(2001);"
        "document.getElementById('form').requestSubmit()"
    )
    text = page.until(VISIBLE_ERROR)
    for word in ("at most 2000", "400 string_above_max_length", "field prompt", "req_"):
        assert word in text
    assert page.js(f"{IMAGES}.length") == 0
    assert page.js("document.getElementById('draw').disabled") is False
    draw(page, "dog", count=1)
    assert page.js("document.getElementById('error').hidden") is True


def test_a_server_that_goes_away_is_told(page: Page, tmp_path: Path) -> None:
    make_tiny_bundle(tmp_path / "models")
    with Serving(tmp_path / "models", tmp_path / "data") as serving:
        open_ready(page, serving.url)
        serving.end()
        page.js(
            "document.getElementById('prompt').value = 'dog'; document.getElementById('form').requestSubmit()"
        )
        assert "does not answer" in page.until(VISIBLE_ERROR)
        assert page.js("document.getElementById('state').textContent") == "no answer"


def test_a_server_with_keys_asks_for_one_and_keeps_it_in_the_tab(page: Page, tmp_path: Path) -> None:
    make_tiny_bundle(tmp_path / "models")
    with Serving(tmp_path / "models", tmp_path / "data", auth="keys") as serving:
        made = run_flashbulb("keys", "create", "page", "--data", tmp_path / "data").stdout.strip()
        page.open(serving.url)
        page.until("!document.getElementById('access').hidden")
        submit = "document.getElementById('access').requestSubmit()"
        page.js(f"document.getElementById('key').value = 'fb_wrong'; {submit}")
        assert "invalid_api_key" in page.until(VISIBLE_ERROR)
        page.until("document.getElementById('key').value === ''")
        admin = run_flashbulb("keys", "create", "ops", "--scope", "admin", "--data", tmp_path / "data")
        page.js(f"document.getElementById('key').value = '{admin.stdout.strip()}'; {submit}")
        assert "missing_scope" in page.until(VISIBLE_ERROR)  # it was kept, and the tab had no way on
        page.until("document.getElementById('key').value === ''")
        assert page.js("[document.getElementById('access').hidden, sessionStorage.length]") == [False, 0]
        page.js(f"document.getElementById('key').value = '{made}'; {submit}")
        page.until("document.getElementById('state').textContent === 'ready'")
        assert page.js("document.getElementById('access').hidden") is True
        draw(page, "dog", count=1)
        shown = page.js("document.body.innerText")
        assert made not in shown and "$FLASHBULB_API_KEY" in shown
        assert page.js("JSON.stringify(localStorage) + document.cookie") == "{}"
        page.open(serving.url)  # again, in the same tab
        page.until("document.getElementById('state').textContent === 'ready'")


class UnderAPath(BaseHTTPRequestHandler):
    """A proxy that has the API under /flashbulb, and nothing elsewhere."""

    target = ""

    def do_GET(self) -> None:
        if not self.path.startswith("/flashbulb/"):
            self.send_error(404)
            return
        url = self.target + self.path.removeprefix("/flashbulb")
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        with httpx2.stream(self.command, url, headers=dict(self.headers.items()), content=body) as answer:
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                if name not in ("connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.end_headers()
            for chunk in answer.iter_raw():
                self.wfile.write(chunk)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


def test_the_playground_works_under_a_path_of_a_proxy(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files, its requests and its pictures were asked for at the proxy's root, where something else may be."""
    make_tiny_bundle(tmp_path / "models")
    with ThreadingHTTPServer(("127.0.0.1", 0), UnderAPath) as proxy:
        public_url = f"http://127.0.0.1:{proxy.server_address[1]}/flashbulb"
        with Serving(tmp_path / "models", tmp_path / "data", public_url=public_url) as serving:
            monkeypatch.setattr(UnderAPath, "target", serving.url)
            threading.Thread(target=proxy.serve_forever).start()
            try:
                open_ready(page, f"{public_url}/")
                draw(page, "dog", count=2)
                assert f"curl {public_url}/v1/" in page.js("document.getElementById('curl').textContent")
                assert page.complaints() == []
            finally:
                page.open("about:blank")
                proxy.shutdown()


@pytest.mark.parametrize("width", [320, 390, 768, 1400])
def test_no_width_scrolls_sideways_and_every_control_is_reachable(
    page: Page, server_url: str, width: int
) -> None:
    page.resize(width, 900)
    open_ready(page, server_url)
    draw(page, "dog", count=4)
    assert page.js("document.documentElement.scrollWidth") <= width
    clipped = page.js(
        "[...document.querySelectorAll('input, select, textarea, button, figure')]"
        ".filter((one) => !one.closest('[hidden]') && (one.getBoundingClientRect().left < 0 ||"
        f" one.getBoundingClientRect().right > {width} + 0.5)).map((one) => one.id || one.textContent)"
    )
    assert clipped == []


def test_every_control_has_a_name_and_text_has_contrast(page: Page, server_url: str) -> None:
    open_ready(page, server_url)
    nameless = page.js(
        "[...document.querySelectorAll('input, select, textarea, button')].filter((one) =>"
        " !(one.labels?.length || one.textContent.trim() || one.ariaLabel)).map((one) => one.outerHTML)"
    )
    assert nameless == []
    assert page.js("document.documentElement.lang") == "en"
    assert page.js("document.getElementById('error').role") == "alert"
    for dark in (False, True):
        page.dark(dark)
        for selector in ("#prompt", "#draw", "#state", "small", "#empty", "h1", ".bar h3", "#curl"):
            colours = page.js(
                f"(() => {{ let at = document.querySelector('{selector}');"
                " const ink = getComputedStyle(at).color;"
                " while (getComputedStyle(at).backgroundColor === 'rgba(0, 0, 0, 0)')"
                " at = at.parentElement;"
                " return [ink, getComputedStyle(at).backgroundColor]; })()"
            )
            assert contrast(*colours) >= 4.5, (selector, dark, colours)  # WCAG 2.2 AA


def test_the_page_asks_nobody_but_its_server(page: Page, server_url: str) -> None:
    open_ready(page, server_url)
    draw(page, "dog", count=1)
    hosts = {urlsplit(url).netloc for url in page.requested() if not url.startswith("data:")}
    assert hosts == {urlsplit(server_url).netloc}
    policy = httpx2.get(server_url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two CSS rgb() colours, as WCAG defines it."""
    bright, dim = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# --------------------------------------------------------------------------------------- the run under way


@pytest.fixture(scope="module")
def slow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve a device that draws a picture at a time and takes its time."""
    folder = tmp_path_factory.mktemp("slow")
    make_tiny_bundle(folder / "models")
    device = '{"floor_ms": 700, "base_ms": 0, "row_ms": 700}'
    settings = {"backend": "synthetic", "synthetic": device, "max_batch": "1"}
    with Serving(folder / "models", folder / "data", **settings) as serving:
        yield serving.url


def press_draw(page: Page, prompt: str, *, count: int, seed: str) -> None:
    page.js(
        f"document.getElementById('count').value = {count}; document.getElementById('seed').value = '{seed}';"
        f"document.getElementById('prompt').value = '{prompt}';"
        "document.getElementById('form').requestSubmit()"
    )


STATUS = "document.getElementById('status').textContent"


def test_progress_counts_pictures_as_they_come(page: Page, slow_url: str) -> None:
    open_ready(page, slow_url)
    press_draw(page, "dog", count=3, seed="1")
    page.until(f"{IMAGES}.length === 1")
    assert page.js(STATUS) == "1 of 3 drawn"
    assert page.js(
        "document.getElementById('bar').value / document.getElementById('bar').max"
    ) == pytest.approx(1 / 3)
    assert page.js("document.getElementById('result').getAttribute('aria-busy')") == "true"
    page.until(f"{IMAGES}.length === 3 && {IDLE}")
    assert page.js("document.getElementById('progress').hidden") is True
    assert page.js("document.getElementById('live').textContent") == "3 pictures drawn."


def test_a_place_in_the_queue_is_shown(page: Page, slow_url: str) -> None:
    open_ready(page, slow_url)
    ahead = httpx2.post(f"{slow_url}/v1/jobs", json={"prompt": "rocket", "n": 4}).json()
    press_draw(page, "dog", count=1, seed="2")
    page.until(f"/^[1-9] in the queue before this|next in the queue/.test({STATUS})")
    page.until(f"{IMAGES}.length === 1 && {IDLE}", timeout_s=30)
    assert httpx2.get(f"{slow_url}/v1/jobs/{ahead['id']}").json()["status"] == "completed"


def test_stop_cancels_what_was_not_drawn_and_keeps_what_was(page: Page, slow_url: str) -> None:
    open_ready(page, slow_url)
    press_draw(page, "cat", count=6, seed="3")
    page.until(f"{IMAGES}.length === 1")
    page.js("document.getElementById('stop').click()")
    page.until(IDLE)
    drawn = page.js(f"{IMAGES}.length")
    assert 1 <= drawn < 6
    assert page.js("document.querySelectorAll('#pictures .pending').length") == 0
    assert page.js("document.getElementById('live').textContent") == f"Stopped: {drawn} of 6 pictures drawn."
    job = httpx2.get(f"{slow_url}/v1/jobs").json()["data"][0]
    assert (job["prompt"], job["status"]) == ("cat", "cancelled")


# Holds or refuses the requests for jobs that a press of "Draw" makes; `posts` counts them.
REFUSE_THE_THIRD = """
    const real = window.fetch; window.posts = 0;
    window.fetch = (path, options) => options?.method === 'POST' && ++window.posts === 3
        ? Promise.resolve(new Response('{"error": {"message": "full", "code": "queue_full"}}', {status: 429}))
        : real(path, options);
"""
HOLD_ONE = """
    const real = window.fetch; window.posts = 0;
    window.fetch = async (path, options) => {
        if (options?.method === 'POST' && ++window.posts === window.held)
            await new Promise((resolve) => { window.release = resolve; });
        return real(path, options);
    };
"""


def jobs_of(url: str, prompt: str) -> list[tuple[int, str]]:
    listed = httpx2.get(f"{url}/v1/jobs").json()["data"]
    return [(job["seed"], job["status"]) for job in listed if job["prompt"] == prompt]


def test_when_a_seed_is_refused_those_before_it_are_cancelled(page: Page, slow_url: str) -> None:
    """They were neither shown nor ended: the device drew pictures for nobody."""
    open_ready(page, slow_url)
    page.js(REFUSE_THE_THIRD)
    press_draw(page, "boat", count=9, seed="1-4")
    assert "full" in page.until(VISIBLE_ERROR)
    page.until(IDLE)
    assert sorted(jobs_of(slow_url, "boat")) == [(1, "cancelled"), (2, "cancelled")]
    assert page.js("window.posts") == 3


@pytest.mark.parametrize("held", [1, 2])
def test_stop_while_seeds_are_still_queued_ends_all_and_queues_no_more(
    page: Page, slow_url: str, held: int
) -> None:
    """It ended those that were known; the one on its way was drawn, and the page went on to queue the others."""
    open_ready(page, slow_url)
    page.js(f"window.held = {held};" + HOLD_ONE)
    press_draw(page, f"tree {held}", count=9, seed="1-4")
    page.until("window.release !== undefined")
    page.js("document.getElementById('stop').click()")
    page.js("window.release()")
    page.until(IDLE)
    assert sorted(jobs_of(slow_url, f"tree {held}")) == [(n + 1, "cancelled") for n in range(held)]
    assert page.js("window.posts") == held


def test_several_seeds_stand_side_by_side_and_their_program_draws_the_same(
    page: Page, server_url: str, tmp_path: Path
) -> None:
    open_ready(page, server_url)
    press_draw(page, "red apple", count=2, seed="5, 8-9")
    page.until(f"{IMAGES}.length === 6 && {IDLE}")
    assert page.js("[...document.querySelectorAll('.row h3')].map((one) => one.textContent)") == [
        "Seed 5",
        "Seed 8",
        "Seed 9",
    ]
    shown = [source.partition(",")[2] for source in page.js(f"{IMAGES}.map((image) => image.src)")]
    program = page.js("document.getElementById('python').textContent")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=30)
    written = [tmp_path / f"image-{seed}-{i}.png" for seed in (5, 8, 9) for i in range(2)]
    assert [base64.b64encode(path.read_bytes()).decode() for path in written] == shown
    assert len(set(shown)) == 6


@pytest.mark.parametrize("seeds", ["apple", "1 2 3 4 5", "1-9", "-3", "1.5"])
def test_what_is_no_list_of_seeds_is_refused_by_the_field(page: Page, server_url: str, seeds: str) -> None:
    open_ready(page, server_url)
    page.js(
        f"document.getElementById('prompt').value = 'dog'; document.getElementById('seed').value = '{seeds}'"
    )
    page.js("document.getElementById('seed').dispatchEvent(new Event('input', {bubbles: true}))")
    assert "Up to 4 numbers" in page.js("document.getElementById('seed').validationMessage")


def test_earlier_runs_stay_and_can_be_used_again(page: Page, server_url: str) -> None:
    open_ready(page, server_url)
    first = draw(page, "red apple", count=2, seed="7")
    assert page.js("document.getElementById('history').hidden") is True
    draw(page, "dog", count=1, seed="1")
    assert page.js("[...document.querySelectorAll('#runs img')].map((image) => image.src)") == first
    assert page.js("document.querySelector('#runs small').textContent") == "tiny, 64x64, seed 7"
    page.js("document.querySelector('#runs button').click()")
    assert page.js("['prompt', 'seed', 'count'].map((id) => document.getElementById(id).value)") == [
        "red apple",
        "7",
        "2",
    ]
    page.js("document.getElementById('form').requestSubmit()")
    page.until(f"{IMAGES}.length === 2 && {IDLE}")
    assert page.js(f"{IMAGES}.map((image) => image.src)") == first
    assert page.js("document.querySelectorAll('#runs li').length") == 2
    page.js("document.getElementById('clear').click()")
    assert page.js("document.getElementById('history').hidden") is True
