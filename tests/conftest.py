"""Shared toy pieces: pictures, a tiny student, its bundles and the evaluation folder that a run would keep."""

import importlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sshd import home, proxy, sshd  # noqa: F401  (fixtures)

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test waits for a hub

REPO = Path(__file__).parent.parent
LABELS = ["cat", "dog", "car", "tree", "house", "apple"]
SIZE, WIDTH = 32, 16


def require(module: str, install_line: str) -> object:
    """The optional module, or a skip that says how to install it (a failure under EDGECLIP_REQUIRE=all)."""
    try:
        return importlib.import_module(module)
    except ImportError:
        pytest.skip(f"{module} is not installed: {install_line}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if os.environ.get("EDGECLIP_REQUIRE") == "all" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not reason.removeprefix("Skipped: ").startswith("data:"):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: EDGECLIP_REQUIRE=all, and it was skipped ({reason})"


def picture(seed: int, width: int = 40, height: int = 40) -> Image.Image:
    """Smooth random colour: neighbouring pixels agree, as in a photo."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def truncated_jpeg(path: Path) -> Path:
    content = encoded(picture(1, 200, 160), "JPEG")
    path.write_bytes(content[: len(content) // 2])
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included: equal before and after where nothing may be left behind."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def torch_student():
    """A small convolutional Student with batch norms whose statistics are not the initial ones."""
    import torch
    from torch import nn

    from edgeclip.students import Student

    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU6()]
    student = Student(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 32, WIDTH, 24)
    student.train()
    with torch.no_grad():
        for step in range(30):
            student(torch.from_numpy(np.stack([toy_input(100 * step + i) for i in range(8)])))
    return student.eval()


def toy_input(seed: int) -> np.ndarray:
    return ((np.asarray(picture(seed, SIZE, SIZE), np.float32) / 255 - 0.5) / 0.25).transpose(2, 0, 1)


def toy_text():
    """A text tower of one embedding table over a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from torch import nn
    from torch.nn import functional as F

    from edgeclip.teachers import TextTower

    words = sorted({w.lower() for t in ["a photo of red umbrella the letter two people shaking hands", *LABELS, "pear", "plum"] for w in t.split()})
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, **{w: i + 2 for i, w in enumerate(words)}}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.table = nn.Embedding(len(words) + 2, 24)
            self.out = nn.Linear(24, WIDTH)

        def forward(self, input_ids):
            mask = (input_ids != 0).float()[:, :, None]
            return F.normalize(self.out((self.table(input_ids) * mask).sum(dim=1) / mask.sum(dim=1)), dim=-1)

    return TextTower(module=Mean().eval(), tokenizer=tokenizer.to_str(), context_length=12)


@pytest.fixture(scope="session")
def student():
    return torch_student()


@pytest.fixture(scope="session")
def preprocess():
    from edgeclip.preprocess import Preprocess

    return Preprocess(size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """48 pictures in one folder."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(48):
        picture(1000 + i, 40 + i % 7, 40 + i % 5).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def source(student, preprocess, photos):
    """What `export` takes: the tiny student with a text side, labels and an EduAttention head."""
    import torch

    from edgeclip import tokenizer
    from edgeclip.export.source import Source
    from edgeclip.pictures import index_folder
    from edgeclip.zero_shot import EduAttention, ensemble, prompts

    text, templates = toy_text(), ["a photo of a {c}", "a {c}"]
    ids = tokenizer.encode(tokenizer.load(text.tokenizer, text.context_length), prompts(LABELS, templates), text.context_length)
    with torch.inference_mode():
        features = text.module(torch.from_numpy(ids)).numpy()
    rng = np.random.default_rng(0)
    pictures = index_folder(photos)
    return Source(
        image_encoder=student,
        preprocess=preprocess,
        load_text=lambda: text,
        labels=LABELS,
        templates=templates,
        class_features=ensemble(features.reshape(len(LABELS), len(templates), -1)),
        head=EduAttention((rng.normal(size=(WIDTH, WIDTH)) / 4).astype(np.float32), np.zeros(WIDTH, np.float32), 0.1, 0.1),
        logit_scale=20.0,
        calibration=lambda: pictures[8:],
        evaluation_hashes=set,
        golden=pictures[:4],
        golden_licence="made up",
        licences={"teacher": "made up", "data": "made up"},
        parents={"student": "0" * 64},
    )


def toy_target(name: str):
    """The shipped target of that name, with the calibration of a toy."""
    import msgspec

    from edgeclip import target

    loaded = target.load(name)[1]
    small = {"pictures": 32, "judged_on": 0, "probe_layers": 2, "layer_cosine": 0.9, "methods": ("minmax",), "smoothing": (None,)}
    spec = target.Calibration(**small, min_int8_share=0, min_speedup=0)
    return msgspec.structs.replace(loaded, calibration=spec) if loaded.calibration else loaded


@pytest.fixture(scope="session")
def shipped_bundle(source, tmp_path_factory) -> Callable[[str], Path]:
    """The toy's bundle for a target, exported once; read only."""
    from edgeclip.export import export

    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if "openvino" in name:
            require("nncf", "pip install 'edgeclip[openvino]'")
        if name not in made:
            made[name] = export(source, name, toy_target(name), tmp_path_factory.mktemp("bundles") / name)
        return made[name]

    return get


@pytest.fixture
def own_bundle(shipped_bundle, tmp_path) -> Callable[[str], Path]:
    """A copy that a test may break."""

    def get(name: str) -> Path:
        return Path(shutil.copytree(shipped_bundle(name), tmp_path / "bundle"))

    return get


def write_evaluation(folder: Path, source, count: int) -> Path:
    """An evaluation folder as `distill` leaves it; the labels are the student's own answers, every fifth one wrong."""
    import torch

    from edgeclip import disk
    from edgeclip.zero_shot import class_scores

    pictures = [picture(5000 + i, SIZE, SIZE) for i in range(count)]
    x = np.stack([((np.asarray(p, np.float32) / 255 - 0.5) / 0.25).transpose(2, 0, 1) for p in pictures])
    with torch.inference_mode():
        features = source.image_encoder(torch.from_numpy(x)).numpy()
    answers = class_scores(features, source.class_features, source.head).argmax(axis=1)
    labels = [int((a + (i % 5 == 0)) % len(LABELS)) for i, a in enumerate(answers)]
    folder.mkdir(parents=True)
    with tarfile.open(folder / "pictures.tar", "w") as tar:
        for i, p in enumerate(pictures):
            add_member(tar, f"{i:06d}.png", encoded(p))
    np.save(folder / "image_features.npy", features)
    sets = [{"name": "all", "note": "made up", "rows": list(range(count)), "classes": list(range(len(LABELS)))}]
    disk.write_json(folder / "evaluation.json", {"labels": labels, "class_names": LABELS, "sets": sets})
    disk.write_manifest(folder, "evaluation", {"licence": "made up", "pictures": count})
    return folder


@pytest.fixture(scope="session")
def evaluation(source, tmp_path_factory) -> Path:
    """400 pictures: enough for a margin of half a percentage point."""
    return write_evaluation(tmp_path_factory.mktemp("run") / "evaluation", source, 400)


RECIPE = """
data: {kind: folders, name: shop, root: ROOT}
teacher:
  kind: open_clip
  model: tiny
  weights: random
  config:
    embed_dim: 8
    vision_cfg: {image_size: 32, layers: 1, width: 16, head_width: 8, patch_size: 16}
    text_cfg: {context_length: 12, vocab_size: 49408, width: 8, heads: 2, layers: 1}
student: {tower: {kind: timm, model: mobilenetv4_conv_small_035, weights: random, image_size: 32}, projector_hidden: null}
losses: {kl: {weight: 1}}
train: {epochs: 1, batch_size: 4, device: cpu}
"""


def run(*arguments):
    """The command line in this process."""
    from click.testing import CliRunner

    from edgeclip.cli import main

    return CliRunner().invoke(main, [str(a) for a in arguments])


def mistake(*arguments, says, only_line=True):
    """The one line of a user's mistake, which must say where, what and what to do."""
    result = run(*arguments)
    assert result.exit_code == 1, (result.output, result.exception)
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0] and (len(lines) == 1 or not only_line), result.stderr
    assert result.stdout == "" and says in errors[0] and "; " in errors[0] and ": " in errors[0].removeprefix("Error: "), errors[0]
    return errors[0]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def cat(here):
    (here / "cat.png").write_bytes(encoded(picture(1)))
    return here / "cat.png"


def write(folder, text, name="r.yaml"):
    (folder / name).write_text(text)
    return folder / name
