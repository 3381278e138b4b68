"""What the tests of the cache share."""

import pytest

from tests.support.images import picture


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        picture(i, 20 + i, 30 - i).save(tmp_path / "pictures" / f"{i:02d}.png")
    return tmp_path / "pictures"
