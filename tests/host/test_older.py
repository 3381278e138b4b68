"""What edgeclip 0.1 wrote is read in today's words."""

from edgeclip.host import older


def test_a_recipe_of_0_1_is_read_with_its_blocks_renamed():
    written = {
        "data": {"kind": "folders", "licence": "CC0"},
        "train": {"first": {"epochs": 2}, "epochs": 3},
        "distill": {"quantize": "onnx-int8", "epochs": 1},
        "parity": {"max_pictures": 10},
        "losses": {"if_align": {"normalise": False}},
    }
    assert older.recipe_description(written) == {
        "data": {"kind": "folders", "license": "CC0"},
        "train": {"pretrain": {"epochs": 2}, "epochs": 3},
        "qat": {"target": "onnx-int8", "epochs": 1},
        "parity": {"max_images": 10},
        "losses": {"if_align": {"normalize": False}},
    }


def test_today_s_words_are_left_alone():
    today = {"qat": {"target": "onnx-int8"}, "train": {"pretrain": None}, "seed": 1}
    assert older.recipe_description(today) == today
