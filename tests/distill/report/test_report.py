"""The report: one file that a browser shows without asking for anything else, saying what the run's files say."""

import json
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flashbulb_distill.report.chart import line_chart
from flashbulb_distill.report.collect import Stage, collect, estimates
from flashbulb_distill.report.page import page
from flashbulb_distill.report.pictures import Drawn, Model, data_uri, draw, fewer_steps
from flashbulb_distill.report.write import write_report
from flashbulb_distill.run import start_run
from flashbulb_distill.train.recipe import RecipeError, load_recipe
from support.chromium import Page, find_chromium
from support.tiny_teacher import make_tiny_teacher

RECIPE = Path(__file__).parents[3] / "distill" / "recipes" / "emoji.yaml"
PROMPTS = ("red <apple>", "rocket", "star")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps a stage, with an evaluation that was written by hand."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    overrides = [
        f"teacher={make_tiny_teacher(folder / 'teacher')}", f"prompts={folder / 'prompts.txt'}",
        "precision=float32", "evaluate=null", "regression=null", "time_steps=[1.0,0.5]",
        "pairs.count=4", "pairs.num_steps=2", "pairs.batch_size=4",
        "adp.steps=2", "adp.batch_size=2", "adp.pixel_batch=2", "adp.warmup_steps=0", "adp.taps=[-1,0]",
        "adm.steps=4", "adm.batch_size=2", "adm.warmup_steps=0", "adm.taps=[-1,0]",
        "guard.every=2", "report.prompts=2", "report.seeds=2", "report.teacher_steps=3",
    ]  # fmt: skip
    run = start_run(load_recipe(RECIPE, overrides), folder / "run", resume=False)
    run.adm()
    (run.out / "evaluation").mkdir()
    figures = {
        "recall": 0.25,
        "style_coverage": {"value": 0.75, "low": 0.7, "high": 0.8, "n": 9, "num_groups": 3},
    }
    for name in ("student", "teacher"):
        (run.out / "evaluation" / f"{name}.json").write_text(
            json.dumps({"metrics": figures, "num_images": 9})
        )
    run.doctor()
    return run


@pytest.fixture(scope="module")
def path(run):
    return run.report()


def test_it_is_one_file_without_scripts_or_anything_from_elsewhere(path):
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "url(" not in text
    assert "red &lt;apple&gt;" in text, "what a user wrote is text, not markup"


@pytest.mark.browser
def test_a_browser_shows_it_and_asks_for_nothing_else(path, tmp_path):
    binary = find_chromium()
    if binary is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    with Page(binary, tmp_path / "profile") as shown:
        shown.open(path.as_uri())
        assert shown.js("document.querySelector('h1').textContent") == "emoji 1"
        images = shown.js("[...document.images].map(i => [i.complete, i.naturalWidth])")
        # 2 prompts x 2 seeds x (teacher in 3 and 2 steps, last and averaged student in 2 and 1 steps)
        assert images == [[True, 64]] * (2 * 2 * 6)
        assert shown.js("document.querySelectorAll('svg polyline').length") > 10
        assert shown.js("document.querySelector('svg').getBoundingClientRect().width") > 200
        assert shown.js("document.documentElement.scrollWidth <= window.innerWidth")
        shown.resize(390, 800)
        assert shown.js("document.documentElement.scrollWidth <= window.innerWidth"), (
            "no sideways scrolling on a phone"
        )
        shown.screenshot(tmp_path / "report.png")
        assert np.asarray(Image.open(tmp_path / "report.png").convert("RGB")).std() > 10, "the page is blank"
        assert shown.complaints() == []
        assert [url for url in shown.requested() if not url.startswith(("file:", "data:"))] == []
        assert len([url for url in shown.requested() if url.startswith("file:")]) == 1


def test_it_says_what_the_runs_files_say(run, path):
    text = path.read_text(encoding="utf-8")
    assert text.count("0.750 (0.700 to 0.800)") == 2, "figures with their intervals, student and teacher"
    assert json.loads((run.out / "recipe.json").read_text())["sha256"] in text
    for stage in ("adp", "adm"):
        assert f"Health of {stage}" in text
    assert (run.out / "adm" / "samples" / "00000004.png").stat().st_size > 0, "what the guard's probe drew"
    for finding in json.loads((run.out / "doctor.json").read_text())["findings"]:
        assert finding["check"] in text
    assert "delta_t" in text, "the resolved recipe"


def test_the_average_and_the_last_weights_are_drawn_apart(run, path):
    """One changed weight of the average must change its pictures, and no others."""
    rows = re.findall(r"<th>([^<]+)<br>(\d) steps?</th>(.*?)</tr>", path.read_text(encoding="utf-8"))
    before = {(name, steps): cells for name, steps, cells in rows[:6]}
    assert set(before) == {
        ("teacher", "3"), ("teacher", "2"),
        ("student, last weights", "2"), ("student, last weights", "1"),
        ("student, average", "2"), ("student, average", "1"),
    }  # fmt: skip
    assert len({re.sub('alt="[^"]*"', "", cells) for cells in before.values()}) == 6
    student = run.out / "adm" / "student.safetensors"
    kept = student.read_bytes()
    from safetensors.torch import load_file

    values = load_file(student)
    values["transformer.proj_out.bias"] += 0.5
    save_file(values, student)
    after = run.report().read_text(encoding="utf-8")
    student.write_bytes(kept)
    for (name, _), cells in before.items():
        assert (cells in after) == (name != "student, average")


def test_a_run_that_is_not_done_has_no_report(tmp_path, run):
    other = start_run(run.recipe, tmp_path / "other", resume=False)
    with pytest.raises(RecipeError, match="whose stage adm is done; run it first"):
        other.report()


def test_events_of_the_guard_are_told_and_marked(run, tmp_path):
    event = {"step": 40, "action": "roll back", "reason": "diversity_kept <0.2", "to_step": 20}
    band = {"figure": "diversity_kept", "low": 0.6, "high": None}
    look = {"step": 20, "figures": {"diversity_kept": 0.9}, "faults": []}
    (tmp_path / "adm").mkdir()
    (tmp_path / "adm" / "guard.json").write_text(
        json.dumps({"events": [event], "bands": [band], "looks": [look]})
    )
    (tmp_path / "adm" / "metrics.jsonl").write_text(
        '{"stage": "adm", "step": 20, "seconds": 3.0, "loss": 1.0}\n'
    )
    text = page(collect(tmp_path, ["adm"], tmp_path / "none"), [], [], [], "here")
    assert "step 40: <b>roll back</b> to step 20: diversity_kept &lt;0.2" in text
    assert 'class="band"' in text and 'class="mark"' in text


def test_time_is_summed_over_resumes():
    lines = tuple({"step": s, "seconds": t} for s, t in ((10, 5.0), (20, 9.0), (30, 2.0), (40, 4.0)))
    assert Stage("adm", lines, None).seconds == 13.0


def test_estimates_are_read_from_pictures_and_from_clips():
    pictures = {
        "metrics": {"recall": 0.5, "none": None, "coverage": {"value": 1, "low": 0, "high": 2}},
        "n": 3,
    }
    assert estimates(pictures) == {"recall": (0.5, None, None), "coverage": (1, 0, 2)}
    assert estimates({"trained": {"motion": 0.5}}) == {"trained.motion": (0.5, None, None)}


def test_a_chart_puts_values_where_they_belong():
    svg = line_chart("x", {"x": [(0, 0.0), (10, 1.0), (5, float("nan"))]}, band=(0.5, None))
    points = re.search(r'points="([^"]+)"', svg).group(1)
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in points.split())
    assert x0 < x1 and y0 > y1, "time to the right, more is higher; what is no number is left out"
    top, height = map(
        float, re.search(r'y="([\d.]+)" width="\d+" height="([\d.]+)" class="band"', svg).groups()
    )
    assert (top, top + height) == pytest.approx((y1, (y0 + y1) / 2), abs=0.1)
    assert line_chart("x", {"x": []}) == ""


def test_fewer_steps_are_every_second_and_fourth_of_the_students_own():
    assert fewer_steps((1.0, 0.75, 0.5, 0.25)) == [(1.0, 0.75, 0.5, 0.25), (1.0, 0.5), (1.0,)]


def test_a_model_is_compared_with_the_teachers_pictures_and_timed():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    ticks, done = iter(range(100)), []
    models = [
        Model("teacher", 9, lambda: lambda prompts, seeds: pictures[seeds]),
        Model("student", 1, lambda: lambda prompts, seeds: pictures[seeds] // 2),
    ]
    teacher, grey = draw(
        models, ["a", "b"], [0, 1, 2], lambda *now: done.append(now), clock=lambda: next(ticks)
    )
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert np.array_equal(teacher.images, np.stack([pictures[:3]] * 2))
    assert teacher.seconds == 1
    assert teacher.compare(teacher)["diversity"] == pytest.approx(1)
    assert grey.compare(teacher)["contrast"] == pytest.approx(0.5, abs=0.01)


def test_one_network_is_in_memory_at_a_time():
    """Of several float32 copies a GPU that just held the training has no room for two."""
    alive: weakref.WeakSet = weakref.WeakSet()
    others = []

    class Network:
        def __call__(self, prompts, seeds):
            return np.zeros((1, 8, 8, 3), np.uint8)

    def load():
        others.append(len(alive))
        network = Network()
        alive.add(network)
        return network

    draw([Model(str(n), 1, load) for n in range(3)], ["a"], [0, 1], lambda done, total: None)
    assert others == [0, 0, 0]


def test_the_clock_does_not_run_while_text_encoders_are_loaded(run, tmp_path, monkeypatch):
    asked = []

    def encode(teacher, prompts):
        asked.append(list(prompts))
        return told(teacher, prompts)

    def drawn(models, prompts, seeds, progress):
        assert asked == [[prompt] for prompt in prompts]
        return []

    kind = type(run.teacher)
    told = kind.encode
    monkeypatch.setattr(kind, "encode", encode)
    monkeypatch.setattr("flashbulb_distill.report.write.draw", drawn)
    write_report(tmp_path, run.recipe, run.teacher, PROMPTS, run.bundle_folder)
    assert asked


def test_a_run_that_is_done_does_not_fail_for_want_of_memory_for_pictures(run, tmp_path, monkeypatch, capsys):
    def draw(*unused):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 30.00 GiB.")

    monkeypatch.setattr("flashbulb_distill.report.write.draw", draw)
    (tmp_path / "adm").mkdir()
    path = write_report(tmp_path, run.recipe, run.teacher, PROMPTS, tmp_path / "bundle")
    assert "None were drawn." in path.read_text()
    assert "no memory to draw on this device" in capsys.readouterr().err


def test_clips_are_shown_as_a_few_of_their_frames():
    clips = np.zeros((1, 2, 16, 32, 32, 3), np.uint8)
    wide = data_uri(clips[0, 0])
    assert wide.startswith("data:image/png;base64,")
    drawn = Drawn("student", 1, clips, 1.0)
    assert set(
        drawn.compare(Drawn("teacher", 9, torch.randint(0, 255, clips.shape, dtype=torch.uint8).numpy(), 1.0))
    )
