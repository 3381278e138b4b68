"""A board may be anybody: each of its lies, told through a real sshd, is one line within its time
and bytes, or a verdict that fails.
"""

import resource
import time

import pytest

from edgeclip import disk
from edgeclip.boards.board import Board, Load
from edgeclip.device.bundle import Bundle
from edgeclip.device.evaluation import load_evaluation
from edgeclip.device.profile import Minimum
from edgeclip.device.profile import load as load_device
from edgeclip.device.validate import judge
from edgeclip.errors import EdgeclipError
from tests.support import liar
from tests.support.command import mistake, run
from tests.support.sshd import write_ssh_config

MOST = 64 << 20
"""bytes of this process's memory that a lie may take"""


def profile(folder, waits="", host="board"):
    """A profile of the lying board; waits: how long it is waited for."""
    path = folder / "toy.yaml"
    path.write_text(
        f"reach: {{ssh: {host}, folder: {folder}/on-board{waits}}}\n"
        "runtimes: [onnxruntime]\npackages: [onnxruntime]\noffline_batch: 4\n"
        "bench: {min_duration_s: 0.05, min_query_count: 20}\n"
    )
    return path


LOOK = {
    "it says nothing and ends": ("pass", "broke off during 'look'"),
    "it ends in the middle of its answer": (
        "OUT.write(MARK + b'{\"fol')",
        "broke off during 'look'",
    ),
    "it ends with a code": ("sys.exit(3)", "broke off during 'look'"),
    "it is killed": ("os.kill(os.getpid(), 9)", "broke off during 'look'"),
    "it is silent": ("time.sleep(600)", "said nothing for 3 s during 'look'"),
    "it is silent after a word": (
        "ERR.write(b'wait\\n'); ERR.flush(); time.sleep(600)",
        "said nothing for 3 s during 'look'",
    ),
    "it talks on and on": (
        "while True: ERR.write(b'still at work\\n'); ERR.flush(); time.sleep(0.2)",
        "did not end within 8 s during 'look'",
    ),
    "its output has no end": ("forever(OUT, b'x' * 65536)", "wrote a line of more than"),
    "its lines have no end": ("forever(OUT, b'x\\n' * 32768)", "lines, and no answer"),
    "its messages have no end": ("forever(ERR, b'no, really\\n' * 100)", "lines of messages"),
    "its message has no end": ("forever(ERR, b'x' * 65536)", "wrote a line of more than"),
    "its answer has no end": (
        "OUT.write(MARK); forever(OUT, b'[' * 65536)",
        "wrote a line of more than",
    ),
    "it promises more than anybody asked": ("tell(honest()[0], bytes=2**62)", "is the most"),
    "it promises less than nothing": ("tell(honest()[0], bytes=-1)", "is the most"),
    "it promises a word": ("tell(honest()[0], bytes='many')", "is the most"),
    "it answers a number that is none": (
        "tell(dict(honest()[0], more=float('nan')))",
        "is no number of JSON",
    ),
    "it answers an infinity": ("say(b'{\"a\": 1e999}')", "is no finite number"),
    "it answers no JSON": ("say(b'{]')", "not valid JSON"),
    "it answers a list": ("say(b'[1]')", "is the most"),
    "it answers without depth": ("say(b'[' * 100000)", "levels deep"),
    "it answers in no encoding": ("say(b'\\xff\\xfe{')", "its answer"),
    "it answers another question": ("tell({'time': 1.0})", "answered what was not asked"),
    "it answers an earlier question": ("tell(honest()[0], id='0' * 16)", "another question"),
    "it answers without a fact": ("tell(dict(honest()[0], facts=None))", "not asked"),
    "its fact is a list": (
        "a = honest()[0]; a['facts']['cpu'] = [1]; tell(a)",
        "answered what was not asked",
    ),
    "its Python is a bomb": (
        "a = honest()[0]; a['facts']['python'] = '9' * 9 + '.x'; tell(a)",
        "its python is '",
    ),
    "its C library is from the future": (
        "a = honest()[0]; a['facts']['glibc'] = '2.999999999'; tell(a)",
        "its glibc is '",
    ),
    "its processor is an option": (
        "a = honest()[0]; a['facts']['arch'] = '--index-url=http://x'; tell(a)",
        "its arch is '",
    ),
    "its name is a book": (
        "a = honest()[0]; a['facts']['cpu'] = 'x' * 100_000; tell(a)",
        "its cpu has 100,000 characters",
    ),
    "its reason is a screen": (
        "tell({'error': '\\x1b[2J\\x1b]0;root\\x07all\\nis \\u202ewell' + 'x' * 9999})",
        "board: all is well",
    ),
    "its reason is a list": ("tell({'error': ['a', 'b']})", "['a', 'b']"),
}
"""what a lying board does when it is asked what it is, and what is said of it"""


@pytest.mark.parametrize("name", LOOK)
def test_a_lie_about_itself_is_one_line(name, sshd, home, tmp_path):
    code, says = LOOK[name]
    write_ssh_config(home, sshd(liar.make(tmp_path / "liar")))
    liar.about(tmp_path / "liar", "look", code)
    toy = profile(tmp_path, ", answer_s: 3, longest_s: 8")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = mistake("doctor", "--device", toy, says=says.replace("board:", "toy:"), only_line=False)
    assert error.isprintable()
    assert len(error) < 5_000
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MOST


def test_what_a_board_prints_has_no_escapes(sshd, home, tmp_path):
    write_ssh_config(home, sshd(liar.make(tmp_path / "liar")))
    words = (
        "ERR.write(b'\\x1b[31mred\\x1b]8;;http://x\\x07link\\x1b[0m\\x9b2J\\n'); tell(honest()[0])"
    )
    liar.about(tmp_path / "liar", "look", words)
    result = run("doctor", "--device", profile(tmp_path))
    assert "toy: redlink" in result.stderr
    assert "\x1b" not in result.output
    names = "a = honest()[0]; a['facts']['cpu'] = '\\x1b[31mred\\nchip'; tell(a)"
    liar.about(tmp_path / "liar", "look", names)
    result = run("doctor", "--device", profile(tmp_path))
    assert "red chip" in result.stdout
    assert "\x1b" not in result.output


def test_a_slow_board_that_says_so_is_waited_for(sshd, home, tmp_path):
    write_ssh_config(home, sshd(liar.make(tmp_path / "liar")))
    slow = "for i in range(8): ERR.write(b'a part is done\\n'); ERR.flush(); time.sleep(0.7)\n"
    liar.about(tmp_path / "liar", "look", f"{slow}tell(honest()[0])")
    result = run("doctor", "--device", profile(tmp_path, ", answer_s: 4"), "--json")
    assert result.exit_code == 0, result.output
    silent = "time.sleep(5); tell(honest()[0])"
    liar.about(tmp_path / "liar", "look", silent)
    mistake("doctor", "--device", profile(tmp_path, ", answer_s: 4"), says="said nothing for 4 s")
    result = run("doctor", "--device", profile(tmp_path, ", answer_s: 60"), "--json")
    assert result.exit_code == 0, result.output


COPY = {
    "it lacks what nobody has": ("missing", "tell({'have': {'f' * 64: 0}, 'free_bytes': 1 << 40})"),
    "it has more than all": (
        "missing",
        "tell({'have': {d: n + 1 for d, n in request['files'].items()}, 'free_bytes': 1 << 40})",
    ),
    "it has less than nothing": ("missing", "tell({'have': {}, 'free_bytes': -1})"),
    "it has a list": ("missing", "tell({'have': [], 'free_bytes': 1})"),
    "it takes nothing": ("put", "time.sleep(600)"),
    "it built a list": ("build", "tell({'path': ['a']})"),
    "it is not sure": ("exists", "tell({'exists': 'perhaps'})"),
}
"""lies while files travel"""


@pytest.mark.parametrize("name", COPY)
def test_a_lie_about_what_lies_there_is_one_line(name, sshd, home, tmp_path):
    op, code = COPY[name]
    write_ssh_config(home, sshd(liar.make(tmp_path / "liar")))
    liar.about(tmp_path / "liar", op, code)
    (tmp_path / "big").write_bytes(b"x" * 20_000_000)
    device = load_device(str(profile(tmp_path, ", work_s: 5")))
    with Board(*device) as board, pytest.raises(EdgeclipError, match=r"^toy: ") as refused:
        board.send({disk.sha256(tmp_path / "big"): tmp_path / "big"}, "big")
        board._install()
    assert str(refused.value).isprintable()


OBSERVE = {
    "it answers nothing": ("tell({})", "is no .npz file"),
    "its archive is none": ("tell(dict(honest()[0]), b'PK')", "is no .npz file"),
    "its archive is a bomb": (
        "arrays(lambda a, np: {'golden_features': np.zeros((20_000, 10_000), np.float32)})",
        "golden_features: is float32 [20000, 10000]",
    ),
    "it keeps its answer": ("arrays(lambda a, np: a.pop('golden_features') is None)", "without"),
    "it keeps a set": ("arrays(lambda a, np: a.pop('features_all') is None)", "features_all"),
    "it keeps its decisions": ("arrays(lambda a, np: a.pop('answers') is None)", "answers"),
    "it gives what nobody asked for": (
        "arrays(lambda a, np: {**a, 'secret': np.zeros(9)})",
        "'secret' that nobody asked for",
    ),
    "its rows are short": (
        "arrays(lambda a, np: {**a, 'features_all': a['features_all'][:, :3]})",
        "features_all: is float32 [600, 3]",
    ),
    "its rows are few": (
        "arrays(lambda a, np: {**a, 'features_all': a['features_all'][:7]})",
        "features_all: is float32 [7, 16]",
    ),
    "its numbers are long": (
        "arrays(lambda a, np: {**a, 'features_all': a['features_all'].astype('f8')})",
        "features_all: is float64",
    ),
    "its numbers are objects": (
        "arrays(lambda a, np: {**a, 'answers': np.array([None] * 600)})",
        "answers: is object",
    ),
    "its decisions are of other images": (
        "arrays(lambda a, np: {**a, 'answers': a['answers'][:5]})",
        "answers: is int64 [5]",
    ),
    "it saw images that there are not": (
        "arrays(lambda a, np: {**a, 'pixels_of': np.array([10**6])})",
        "images that nobody asked for",
    ),
    "it saw an image twice": (
        "arrays(lambda a, np: {**a, 'pixels_of': np.array([1, 1])})",
        "images that nobody asked for",
    ),
    "it answers a bit": ("a, p = honest(); tell(a, p[:99], bytes=len(p))", "broke off"),
    "its graph has no ports": ("a, p = honest(); a['ports'] = []; tell(a, p)", "not asked"),
    "its threads are a word": (
        "a, p = honest(); a['ran']['threads'] = 'many'; tell(a, p)",
        "not asked",
    ),
    "it is silent": ("time.sleep(600)", "said nothing for 15 s during 'run'"),
}
"""lies about what it sees, which are refused"""
JUDGED = {
    "not a number": (
        "arrays(lambda a, np: {k: a[k] * np.float32('nan') if 'features' in k else a[k] for k in a})",
        "values: not finite on the golden images",
    ),
    "an infinity": (
        "arrays(lambda a, np: {k: a[k] + np.float32('inf') if 'features' in k else a[k] for k in a})",
        "values: not finite on the golden images",
    ),
    "of no unit length": (
        "arrays(lambda a, np: {k: a[k] * np.float32(999.6) if 'features' in k else a[k] for k in a})",
        "are not of unit length",
    ),
    "beyond all squares": (
        "arrays(lambda a, np: {k: a[k] * np.float32(1e38) if 'features' in k else a[k] for k in a})",
        "are not of unit length",
    ),
    "nothing": (
        "arrays(lambda a, np: {k: a[k] * 0 if 'features' in k else a[k] for k in a})",
        "are not of unit length",
    ),
    "decisions of its own": (
        "arrays(lambda a, np: {**a, 'answers': (a['answers'] + 1) % 6})",
        "head: the device's own answers are not those of its features",
    ),
    "decisions beyond all labels": (
        "arrays(lambda a, np: {**a, 'answers': a['answers'] - 10**12})",
        "head: the device's own answers are not those of its features",
    ),
    "another interface": (
        "a, p = honest(); a['ports'][0][0] = 'x'; tell(a, p)",
        "interface: ",
    ),
}
"""values that a broken board may give as well: the report is written, and fails"""


@pytest.fixture
def ready(shipped_bundle, evaluation, sshd, home, tmp_path):
    """A board that has told the truth until now, a bundle there, and where to write its next lie."""
    write_ssh_config(home, sshd(liar.make(tmp_path / "liar")))
    liar.about(tmp_path / "liar", "none", "")
    bundle = Bundle.load(shipped_bundle("onnx-fp32"))
    images = load_evaluation(evaluation)
    with Board(*load_device(str(profile(tmp_path, ", work_s: 15")))) as board:
        board.prepare([bundle], images)
        yield board, bundle, images, tmp_path / "liar"


def test_a_lie_about_what_it_sees_is_refused(ready):
    board, bundle, images, folder = ready
    for name, (code, says) in OBSERVE.items():
        liar.about(folder, "run", code)
        with pytest.raises(EdgeclipError) as refused:
            board.observe(bundle, images)
        assert says in str(refused.value), name
        assert str(refused.value).isprintable(), name


def test_a_wrong_value_fails_the_verdict(ready):
    board, bundle, images, folder = ready
    for name, (code, says) in JUDGED.items():
        liar.about(folder, "run", code)
        report = judge(bundle, images, board.observe(bundle, images), board.facts)
        assert report.verdict == "fails", name
        assert any(says in failure for failure in report.failures), (name, report.failures)
        cosine = report.golden.cosine_min
        assert cosine is None or -1.001 <= cosine <= 1.001, name


BENCH = {
    "of another bundle": ("a['bundle'] = '0' * 64", "of another bundle"),
    "of another target": ("a['target'] = 'x'", "of another target"),
    "of less than no time": ("a['single_stream']['latency_ms_p90'] = -5.0", "latency_ms_p90"),
    "of a word": ("a['single_stream']['queries'] = 'many'", "queries"),
    "without a machine": ("a['machine'] = None", "machine"),
    "of another kind": ("a['kind'] = 'parity'", "kind"),
    "of another format": ("a['format'] = 99", "format 99"),
}
"""lies about what it costs"""


def test_a_lie_about_what_it_costs_is_refused(ready):
    board, bundle, _, folder = ready
    load = Load(Minimum(0.0, 5), ("single_stream",))
    for name, (change, says) in BENCH.items():
        liar.about(folder, "run", f"a, p = honest(); {change}; tell(a, p)")
        with pytest.raises(EdgeclipError) as refused:
            board.bench(bundle, load)
        assert says in str(refused.value), name

    praise = "a, p = honest(); a['verdict'] = 'holds'; a['rules'] = []; tell(a, p)"
    liar.about(folder, "run", praise)
    strict = {"latency_ms_p90": 1e-9}
    budget = type(board.device.budget)(**strict)
    board.device = type(board.device)(
        reach=board.device.reach, runtimes=["onnxruntime"], budget=budget
    )
    assert board.bench(bundle, load).verdict == "fails"  # the host asks the budget itself


def test_bundles_side_by_side_are_those_that_were_sent(ready):
    board, bundle, _, folder = ready
    for change, says in (
        ("a['rows'] = []", "timed 0 bundles of 1"),
        ("a['rows'] = a['rows'] * 2", "timed 2 bundles of 1"),
        ("a['rows'][0]['bundle'] = '0' * 64", "of another bundle"),
    ):
        liar.about(folder, "run", f"a, p = honest(); {change}; tell(a, p)")
        with pytest.raises(EdgeclipError, match=says):
            board.beside([bundle])


def test_a_self_test_is_of_the_bundle_and_its_report_stays_in_its_folder(ready):
    board, bundle, _, folder = ready
    lie = "a, p = honest(); a['target']['name'] = '../../x'; tell(a, p)"
    liar.about(folder, "run", lie)
    with pytest.raises(EdgeclipError, match="name"):
        board.selftest(bundle)
    liar.about(folder, "run", "a, p = honest(); a['bundle'] = '0' * 64; tell(a, p)")
    with pytest.raises(EdgeclipError, match="of another bundle"):
        board.selftest(bundle)


def test_nothing_of_a_liar_goes_on_when_it_was_refused(sshd, home, tmp_path):
    write_ssh_config(home, sshd(liar.make(tmp_path / "liar")))
    note = tmp_path / "alive"
    liar.about(
        tmp_path / "liar",
        "look",
        f"while True: open({str(note)!r}, 'w').write(str(time.time())); forever(OUT, b'x' * 65536)",
    )
    mistake("doctor", "--device", profile(tmp_path), says="wrote a line of more than")
    pid = [p for p in _programs() if str(tmp_path / "liar" / "liar") in p[1]]
    for _ in range(50):
        if not pid:
            break
        time.sleep(0.1)
        pid = [p for p in _programs() if str(tmp_path / "liar" / "liar") in p[1]]
    assert pid == []


def _programs():
    from pathlib import Path

    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield line.parent.name, line.read_bytes().decode(errors="replace")
        except OSError:
            continue
