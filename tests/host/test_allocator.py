"""What a step has freed is the next step's, however large the step: no page is fetched twice."""

import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import numpy as np
from edgeclip.host.allocator import keep_freed_memory
if sys.argv[1] == "keep": keep_freed_memory()
def step():
    held = [np.ones(40 << 20) for _ in range(8)]  # 2.5 GiB
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(); before = faults(); step(); print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_stays_with_the_process():
    faults = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True
            ).stdout
        )
        for how in ("keep", "give back")
    }
    assert faults["keep"] < 100 < faults["give back"], faults
