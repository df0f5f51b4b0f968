"""A few calls of the CUDA driver: devices, memory, copies, streams. Knows bytes, not tensors.

The driver's own library is on every machine with an NVIDIA GPU, Jetsons included, so nothing has to
be installed. TensorRT uses the device's primary context; so do we.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

from lance_edge_engines.driver import (
    CAPABILITY_MAJOR,
    CAPABILITY_MINOR,
    LIBRARIES,
    load_library,
)
from lance_edge_engines.session import Array, DeviceUnavailable, SessionError

_INT, _SIZE, _POINTER = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
_ADDRESS = ctypes.c_uint64  # CUdeviceptr

# call -> the types of its arguments; each returns a CUresult
_CALLS: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGetCount": (_POINTER,),
    "cuDeviceGet": (_POINTER, _INT),
    "cuDeviceGetName": (ctypes.c_char_p, _INT, _INT),
    "cuDeviceGetAttribute": (_POINTER, _INT, _INT),
    "cuDevicePrimaryCtxRetain": (_POINTER, _INT),
    "cuCtxSetCurrent": (_POINTER,),
    "cuMemGetInfo_v2": (_POINTER, _POINTER),
    "cuMemAlloc_v2": (_POINTER, _SIZE),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemsetD8Async": (_ADDRESS, ctypes.c_ubyte, _SIZE, _POINTER),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, _POINTER, _SIZE, _POINTER),
    "cuMemcpyDtoHAsync_v2": (_POINTER, _ADDRESS, _SIZE, _POINTER),
    "cuStreamCreate": (_POINTER, ctypes.c_uint),
    "cuStreamSynchronize": (_POINTER,),
    "cuStreamDestroy_v2": (_POINTER,),
    "cuGetErrorString": (_INT, _POINTER),
}


class NoSuchGpu(DeviceUnavailable):
    """The driver lists GPUs, and none of this number."""


@dataclass(frozen=True)
class Gpu:
    """A device: its name and compute capability, as in sm_87."""

    name: str
    sm: str


class Memory(Protocol):
    """A device's memory and one stream of work on it. Made by `Device`; tests bring their own."""

    gpu: Gpu
    stream: int

    def use(self) -> None:
        """Make the device the calling thread's; comes before any other call on a thread."""
        ...

    def free_bytes(self) -> int: ...

    def allocate(self, size: int) -> int:
        """The address of so many bytes, all zero."""
        ...

    def free(self, address: int) -> None: ...

    def write(self, address: int, array: Array) -> None:
        """Copy a contiguous array there; it must stay as it is until `wait`."""
        ...

    def read(self, array: Array, address: int) -> None:
        """Copy into a contiguous array, which is whole after `wait`."""
        ...

    def wait(self) -> None: ...

    def close(self) -> None: ...


class Device:
    """A GPU by its number. Raises DeviceUnavailable without a driver or a GPU, NoSuchGpu among others."""

    def __init__(self, number: int = 0) -> None:
        self._library = _load()
        self._call("cuInit", 0)
        count = _INT()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if not 0 <= number < count.value:
            kind = NoSuchGpu if count.value else DeviceUnavailable
            raise kind(f"there is no GPU {number}: the driver lists {count.value}, counted from 0")
        device = _INT()
        self._call("cuDeviceGet", ctypes.byref(device), number)
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, len(name), device)
        version = [self._attribute(which, device) for which in (CAPABILITY_MAJOR, CAPABILITY_MINOR)]
        self.gpu = Gpu(name.value.decode(), f"sm_{version[0]}{version[1]}")
        self._context = _POINTER()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.use()
        stream = _POINTER()
        self._call("cuStreamCreate", ctypes.byref(stream), 1)  # does not wait for stream 0
        self.stream = stream.value or 0

    def use(self) -> None:
        self._call("cuCtxSetCurrent", self._context)

    def free_bytes(self) -> int:
        free, total = _SIZE(), _SIZE()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, size: int) -> int:
        address = _ADDRESS()
        self._call("cuMemAlloc_v2", ctypes.byref(address), max(size, 1))
        self._call("cuMemsetD8Async", address, 0, max(size, 1), self.stream)
        return address.value

    def free(self, address: int) -> None:
        self.use()  # a finaliser may run on any thread
        self._call("cuMemFree_v2", address)

    def write(self, address: int, array: Array) -> None:
        assert array.flags.c_contiguous
        if array.nbytes:
            self._call(
                "cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self.stream
            )

    def read(self, array: Array, address: int) -> None:
        assert array.flags.c_contiguous
        if array.nbytes:
            self._call(
                "cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self.stream
            )

    def wait(self) -> None:
        self._call("cuStreamSynchronize", self.stream)

    def close(self) -> None:
        self.use()
        self._call("cuStreamDestroy_v2", self.stream)

    def _attribute(self, which: int, device: ctypes.c_int) -> int:
        value = _INT()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name)
        function.argtypes, function.restype = _CALLS[name], _INT
        code = function(*arguments)
        if code == 0:
            return
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown"
        kind = DeviceUnavailable if name in ("cuInit", "cuDeviceGetCount") else SessionError
        raise kind(f"the CUDA driver's {name} failed: {reason} ({code})")


def _load() -> Any:
    library = load_library()
    if library is None:
        raise DeviceUnavailable(
            f"this machine has no NVIDIA driver ({LIBRARIES[0]} cannot be loaded); install the driver, "
            "or run on a machine with an NVIDIA GPU"
        )
    return library
