"""One option has one meaning, and one rule holds at every door: words, files of words, counts."""

import json
import shutil

import pytest

from edgeclip.cli import main, words
from edgeclip.device.bundle import Bundle
from edgeclip.errors import EdgeclipError
from tests.support.command import mistake, run
from tests.support.files import same, snapshot, write

LISTS = [
    ("a cat, a dog", ["a cat", "a dog"]),
    ("a cat,a dog,", ["a cat", "a dog"]),
    ('"salt, pepper", a cat', ["salt, pepper", "a cat"]),
    ('a cat, "say ""hi"", twice"', ["a cat", 'say "hi", twice']),
    ('5" pipe, dog’s bed', ['5" pipe', "dog’s bed"]),
    ("a cat", ["a cat"]),
]
REFUSED = [
    ("", "the list is empty"),
    (" , ", "the list is empty"),
    ("a,, b", "label 2 is empty"),
    ('"a, b', "quotes cannot be read"),
    ("a\nb", "several lines"),
    ("a\tb, c", "control character"),
    ("nothing.txt", "there is no such file"),
    ("@nothing", "there is no such file"),
]


@pytest.mark.parametrize(("given", "meant"), LISTS)
def test_words(here, given, meant):
    assert words.labels(given) == meant


@pytest.mark.parametrize(("given", "says"), REFUSED)
def test_what_is_no_list(here, given, says):
    with pytest.raises(EdgeclipError, match=says):
        words.labels(given)


def test_a_file_of_words_with_and_without_its_sign(here, capsys):
    write(here, "a cat\nsalt, pepper\n", "mine.txt")
    assert words.labels("@mine.txt") == ["a cat", "salt, pepper"]
    assert capsys.readouterr().err == ""
    assert words.labels("mine.txt") == ["a cat", "salt, pepper"]
    assert "the labels of the file mine.txt" in capsys.readouterr().err


def doors(bundle, cat, given):
    """Every command that takes labels."""
    yield "classify", cat, "--bundle", bundle, "--labels", given
    yield "labels", bundle, given, "--out", "new"
    yield (
        *("export", "--model", "clip.json", "--weights", "random", "--target", "onnx-fp32"),
        *("--labels", given, "--out", "exported"),
    )


def tiny_clip(folder):
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    write(folder, json.dumps(config), "clip.json")


@pytest.mark.parametrize(("given", "says"), REFUSED)
def test_every_door_refuses_alike(here, cat, clip_bundle, given, says):
    tiny_clip(here)
    before = snapshot(here)
    for command in doors(clip_bundle, cat, given):
        mistake(*command, says=says, only_line=False)
    same(here, before)


def test_every_door_takes_the_same(here, cat, clip_bundle):
    tiny_clip(here)
    write(here, "pear\nsalt, pepper\n", "words.txt")
    meant = ["pear", "salt, pepper"]
    for given in ('pear, "salt, pepper"', "@words.txt", "words.txt"):
        for command in doors(clip_bundle, cat, given):
            result = run(*command, "--json")
            assert result.exit_code == 0, result.output
        assert Bundle.load("new").labels == meant
        assert Bundle.load("exported/onnx-fp32").labels == meant
        shutil.rmtree("new")
        shutil.rmtree("exported")


@pytest.mark.parametrize(
    ("given", "says"),
    [("pear, pear", "pear"), ("Pear, plum, pear", "the same tokens"), ("ﬁg, fig", "tokens")],
)
def test_labels_that_cannot_be_told_apart(here, cat, clip_bundle, given, says):
    """`distill` judges its classes by the same function: host/teachers/test_class_names."""
    tiny_clip(here)
    before = snapshot(here)
    for command in doors(clip_bundle, cat, given):
        mistake(*command, says=says, only_line=False)
    same(here, before)


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "many"])
def test_counts_below_one(cat, shipped_bundle, count):
    bundle = shipped_bundle("onnx-fp32")
    for command in (
        ("classify", cat, "--bundle", bundle, "--top", count),
        ("validate", "--bundle", bundle, "--images-limit", count),
    ):
        result = run(*command)
        assert result.exit_code == 2 and count in result.stderr


def test_labels_replaces_nothing_that_was_not_named(here, own_bundle):
    bundle = own_bundle("onnx-fp32")
    before = snapshot(bundle)
    result = run("labels", bundle, "a pear, an apple")
    assert result.exit_code == 0, result.output
    new = bundle.with_name(f"{bundle.name}-labels")
    assert Bundle.load(new, check=True).labels == ["a pear", "an apple"]
    mistake("labels", bundle, "a plum, a pear", says="lies there already")
    mistake("labels", bundle, "a plum, a pear", "--out", bundle, says="is BUNDLE itself")
    same(bundle, before)
    assert run("labels", bundle, "a plum, a pear", "--in-place").exit_code == 0
    assert Bundle.load(bundle, check=True).labels == ["a plum", "a pear"]
    both = run("labels", bundle, "a plum", "--out", "x", "--in-place")
    assert both.exit_code == 2 and "exclude each other" in both.stderr


def commands():
    for command in main.commands.values():
        yield from getattr(command, "commands", {"": command}).values()


def test_an_option_takes_the_same_kind_of_value_everywhere():
    kinds = {}
    for command in commands():
        for option in command.params:
            for spelled in option.opts:
                kinds.setdefault(spelled, set()).add((type(option.type).__name__, option.nargs))
    assert "--images" in kinds
    assert {spelled: found for spelled, found in kinds.items() if len(found) > 1} == {}
