"""A recipe that loads, and what is said of one that does not."""

import pytest

from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe
from tests.support.files import write

RECIPE = """
data: {kind: folders, name: shop, root: /a}
teacher: {kind: open_clip, model: ViT-B-32, weights: random}
student: {tower: {kind: timm, model: mobilenetv4_conv_small, weights: random, image_size: 64}}
losses: {kl: {weight: 1}}
"""


def error(tmp_path, text):
    with pytest.raises(EdgeclipError) as e:
        recipe.load(write(tmp_path, text))
    return str(e.value)
