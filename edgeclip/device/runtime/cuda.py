"""The six calls of CUDA's runtime library that an engine needs, through ctypes.

JetPack brings the library and no Python for it.

Source: CUDA Runtime API, Memory Management, Stream Management, Device Management.
"""

import ctypes
import ctypes.util
from pathlib import Path

from edgeclip.errors import EdgeclipError

TO_DEVICE = 1
TO_HOST = 2
MAJOR = 75
"""cudaDevAttrComputeCapabilityMajor"""
MINOR = 76
"""cudaDevAttrComputeCapabilityMinor"""


class Cuda:
    """Raises `EdgeclipError` with CUDA's own reason for every call that fails."""

    def __init__(self) -> None:
        places = [
            *sorted(Path("/usr/local/cuda/lib64").glob("libcudart.so.*")),
            ctypes.util.find_library("cudart"),
        ]
        for place in (p for p in places if p):
            try:
                self.library = ctypes.CDLL(str(place))
                break
            except OSError:
                continue
        else:
            raise EdgeclipError(
                "CUDA",
                "its runtime library (libcudart) is not on this machine",
                "it comes with JetPack; on a GPU host install the CUDA toolkit",
            )
        self.library.cudaGetErrorString.restype = ctypes.c_char_p

    def _call(self, name: str, *arguments: object) -> None:
        if code := getattr(self.library, name)(*arguments):
            raise EdgeclipError(
                "CUDA",
                f"{name}: {self.library.cudaGetErrorString(code).decode()}",
                "see dmesg, and whether another process fills the memory",
            )

    def compute_capability(self) -> str:
        """Return the GPU's compute capability, as "8.7"."""
        values = [ctypes.c_int(), ctypes.c_int()]
        for value, attribute in zip(values, (MAJOR, MINOR), strict=True):
            self._call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, 0)
        return f"{values[0].value}.{values[1].value}"

    def stream(self) -> int:
        handle = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(handle))
        return handle.value or 0

    def allocate(self, size: int) -> int:
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value or 0

    def free(self, address: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(address))

    def copy(self, to: int, source: int, size: int, way: int, stream: int) -> None:
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size),
            way,
            ctypes.c_void_p(stream),
        )

    def wait(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))
