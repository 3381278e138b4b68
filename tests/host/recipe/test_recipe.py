"""A recipe is the whole description of a run: shipped ones load, combinations that cannot work are
refused.
"""

import msgspec
import pytest

from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe
from tests.support.files import REPO, write
from tests.support.recipe_errors import RECIPE, error


@pytest.mark.parametrize("path", sorted((REPO / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_recipe_loads_and_says_its_purpose_and_command(path):
    recipe.load(path)
    header = path.read_text().split("\n\n")[0]
    for word in ("Purpose", "Source", "Hardware", "Expected", "Command"):
        assert f"# {word}" in header


def test_data_says_where_the_data_lies_and_nothing_else(tmp_path):
    path = write(tmp_path, RECIPE)
    here, there = recipe.load(path), recipe.load(path, ("/b",))
    assert there.data.root == "/b" and recipe.load(path, ("shop=/c",)).data.root == "/c"
    assert recipe.description(here) == recipe.description(there) and "/a" not in str(
        recipe.description(here)
    )
    with pytest.raises(EdgeclipError, match="no data named 'stop'"):
        recipe.load(path, ("stop=/c",))


def test_a_description_reads_back_as_the_same_recipe(tmp_path):
    loaded = recipe.load(write(tmp_path, RECIPE))
    value = recipe.description(loaded)
    value["data"]["root"] = "/a"
    assert msgspec.convert(value, recipe.Recipe) == loaded


@pytest.mark.parametrize(
    ("losses", "what"),
    [
        ("{}", "has no loss"),
        ("{edu_attention: {}, feature: {}}", "no loss of its own"),
        ("{if_align: {axis: tokens}}", "needs token features"),
        ("{if_align: {axis: channels, momentum: 0.5}}", "momentum"),
        ("{if_align: {normalize: false, features: head}}", "needs a raw form"),
        ("{if_align: {momentum: 1.0}}", "momentum"),
        ("{kl: {}, edu_attention: {query: raw}}", "set keep: false"),
        ("{kl: {}, edu_attention: {axis: batch}}", "set keep: false"),
        ("{kl: {temperature: 0}}", "losses.kl.temperature"),
        ("{affinity: {logit_scale: 0}}", "losses.affinity.logit_scale"),
        ("{contrastve: {}}", "did you mean 'contrastive'"),
    ],
)
def test_combinations_that_cannot_work_are_refused(tmp_path, losses, what):
    assert what in error(tmp_path, RECIPE.replace("{kl: {weight: 1}}", losses))


def test_self_training_starts_within_stage_1(tmp_path):
    text = RECIPE.replace("{kind: open_clip, model: ViT-B-32, weights: random}", "{kind: conse}")
    assert "adapt.self_training.start: is beyond the 50 steps" in error(
        tmp_path, f"{text}adapt: {{kind: residual_head, steps: 50, self_training: {{start: 50}}}}\n"
    )


def test_an_anchor_prompt_names_the_class(tmp_path):
    text = RECIPE.replace(
        "{kind: open_clip, model: ViT-B-32, weights: random}",
        "{kind: conse, anchor_prompt: 'a {}'}",
    )
    assert (
        "teacher.anchor_prompt: 'a {}' has no {c}; write {c} where the class's name goes"
        in error(tmp_path, text)
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            "train: {batch_size: 1}",
            "train.batch_size: is 1, and the projector's batch norm needs at least 2 images; raise it, or set student.projector_hidden to null",
        ),
        ("train: {warmup_batch_size: 1}", "train.warmup_batch_size: is 1"),
        ("views: {ratio: [0, 1]}", "views.ratio[0]: expected `float` > 0.0"),
        ("views: {scale: [0.5, -1]}", "views.scale[1]: expected `float` > 0.0"),
    ],
)
def test_numbers_that_cannot_work_are_refused(tmp_path, more, says):
    assert says in error(tmp_path, RECIPE + more)
    recipe.load(
        write(
            tmp_path,
            RECIPE.replace("size: 64}", "size: 64}, projector_hidden: null")
            + "train: {batch_size: 1}",
        )
    )
