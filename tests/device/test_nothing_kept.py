"""A process that opens bundles for months keeps none: no file, no thread, no session, no memory."""

import gc
import os
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip.bundle import Bundle, bake_labels
from tests.support.optional import require

FRAME = Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3))
OPENINGS = 300
TARGETS = ("onnx-fp32", "openvino-fp16")


def status(field: str) -> int:
    (line,) = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field)]
    return int(line.split()[1])


def held() -> tuple[int, int, int]:
    """Open files; threads of this process, and Python's among them."""
    return len(os.listdir("/proc/self/fd")), status("Threads:"), threading.active_count()


@pytest.fixture(params=TARGETS)
def bundle(request, shipped_bundle):
    if "openvino" in request.param:
        require("openvino", "pip install 'edgeclip[openvino]'")
    return shipped_bundle(request.param)


def open_often(folder: Path, count: int) -> None:
    for _ in range(count):
        Bundle.load(folder).classify(FRAME)


@pytest.mark.slow
def test_openings_leave_no_file_no_thread_and_little_memory(bundle):
    """A session of the toy takes hundreds of KiB: 300 that were kept would be tens of MiB."""
    open_often(bundle, OPENINGS // 6)
    gc.collect()
    before, memory = held(), status("RssAnon:")
    open_often(bundle, OPENINGS)
    gc.collect()
    assert held() == before
    assert status("RssAnon:") - memory < 8 * 1024


def test_a_session_goes_with_its_bundle_without_the_garbage_collector(bundle):
    gc.collect()
    gc.disable()
    try:
        opened = Bundle.load(bundle)
        opened.classify(FRAME)
        session = weakref.ref(opened.image_encoder.run)
        del opened
        assert session() is None
    finally:
        gc.enable()


def test_inferences_make_no_garbage(bundle):
    opened = Bundle.load(bundle)
    opened.classify(FRAME)
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            opened.classify(FRAME)
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_changes_of_labels_leave_no_file_and_no_thread(own_bundle):
    folder = own_bundle("onnx-fp32")
    lists = (["cat", "dog"], ["car", "tree"])
    for labels in lists:
        bake_labels(folder, labels, folder)
    before = held()
    for i in range(30):
        bake_labels(folder, lists[i % 2], folder)
    assert held() == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
