"""The tests of edgeclip. What must be set before anything imports numpy, torch or edgeclip itself
is set here.
"""

import importlib.util
import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # the workers share the cores
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a hub

if importlib.util.find_spec("jaxtyping"):  # a device layer alone comes without it
    from jaxtyping import install_import_hook

    install_import_hook("edgeclip", "beartype.beartype")  # shapes are checked at every call
