"""A text is cleaned as open_clip cleans it, with ftfy or, where it is certain, without."""

import html
import sys
import unicodedata

import ftfy
import pytest

from edgeclip.device.cleaning import clean, is_sound
from edgeclip.errors import EdgeclipError, printable
from tests.support.strings import assigned, labels, mixed


@pytest.fixture
def without_ftfy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)  # an import of it fails


def test_entities_quotes_and_broken_encodings_become_what_was_meant():
    assert clean("a dog’s bed", "lower") == "a dog's bed"
    assert clean("Cat &amp;amp; Dog", "lower") == "cat & dog"
    assert clean("  ſchön \n\t CafÃ© ", "whitespace") == "ſchön Café"
    assert clean("ﬁsh_and-chips!", "canonicalize") == "fish andchips"
    assert clean("ΣΚΥΛΟΣ", "lower") == "σκυλος"


def test_a_cleaned_text_is_what_ftfy_and_html_make_of_it():
    for text in mixed(2000):
        fixed = html.unescape(html.unescape(ftfy.fix_text(text)))
        assert clean(text, "lower") == " ".join(fixed.split()).lower(), repr(text)


def test_a_sound_text_is_one_that_ftfy_leaves_but_for_curled_quotes():
    """Every character between letters, every pair of old alphabets' letters, and mixed strings."""
    straight = str.maketrans("‘’“”", "''\"\"")
    old = [c for c in assigned(0x530) if not c.isascii() and is_sound(f"a{c}a")]
    texts = [f"a{c}a" for c in assigned()]
    texts += [f"{a}{b}" for a in old[::3] for b in old]
    texts += list(mixed(5000))
    sound = 0
    for text in texts:
        composed = unicodedata.normalize("NFC", text)
        if is_sound(composed):
            sound += 1
            assert ftfy.fix_text(text) == composed.translate(straight), repr(text)
    assert sound > 200_000


@pytest.mark.parametrize("kind", ["whitespace", "lower", "canonicalize"])
def test_labels_of_many_languages_are_cleaned_alike_without_ftfy(kind, monkeypatch):
    there = [clean(label, kind) for label in labels()]
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert [clean(label, kind) for label in labels()] == there


@pytest.mark.parametrize("text", ["CafÃ©", "cat &amp; dog", "ﬁsh", "ｆｕｌｌ", "a\x00b", "Ã©t�"])
def test_what_is_not_certain_without_ftfy_is_refused_by_name(text, without_ftfy):
    with pytest.raises(EdgeclipError) as e:
        clean(text, "lower")
    assert printable(text) in str(e.value) and "pip install 'edgeclip[text]'" in str(e.value)
