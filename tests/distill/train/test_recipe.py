"""Recipes: the shipped one loads, and what is wrong is said in one line."""

import json
import re
from pathlib import Path

import pytest

from flashbulb_distill.train.recipe import RecipeError, load_recipe

RECIPE = Path(__file__).parents[3] / "distill" / "recipes" / "emoji.yaml"


def test_the_shipped_recipe_holds_the_papers_numbers():
    recipe = load_recipe(RECIPE)
    assert (recipe.adp.lambda_latent, recipe.adp.lambda_pixel) == (0.85, 0.15)
    assert recipe.adm.update_ratio == 1
    assert recipe.time_steps == (1.0,)


def test_overrides_change_one_value_and_the_hash():
    recipe, other = load_recipe(RECIPE), load_recipe(RECIPE, ["adm.steps=3", "adp.rates.student=1e-5"])
    assert (other.adm.steps, other.adp.rates.student) == (3, 1e-5)
    assert other.sha256() != recipe.sha256()
    assert other.pairs == recipe.pairs


def test_a_part_that_is_left_out_has_no_say_in_the_hash():
    recipe = load_recipe(RECIPE)
    assert (recipe.save_every, recipe.checkpoint_every) == (None, 100)
    assert load_recipe(RECIPE, ["save_every=null"]).sha256() == recipe.sha256()
    assert "save_every" not in recipe.model_dump(exclude_none=True), "so older recipes keep theirs"
    assert load_recipe(RECIPE, ["save_every=1000"]).checkpoint_every == 1000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adm.stepz=3", "adm.stepz"),
        ("adm.steps=0", "greater than or equal to 1"),
        ("adm.steps", "expected key.of.recipe=value"),
        ("nothing.here=1", "no section 'nothing'"),
        ("adm.jacobian=half", "detach"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(override, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(RECIPE, [override])
    assert "\n" not in str(caught.value)


def test_a_discriminator_of_pixels_is_refused_for_videos():
    video, adp = RECIPE.with_name("emoji_motion.yaml"), load_recipe(RECIPE).adp.model_dump(mode="json")
    pairs = '{"count": 4, "num_steps": 2, "guidance": 2}'
    changes = [f"adp={json.dumps(adp)}", f"pairs={pairs}"]
    with pytest.raises(RecipeError, match=r"adp\.lambda_pixel: expected 0 for videos, .*, got 0\.15"):
        load_recipe(video, changes)
    assert load_recipe(video, [*changes, "adp.lambda_pixel=0"]).is_video


def test_a_missing_file_and_a_file_that_is_no_yaml_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match="expected YAML"):
        load_recipe(tmp_path / "bad.yaml")


@pytest.mark.parametrize("path", sorted(RECIPE.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_says_where_each_value_of_its_stages_comes_from(path):
    recipe = load_recipe(path)
    assert re.sub("_(continued|variety)$", "", path.stem).replace("_", "") == recipe.name.replace("-", "")
    if recipe.adm is not None and not recipe.is_demo:
        assert recipe.adm.delta_t == 1 / 64, "the paper's"
        assert recipe.adm.update_ratio == 1, "the paper's"
        lines = path.read_text().partition("\nadm:\n")[2].partition("\n\n")[0].splitlines()
        bare = [
            line for line in lines if not any(tag in line for tag in ("[paper]", "[fallback]", "[guess]"))
        ]
        assert not bare


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["regression=null", "adp=null", "adm=null"], "expected at least one training stage"),
        (["pairs=null"], "learns from ODE pairs: expected a section pairs"),
        (["family=sd3"], "expected a shape"),
        (["export.fps=8"], "export.fps: expected of a video and only there"),
        (["time_steps=[999,749,499,249]"], r"time_steps: expected descending times in \(0, 1\], got \(999"),
        (["time_steps=[0.5,1.0]"], "time_steps: expected descending times"),
        (["time_steps=[]"], "time_steps: expected descending times"),
        (["adp.pixel_taps=[]"], r"yaml: adp\.pixel_taps: expected blocks for the heads .*, got none$"),
        (["adm.time_range=[0.98,0.02]"], r"adm\.time_range: expected 0 < low < high <= 1, got 0\.98 and"),
        (["adm.time_range=[-0.5,0.98]"], r"adm\.time_range: expected it to begin at 0 or later, got -0\.5$"),
        (["adm.delta_t=0.99"], r"adm\.delta_t: expected below the end of time_range, 0\.98, got 0\.99$"),
    ],
)
def test_sections_that_do_not_fit_together_are_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(RECIPE, overrides)


def test_a_time_range_of_adm_may_begin_at_0():
    """Samples are noised to delta_t at the least; runs of such a recipe could no longer be gone on with."""
    recipe = load_recipe(RECIPE, ["adm.time_range=[0,0.98]"])
    assert recipe.adm.times == (recipe.adm.delta_t, 0.98)
