"""The tests of edgeclip. What must be set before anything imports numpy, torch or a hub's client is set here."""

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(
        _name, "1"
    )  # the workers share the cores; a process of one thread is also the same every time
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a hub
