"""What NVIDIA's driver says of itself and its GPUs, asked of its library with ctypes alone."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from dataclasses import dataclass
from typing import Any

LIBRARIES = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")

# Numbers of CUdevice_attribute in cuda.h.
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76

SYSTEM_DRIVER_MISMATCH = 803  # of CUresult: library and kernel module are of different releases
NO_DEVICE = 100


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it; `capability` is its compute capability, as in "8.7"."""

    name: str
    capability: str
    memory_bytes: int

    @property
    def sm(self) -> str:
        """The capability as compilers write it: sm_87."""
        return f"sm_{self.capability.replace('.', '')}"


@dataclass(frozen=True)
class Driver:
    """An installed driver.

    cuda   the newest CUDA version that it runs, as in "13.0"
    gpus   what it drives
    fault  why it drives nothing; None if it started
    """

    cuda: str | None
    gpus: tuple[Gpu, ...]
    fault: str | None = None


def load_library() -> Any:
    """The driver's library; None if it is not installed."""
    for name in LIBRARIES:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def read_driver(library: Any) -> Driver:
    """Ask a loaded driver library. Makes no CUDA context, so it takes no GPU memory."""
    version = ctypes.c_int()
    known = library.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value > 0
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}" if known else None
    status = library.cuInit(0)
    if status in (0, NO_DEVICE):
        gpus = _gpus(library) if status == 0 else ()
        return Driver(cuda, gpus)
    reason = (
        "the library and the loaded kernel module are of different releases"
        if status == SYSTEM_DRIVER_MISMATCH
        else f"cuInit returned {status}"
    )
    return Driver(cuda, (), reason)


def _gpus(library: Any) -> tuple[Gpu, ...]:
    count = ctypes.c_int()
    library.cuDeviceGetCount(ctypes.byref(count))
    return tuple(_gpu(library, index) for index in range(count.value))


def _gpu(library: Any, index: int) -> Gpu:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    numbers = [
        _attribute(library, number, device) for number in (CAPABILITY_MAJOR, CAPABILITY_MINOR)
    ]
    return Gpu(name.value.decode(errors="replace"), "{}.{}".format(*numbers), memory.value)


def _attribute(library: Any, number: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    library.cuDeviceGetAttribute(ctypes.byref(value), number, device)
    return value.value
