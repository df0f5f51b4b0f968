"""The tensors of a checkpoint folder, read one by one. Knows safetensors, not networks.

Nothing is unpickled, no file outside the folder is read, and files are mapped, not loaded.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lance_edge.cache import return_pages
from lance_edge.errors import ExportError
from lance_edge.gguf import Float32Array

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_AGAIN = "copy the checkpoint again, or save it anew"
STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # bfloat16: the upper half of a float32


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies in a file."""

    shape: tuple[int, ...]
    kind: str
    contents: memoryview
    mapped: mmap.mmap  # the whole file


class TensorFolder:
    """A folder's tensors by name, as its index or its only file has them."""

    def __init__(self, folder: Path) -> None:
        """Raises ExportError if the folder has no safetensors, or they are not whole."""
        self.folder = folder
        self.files = weight_files(folder)
        self._tensors: dict[str, Tensor] = {}
        for name, wanted in self.files.items():
            found = read_header(inside(folder, name))
            if wanted is not None and wanted != set(found):
                odd = listed(sorted(wanted ^ set(found)))
                raise ExportError(f"{folder / name} and {INDEX} differ in {odd}; {_AGAIN}")
            self._tensors |= found

    @property
    def names(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor names and shapes."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> Float32Array:
        """One tensor as float32. Raises ExportError if it holds a value that is not finite."""
        stored = self._tensors[name]
        return_pages(stored.mapped)  # of the tensors before
        values = np.frombuffer(stored.contents, STORED[stored.kind]).reshape(stored.shape)
        if stored.kind == "BF16":
            bits = values.astype(np.uint32)
            bits <<= 16
            found: Float32Array = bits.view(np.float32)
        else:
            found = values.astype(np.float32, copy=False)
        if not np.isfinite(found).all():
            raise ExportError(
                f"{name} in {self.folder} holds a value that is not finite; such a network "
                "computes nothing, train or convert it again"
            )
        return found


def inside(folder: Path, name: str) -> Path:
    """A file of the folder. Raises ExportError if it is not there, or its name or a link leads out.

    In the Hugging Face cache a checkpoint's files are links into the `blobs` folder next to its
    `snapshots`; those may be followed.
    """
    if Path(name).name != name or name == "..":
        raise ExportError(f"{folder} names {name!r}, which is not a plain file name; {_AGAIN}")
    path = folder / name
    if not path.is_file():
        raise ExportError(f"{path} is missing; {_AGAIN}")
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if path.resolve().parent not in allowed:
        raise ExportError(
            f"{path} is a link that leaves its folder; copy the checkpoint with the files "
            "themselves (cp -L)"
        )
    return path


def refuse_other_weights(config: Mapping[str, Any], folder: Path) -> None:
    """Raise ExportError if a folder names other weights than its own: transformers would read those."""
    if (folder / ADAPTER).exists():
        raise ExportError(
            f"{folder} has an {ADAPTER}, which changes a base that lies elsewhere; merge the adapter into "
            "its base (`merge_and_unload`) and save that"
        )
    if (named := config.get("transformers_weights")) is not None:
        raise ExportError(
            f"{folder / 'config.json'} has its weights in {named!r}; name the file {WHOLE} and remove "
            "the key transformers_weights"
        )


def check_vocabulary(path: Path, largest: int, vocabulary: int) -> None:
    """Raise ExportError if a tokenizer's largest id is beyond the network's vocabulary."""
    if largest >= vocabulary:
        raise ExportError(
            f"{path} has tokens up to {largest}, and config.json a vocabulary of {vocabulary}; they do "
            "not belong together"
        )


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def weight_files(folder: Path) -> dict[str, set[str] | None]:
    """Each weights file, and the tensors that the index says it has; None if there is no index.

    Raises ExportError for what is missing, what is pickled, and what leads out of the folder.
    """
    if (folder / WHOLE).exists():  # before an index, as transformers does
        return {WHOLE: None}
    if (folder / INDEX).exists():
        places = _weight_map(folder)
        return {
            name: {tensor for tensor, place in places.items() if place == name}
            for name in dict.fromkeys(places.values())
        }
    if pickled := sorted(path.name for path in folder.glob("*.bin")):
        raise ExportError(
            f"{folder} has its weights in {listed(pickled)}: pickled files can run any code and are "
            f"not read; save the checkpoint as safetensors (save_pretrained does)"
        )
    raise ExportError(f"{folder} has neither {WHOLE} nor {INDEX}; {_AGAIN}")


def _weight_map(folder: Path) -> dict[str, str]:
    path = inside(folder, INDEX)
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ExportError(f"{path} has no weight_map from tensors to files; {_AGAIN}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file. Raises ExportError."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} is not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path} holds a {type(value).__name__}, not an object; {_AGAIN}")
    return value


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: a length, a JSON header, data. Raises ExportError."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        contents = memoryview(mapped)
        (length,) = struct.unpack_from("<Q", contents, 0)
        header = json.loads(bytes(contents[8 : 8 + length]))
        header.pop("__metadata__", None)
        data = contents[8 + length :]
        return {name: _tensor(name, entry, data, mapped) for name, entry in header.items()}
    except (
        AttributeError,
        LookupError,
        OSError,
        RecursionError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise ExportError(
            f"{path} ends early or is no safetensors file ({error}); {_AGAIN}"
        ) from error


def _tensor(name: str, entry: dict[str, Any], data: memoryview, mapped: mmap.mmap) -> Tensor:
    start, end = entry["data_offsets"]
    shape, kind = tuple(entry["shape"]), entry["dtype"]
    if kind not in STORED:
        raise ValueError(f"{name} is {kind}, not one of {', '.join(STORED)}")
    if not 0 <= start <= end <= len(data) or min(shape, default=0) < 0:
        raise ValueError(f"{name} lies outside the file")
    if math.prod(shape) * np.dtype(STORED[kind]).itemsize != end - start:
        raise ValueError(f"{name} does not have the bytes of its shape {list(shape)}")
    return Tensor(shape, kind, data[start:end], mapped)
