"""A finished run with a bundle and its reports, for tests that train nothing."""

from edgeclip import disk
from tests.support.manifests import manifest_fields
from tests.support.reports import host_bench as bench
from tests.support.reports import host_parity as parity

SCORES = {"top1": 0.5, "top5": 0.75, "own_list_top1": 0.625, "own_list_top5": 0.875}


def make_run(folder, reports=True, sets=("base", "novel")):
    scored = [
        {
            "name": n,
            "note": "a <note> & more",
            "images": 40,
            "labels": 8,
            "classes": 4,
            "chance_top1": 0.125,
            "own_list_chance_top1": 0.25,
            "teacher": SCORES,
            "student": SCORES,
            "student_without_edu_attention": SCORES,
        }
        for n in sets
    ]
    model = {"name": "net", "parameters": 1_000_000, "macs": 50_000_000, "input": 64}
    results = {
        "sets": scored, "data": "toy", "data_license": "CC0", "models": {"teacher": model, "student": model}, "edu_attention": None, "skipped": [], "processes": 1, "format": 2,
        "log": [{"epoch": 0, "loss": 1.0, "kl": 1.0}, {"epoch": 1, "loss": 0.5, "kl": 0.5}], "device": "cpu", "seconds": {}, "peak_memory_mib": 1, "run": "r",
    }  # fmt: skip
    disk.write_json(folder / "results.json", results)
    disk.write_text(folder / "recipe.yaml", "# a recipe <script>alert(1)</script>\nseed: 0\n")
    with disk.new_folder(folder / "bundles" / "t") as b:
        disk.write_text(b / "image_encoder.onnx", "x")
        disk.write_manifest(b, "bundle", manifest_fields())
    digest = disk.sha256(folder / "bundles" / "t" / disk.MANIFEST)
    if reports:
        disk.write_record(folder / "reports" / "t.host-cpu.parity.json", parity(bundle=digest))
        disk.write_record(folder / "reports" / "t.host-cpu.bench.json", bench(bundle=digest))
    disk.write_json(folder / disk.MANIFEST, {"kind": "run", "student": "this student"})
    return folder
