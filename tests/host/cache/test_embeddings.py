"""Embeddings that others computed are a teacher: clip-retrieval's own writer made the files,
embedding-reader reads ours.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from edgeclip import disk
from edgeclip.device.images import index_folder
from edgeclip.device.metrics import hits, l2_normalize
from edgeclip.errors import EdgeclipError
from edgeclip.host import cache, teachers
from edgeclip.host import recipe as R
from edgeclip.host.cache.inspect import inspect
from edgeclip.host.data import Dataset
from tests.support import toy_cache
from tests.support.command import mistake, run
from tests.support.files import write
from tests.support.images import encoded, toy_image
from tests.support.tiny_recipe import RECIPE

D, COUNT = 16, 24
KEYS = [f"part/{i:02d}.png" for i in range(COUNT)]


def unit(count, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, D)).astype(np.float32)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def embeddings(root, keys=KEYS, texts=True, shards=3):
    """A folder in clip-retrieval's layout, rows in another order than the images."""
    order = np.random.default_rng(1).permutation(len(keys))
    images, captions = unit(len(keys)), unit(len(keys), 2)
    for s, part in enumerate(np.array_split(order, shards)):
        for what, rows in (("img_emb", images), *([("text_emb", captions)] if texts else [])):
            (root / what).mkdir(parents=True, exist_ok=True)
            np.save(root / what / f"{what}_{s}.npy", rows[part])
        (root / "metadata").mkdir(exist_ok=True)
        table = {
            "image_path": [keys[i] for i in part],
            "caption": [f"caption {i}" for i in part],
            "url": [f"http://x/{i}" for i in part],
        }
        pq.write_table(pa.table(table), root / "metadata" / f"metadata_{s}.parquet")
    return root


@pytest.fixture
def photos(tmp_path):
    for i in range(COUNT):
        path = tmp_path / "photos" / "part" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(toy_image(i)))
    return tmp_path / "photos"


def dataset(photos, classes=()):
    return Dataset("photos", "", list(classes), ("a {c}",), [], index_folder(photos), [], [])


def build(tmp_path, root, photos, captions=False, classes=(), **fields):
    teacher = teachers.load(R.Embeddings(root=str(root), **fields))
    data = dataset(photos, classes)
    tower = teachers.folded(teacher)
    cpu = torch.device("cpu")
    ingredients = cache.Ingredients(teacher, tower, data, R.Views(), 0, captions, cpu, 2)
    return cache.build(tmp_path / "cache", ingredients)


def test_every_image_finds_its_row_and_its_caption(tmp_path, photos):
    made = build(tmp_path, embeddings(tmp_path / "theirs"), photos, captions=True)
    assert made.rows.shape == (COUNT, 1, D) and [p.key for p in made.images] == KEYS
    index = np.array([5, 0, 23, 11])
    assert (made.rows[index, np.zeros(4, int)] == unit(COUNT)[index]).all()
    assert (made.caption_features[index, np.zeros(4, int)] == unit(COUNT, 2)[index]).all()
    again = build(tmp_path, tmp_path / "theirs", photos, captions=True)
    assert again.folder == made.folder


def test_its_view_is_the_center_square_of_whatever_size(tmp_path, photos):
    made = build(tmp_path, embeddings(tmp_path / "theirs"), photos)
    image, spec = toy_image(3, 50, 30), toy_cache.SPEC
    center = cache.draw_views(50, 30, R.Views(count=1), random.Random(0))[0]
    assert (
        cache.apply_view(image, made.views[3, 0], spec) == cache.apply_view(image, center, spec)
    ).all()


@pytest.mark.parametrize(
    ("join", "keys"),
    [
        ("name", [f"{i:02d}.png" for i in range(COUNT)]),
        ("stem", [f"elsewhere/{i:02d}.jpg" for i in range(COUNT)]),
    ],
)
def test_keys_may_agree_by_name_or_stem(tmp_path, photos, join, keys):
    made = build(tmp_path, embeddings(tmp_path / "theirs", keys), photos, join=join)
    assert (made.rows[np.arange(COUNT), np.zeros(COUNT, int)] == unit(COUNT)).all()
    with pytest.raises(
        EdgeclipError,
        match=r"24 of 24 images have no row \(first: 'part/00.png'; a row's image_path is '.*'\); set teacher.key and",
    ):
        build(tmp_path, tmp_path / "theirs", photos)


def test_images_without_a_row_are_left_out_only_when_asked(tmp_path, photos):
    root = embeddings(tmp_path / "theirs", KEYS[:20])
    with pytest.raises(EdgeclipError, match=r"4 of 24 images have no row .*or partial: true"):
        build(tmp_path, root, photos)
    made = build(tmp_path, root, photos, partial=True)
    assert [p.key for p in made.images] == KEYS[:20] and len(made.manifest["skipped"]) == 4


def test_teachers_are_joined_only_when_their_rows_are_of_the_same_images_and_views(
    tmp_path, photos
):
    whole = build(tmp_path, embeddings(tmp_path / "theirs"), photos)
    same = build(tmp_path, embeddings(tmp_path / "others", shards=2), photos)
    cache.refuse_other_views(whole, same)
    fewer = build(tmp_path, embeddings(tmp_path / "fewer", KEYS[1:]), photos, partial=True)
    moved = build(tmp_path, embeddings(tmp_path / "moved", KEYS[:-1]), photos, partial=True)
    for first, other, what in (
        (whole, fewer, r"has 23 images x 1 views, which differ from those of"),
        (moved, fewer, "has images that are not those of"),
    ):
        with pytest.raises(EdgeclipError, match=what):
            cache.refuse_other_views(first, other)
    drawn = whole._replace(views=np.ones((COUNT, 1, 5), np.float32))
    cache.refuse_other_views(whole, drawn)  # of embeddings no view is known: it is CLIP's own
    with pytest.raises(EdgeclipError, match="has views that are not those of"):
        cache.refuse_other_views(drawn, drawn._replace(views=2 * drawn.views))


def test_two_models_embeddings_in_files_of_equal_names_and_sizes_are_told_apart(tmp_path, photos):
    first, second = embeddings(tmp_path / "first"), embeddings(tmp_path / "second")
    for file in (second / "img_emb").glob("*.npy"):
        np.save(file, -np.load(file))
    assert build(tmp_path, first, photos).folder != build(tmp_path, second, photos).folder


def test_two_rows_of_one_key_are_named(tmp_path, photos):
    root = embeddings(tmp_path / "theirs", [*KEYS[:20], *KEYS[:4]])
    with pytest.raises(
        EdgeclipError,
        match=r"rows \d+ and \d+ have the same image_path 'part/0\d.png' \(join: key\); use another key or join",
    ):
        build(tmp_path, root, photos)


def test_damaged_folders_are_named(tmp_path, photos):
    root = embeddings(tmp_path / "theirs")
    with pytest.raises(EdgeclipError, match=r"no column 'uid'; known: caption, image_path, url"):
        build(tmp_path, root, photos, key="uid")
    file = root / "img_emb" / "img_emb_1.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(
        EdgeclipError,
        match=r"img_emb_1.npy: has \d+ bytes of \d+, and metadata_1.parquet says 8 rows",
    ):
        build(tmp_path, root, photos)
    np.save(file, unit(7))
    with pytest.raises(
        EdgeclipError, match=r"img_emb_1.npy: has 7 rows, and metadata_1.parquet says 8 rows"
    ):
        build(tmp_path, root, photos)
    file.unlink()
    with pytest.raises(EdgeclipError, match="has 2 files in img_emb and 3 in metadata"):
        build(tmp_path, root, photos)
    file.write_bytes(whole)
    (root / "metadata" / "metadata_0.parquet").write_bytes(b"PAR1")
    with pytest.raises(EdgeclipError, match=r"metadata_0.parquet: is no readable parquet file"):
        build(tmp_path, root, photos)


TRAINS = """
data: {kind: folders, name: shop, root: photos, test_fraction: 0.3}
teacher: {kind: embeddings, root: theirs, join: key, class_features: classes.npy, logit_scale: 30, partial: true}
student: {tower: {kind: timm, model: mobilenetv4_conv_small_035, weights: random, image_size: 32}, projector_hidden: null}
losses: {kl: {weight: 1}, feature: {weight: 1}}
train: {epochs: 1, batch_size: 4, device: cpu}
text_encoder: false
"""


@pytest.fixture
def shop(here, photos):
    (photos / "other").mkdir()
    for i in range(12):
        (photos / "other" / f"{i:02d}.png").write_bytes(encoded(toy_image(50 + i)))
    photos.rename(here / "photos")
    embeddings(here / "theirs", [*KEYS, *(f"other/{i:02d}.png" for i in range(12))])
    np.save(here / "classes.npy", unit(2, 9))
    return here


def test_a_student_is_distilled_with_no_teacher_ever_run(shop):
    result = run("distill", write(shop, TRAINS), "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    results = json.loads(result.stdout)
    (row,) = results["sets"]
    assert row["teacher"] is None and results["models"]["teacher"]["parameters"] is None
    features, truth = (
        np.load("runs/r/evaluation/image_features.npy"),
        np.array(disk.read_json(Path("runs/r/evaluation/evaluation.json"))["labels"]),
    )
    assert (
        row["student"]["top1"]
        == hits(features @ l2_normalize(np.load("classes.npy")).T, truth, 1).mean()
    )  # with the classes that were given
    assert run("distill", write(shop, TRAINS)).exit_code == 0  # the table says not measured


def test_what_a_loss_lacks_is_refused_by_name(shop):
    captions = TRAINS.replace("kl: {weight: 1}, feature", "affinity: {weight: 1}, feature")
    (shop / "theirs" / "text_emb").rename(shop / "aside")
    mistake(
        "distill",
        write(shop, captions.replace("losses: {", "losses: {captions: data, ")),
        says="losses.affinity: needs",
        only_line=False,
    )
    none = TRAINS.replace("class_features: classes.npy, ", "")
    mistake(
        "distill",
        write(shop, none),
        says="losses.kl: needs class features, and teacher has neither text nor class_features",
        only_line=False,
    )
    mistake(
        "distill",
        write(shop, TRAINS.replace("text_encoder: false", "")),
        says="text_encoder: the teacher has no text encoder to ship",
    )
    mistake(
        "distill",
        write(shop, TRAINS.replace("kl: {weight: 1}", "if_align: {normalize: false}")),
        says="losses.if_align: needs the teacher's norms",
    )
    (shop / "classes.npy").rename(shop / "other.npy")
    mistake(
        "distill",
        write(shop, TRAINS),
        says="classes.npy: there is no such file; check the recipe's teacher.class_features",
        only_line=False,
    )
    (shop / "classes.npy").write_bytes(b"")
    mistake(
        "distill",
        write(shop, TRAINS),
        says="classes.npy: is no readable .npy file",
        only_line=False,
    )
    np.save(shop / "classes.npy", unit(3))
    mistake(
        "distill",
        write(shop, TRAINS),
        says="teacher.class_features: has 3 rows, and there are 2 classes",
        only_line=False,
    )
    np.save(shop / "classes.npy", unit(2)[:, :7])
    mistake("distill", write(shop, TRAINS), says="not rows of width 16", only_line=False)
    assert RECIPE


# --- clip-retrieval and embedding-reader themselves, in an environment of their own: they need an
# older numpy and pandas

INSTALL = [
    "clip-retrieval",
    "embedding-reader",
    "fsspec",
    "tqdm",
    "numpy<2",
    "pandas<3",
    "pyarrow<16",
    "python-dateutil",
    "pytz",
    "tzdata",
    "six",
]

WRITE = """
import importlib.util, json, sys
import numpy as np
package = importlib.util.find_spec("clip_retrieval").submodule_search_locations[0]
spec = importlib.util.spec_from_file_location("writer", package + "/clip_inference/writer.py")  # the package itself wants faiss, torch and flask
writer = importlib.util.module_from_spec(spec); spec.loader.exec_module(writer)
rows, texts, keys, out = np.load(sys.argv[1]), np.load(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
for part in range(2):
    w = writer.NumpyWriter(part, out, True, True, True, 2)
    for i in range(part, len(keys), 2):
        w({"image_embs": rows[i : i + 1], "text_embs": texts[i : i + 1], "image_filename": [keys[i]], "text": [f"caption {i}"],
           "metadata": [json.dumps({"url": f"http://x/{i}", "width": 40 + i})]})
    w.flush()
"""

READ = """
import json, os, sys
import numpy as np
from embedding_reader import EmbeddingReader
reader = EmbeddingReader(embeddings_folder=sys.argv[1] + "/img_emb", metadata_folder=sys.argv[1] + "/metadata",
                         file_format="parquet_npy", meta_columns=["image_path", "caption"])
rows, keys = [], []
for emb, meta in reader(batch_size=7, start=0, end=reader.count, show_progress=False):
    rows.append(emb); keys += meta["image_path"].tolist()
np.save(sys.argv[2], np.concatenate(rows)); print(json.dumps([int(reader.dimension), keys]), flush=True)
os._exit(0)  # its reading threads may still run, and then the interpreter's end aborts
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Their Python: that of EDGECLIP_CLIP_RETRIEVAL, or one that is made here."""
    python = os.environ.get("EDGECLIP_CLIP_RETRIEVAL")
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    if not python:
        home = tmp_path_factory.mktemp("clip-retrieval")
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, env=environment)
        python = str(home / "bin" / "python")
        done = subprocess.run(
            [python, "-m", "pip", "install", "-q", "--no-deps", *INSTALL],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(
                f"clip-retrieval is not installed: python -m venv E && E/bin/pip install --no-deps {' '.join(INSTALL)}, then EDGECLIP_CLIP_RETRIEVAL=E/bin/python"
            )

    def call(code, *arguments):
        done = subprocess.run(
            [python, "-c", code, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


@pytest.mark.slow
def test_what_clip_retrievals_own_writer_wrote_is_a_teacher(theirs, tmp_path, photos):
    np.save(tmp_path / "images.npy", unit(COUNT))
    np.save(tmp_path / "texts.npy", unit(COUNT, 2))
    theirs(
        WRITE,
        tmp_path / "images.npy",
        tmp_path / "texts.npy",
        json.dumps(KEYS),
        tmp_path / "written",
    )
    found = inspect(tmp_path / "written")
    assert (found["images"], found["width"], found["captions"], found["shards"]) == (
        COUNT,
        D,
        1,
        2,
    ) and "url" in found["data"]
    made = build(tmp_path, tmp_path / "written", photos, captions=True)
    every = np.arange(COUNT)
    assert [p.key for p in made.images] == KEYS and (
        made.rows[every, every * 0] == unit(COUNT)
    ).all()
    assert (made.caption_features[every, every * 0] == unit(COUNT, 2)).all()


@pytest.mark.slow
def test_embedding_reader_reads_ours(theirs, tmp_path, folder, monkeypatch):
    from edgeclip.host.cache import live

    monkeypatch.setattr(live, "SHARD_IMAGES", (1, 1))  # twelve shards: their names must sort
    made = toy_cache.build(tmp_path, toy_cache.dataset(folder))
    width, keys = json.loads(theirs(READ, made.folder, tmp_path / "read.npy"))
    assert width == toy_cache.D and keys == [p.key for p in made.images]
    assert (
        np.load(tmp_path / "read.npy") == made.rows.unit(np.arange(12), np.zeros(12, int))
    ).all()
