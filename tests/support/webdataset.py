"""A WebDataset of three classes."""

import tarfile

from tests.support.images import add_member, encoded, toy_image


def shard(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, (label, caption) in enumerate(rows):
            add_member(tar, f"{i}.png", encoded(toy_image(i, 8, 8)))
            if label is not None:
                add_member(tar, f"{i}.cls", str(label).encode())
            if caption:
                add_member(tar, f"{i}.txt", caption.encode())


def webdataset(tmp_path, classes="cat\ndog\ncar \n\n"):
    for i in (10, 2):
        shard(tmp_path / "train" / f"{i}.tar", [(0, "a cat"), (1, "a dog"), (2, "a car")])
    shard(tmp_path / "test" / "0.tar", [(2, ""), (1, ""), (0, "")])
    (tmp_path / "classnames.txt").write_text(classes)
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}\n")
    return tmp_path
