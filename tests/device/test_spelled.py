"""Class names that a text encoder would read letter by letter are said, at every door."""

import pytest

from edgeclip.device import spelled, tokenizer
from edgeclip.host.recipe import OpenClip
from edgeclip.host.towers.tokenization import tokenization
from edgeclip.progress import say_once
from tests.support.command import run
from tests.support.images import encoded, toy_image

CODES = {
    "WordNet ids": ["n01855672", "n02091244", "n02105505"],
    "WordNet ids and words": ["n01440764 tench, Tinca tinca", "n01443537 goldfish"],
    "numbers": ["0", "1", "10", "2"],
    "begin with a number": ["001.Black footed Albatross", "002.Laysan Albatross"],
    "begin with a number ": ["0 cat", "1 dog"],
    "begin with a number  ": ["0: кот", "1: собака"],
    "joined by _": ["golden_retriever", "great_white_shark"],
    "without spaces": ["AnnualCrop", "HerbaceousVegetation"],
}
WORDS = [
    ["cat", "dog"],
    ["a cat", "2 euro coin", "a dog"],
    ["737-400", "A300B4", "DC-10"],
    ["7 up"],
    ["T-shirt", "X-ray"],
    ["苹果", "犬", "猫"],
    ["crème brûlée", "café"],
    ["McDonald", "a burger", "fries"],
    ["USA", "UK"],
    ["n01 road", "n02 road"],
    [],
]


@pytest.mark.parametrize("kind", CODES)
def test_codes_are_said_with_their_number_and_the_first(kind):
    line = spelled.told(CODES[kind])
    assert kind.strip().removesuffix(" and words") in line
    assert f"{len(CODES[kind])} of {len(CODES[kind])}" in line and CODES[kind][0] in line


@pytest.mark.parametrize("names", WORDS, ids=" ".join)
def test_words_are_not(names):
    assert spelled.told(names) is None


def test_most_of_the_names_are_enough():
    assert spelled.told([*CODES["WordNet ids"], "cat"]) is not None
    assert spelled.told([*CODES["WordNet ids"], "cat", "dog", "cow", "owl"]) is None


def test_where_names_become_tokens_it_is_said_once(capsys):
    made = tokenization(OpenClip(model="ViT-B-32", weights="random"))
    words = tokenizer.load(made.tokenizer, 77, made.cleaning)
    say_once.cache_clear()
    for _ in range(2):
        tokenizer.check_class_names(words, CODES["numbers"], ["a photo of a {c}"])
    assert capsys.readouterr().err.count("4 of 4 are numbers") == 1
    tokenizer.check_class_names(words, ["a cat", "a dog"], ["a photo of a {c}"])
    assert capsys.readouterr().err == ""


def test_init_says_it_and_names_captions_that_it_does_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in CODES["WordNet ids"]:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "photos" / name / f"{i}.jpg").write_bytes(encoded(toy_image(i)))
            (tmp_path / "photos" / name / f"{i}.txt").write_text("a caption")
    lines = run("init", "photos").stdout.splitlines()
    assert any("3 of 3 are WordNet ids (first: 'n01855672')" in line for line in lines)
    assert any(line.startswith("captions: 9 .txt files") for line in lines)
