"""What ships gives the ids of open_clip's own tokenizer of that model, for every text."""

import pytest
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from edgeclip.device import tokenizer
from edgeclip.errors import EdgeclipError
from edgeclip.host.recipe import OpenClip
from edgeclip.host.towers.tokenization import tokenization
from tests.support.strings import assigned, labels, mixed
from tests.support.tokens import clip_words
from tests.support.trained_tokenizers import FAMILIES, trained


def ids(words, text):
    return tokenizer.encode(words, [text], truncate=True)[0].tolist()


def own(folder=None, **text):
    """An open_clip model of one's own, whose texts go through the tokenizer in `folder`."""
    config = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"context_length": 24, **text}}
    return OpenClip(model="own", weights="random", config=config, tokenizer=folder)


def shipped(spec):
    made = tokenization(spec)
    return tokenizer.load(made.tokenizer, 24, made.cleaning)


def test_clips_ids_are_open_clips_for_strings_of_all_kinds():
    words, theirs = clip_words(), SimpleTokenizer()
    for text in [*mixed(4000), *labels()]:
        assert ids(words, text) == theirs([text])[0].tolist(), repr(text)


def test_clips_ids_are_open_clips_for_every_character():
    """Alone, and between letters, digits and signs, where a word begins or goes on with it."""
    words, theirs = clip_words(40), SimpleTokenizer(context_length=40)
    for c in assigned()[::11]:
        text = f"{c} x{c}x 1{c}1 !{c}! '{c}s"
        assert ids(words, text) == theirs([text])[0].tolist(), repr(text)


@pytest.mark.parametrize("kind", ["lower", "whitespace", "canonicalize"])
def test_the_cleaning_that_a_configuration_names_is_the_one_that_ships(kind):
    words = shipped(own(tokenizer_kwargs={"clean": kind}))
    theirs = SimpleTokenizer(context_length=24, clean=kind)
    for text in mixed(500, seed=1):
        assert ids(words, text) == theirs([text])[0].tolist(), repr(text)


@pytest.mark.parametrize("kind", ["whitespace", "canonicalize"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_a_tokenizer_of_transformers_are_open_clips(family, kind, tmp_path):
    folder = trained(family, tmp_path)
    words = shipped(own(folder, hf_tokenizer_name="elsewhere", tokenizer_kwargs={"clean": kind}))
    theirs = HFTokenizer(folder, context_length=24, clean=kind)
    for text in [*mixed(500, seed=2), "", "word " * 60]:
        assert ids(words, text) == theirs([text])[0].tolist(), repr(text)


@pytest.mark.parametrize("text", ["<start_of_text>", "a <END_OF_TEXT> b", "x<Start_Of_Text>"])
def test_a_text_that_spells_clips_start_or_end_is_refused(text):
    with pytest.raises(EdgeclipError, match="ends or begins a text"):
        ids(clip_words(), text)


def test_what_a_tokenizer_json_cannot_say_is_refused_by_its_option(tmp_path):
    folder = trained("BertTokenizer", tmp_path)
    spec = own(folder, tokenizer_kwargs={"strip_sep_token": True})
    with pytest.raises(EdgeclipError, match="strip_sep_token"):
        tokenization(spec)
    with pytest.raises(EdgeclipError, match="reduction_mask"):
        tokenization(own(tokenizer_kwargs={"reduction_mask": "syntax"}))


def test_a_tokenizer_that_does_not_come_is_asked_for(monkeypatch, tmp_path):
    with pytest.raises(EdgeclipError, match="tokenizer: FOLDER"):
        tokenization(OpenClip(model="ViT-B-16-SigLIP", weights="random"))
    with pytest.raises(EdgeclipError, match="could not be loaded"):
        tokenization(own(str(tmp_path / "nowhere")))
