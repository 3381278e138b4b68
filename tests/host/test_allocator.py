"""What a step has freed is the next step's, however large the step: no page is fetched twice."""

import json
import subprocess
import sys

import pytest

STEPS = """
import ctypes, json, sys
from edgeclip.host.allocator import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc.mallinfo2.restype = Mallinfo2

def held():
    info = libc.mallinfo2()
    return info.arena + info.hblkhd

def step():
    blocks = [libc.malloc(320 << 20) for _ in range(8)]  # 2.5 GiB of addresses; nothing is written there
    assert all(blocks)
    within = held()
    for b in blocks:
        libc.free(b)
    return within

if sys.argv[1] == "keep":
    keep_freed_memory()
print(json.dumps([step(), held(), step(), held()]))
"""
STEP = 8 * (320 << 20)


def held(how):
    """Bytes that the C library holds within and after each of two steps."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_stays_with_the_process():
    within, after, again, at_last = held("keep")
    assert within >= STEP
    assert after == within  # nothing went back to the kernel, so nothing is fetched again
    assert again == after
    assert at_last == after


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_without_it_freed_memory_goes_back():
    within, after, again, at_last = held("give back")
    assert min(within, again) >= STEP
    assert max(after, at_last) < STEP / 8
