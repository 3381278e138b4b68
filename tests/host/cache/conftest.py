"""What the tests of the cache share."""

import pytest

from tests.support.images import toy_image


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(12):
        toy_image(i, 20 + i, 30 - i).save(tmp_path / "images" / f"{i:02d}.png")
    return tmp_path / "images"
