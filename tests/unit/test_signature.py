"""Signed bundles: what a configured public key refuses, and that the official tool agrees with us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
from keys import write_key

pytest.importorskip("cryptography", reason="cryptography is not installed (the sign extra)")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from typer.testing import CliRunner

import lance_edge
from lance_edge import cli
from lance_edge.bundle import open_bundle
from lance_edge.errors import BundleUntrusted, InvalidOption
from lance_edge.signature import SIGNATURE, sign

Key = tuple[Path, Path]  # the private one, the public one


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return write_key(tmp_path_factory.mktemp("key"))


@pytest.fixture
def signed(tmp_path: Path, key: Key) -> Path:
    """A tiny bundle of the test's own, signed."""
    folder = tiny.write_bundle(tmp_path / "own")
    sign(folder, key[0], "tiny")
    return folder


def refusal(folder: Path, public_key: Path) -> str:
    """What `load` says when it refuses."""
    with pytest.raises(BundleUntrusted) as caught:
        lance_edge.load(folder, "cpu", public_key=public_key)
    assert isinstance(caught.value, lance_edge.BundleError)
    return str(caught.value)


# What a key accepts


@pytest.mark.parametrize("curve", ["SECP256R1", "SECP384R1", "SECP521R1"])
def test_a_signed_bundle_loads(tmp_path: Path, curve: str) -> None:
    private, public = write_key(tmp_path / "key", curve)
    folder = tiny.write_bundle(tmp_path / "own")
    sign(folder, private, "tiny")
    with lance_edge.load(folder, "cpu", public_key=str(public)) as guard:
        assert guard.screen("bomb").decision == "rewrite"


def test_without_a_key_signatures_are_not_looked_at(signed: Path) -> None:
    (signed / SIGNATURE).write_text("nonsense", encoding="utf-8")
    lance_edge.load(signed, "cpu").close()
    (signed / SIGNATURE).unlink()
    lance_edge.load(signed, "cpu").close()


# What it refuses


def test_an_unsigned_bundle_is_refused(tiny_bundle: Path, key: Key) -> None:
    message = refusal(tiny_bundle, key[1])
    assert message.startswith(f"{tiny_bundle} is not signed and a public key is set ({key[1]})")
    assert "`lance-edge pack --sign`" in message


def test_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    _, other = write_key(tmp_path / "other")
    message = refusal(signed, other)
    assert message.startswith(
        f"{signed / SIGNATURE} was not made with the private key of {other}, or was changed since"
    )


@pytest.mark.parametrize(
    "name", ["manifest.json", "screener.onnx", "taxonomy.json", "goldens.json"]
)
def test_a_changed_file_is_refused_at_load(signed: Path, key: Key, name: str) -> None:
    """Also one that loading does not read, as goldens.json."""
    contents = bytearray((signed / name).read_bytes())
    contents[-1] ^= 1
    (signed / name).write_bytes(contents)
    assert refusal(signed, key[1]).startswith(f"{signed / name} is not the file that was signed")


def test_a_manifest_that_vouches_for_the_change_does_not_help(signed: Path, key: Key) -> None:
    tiny.write_bundle(signed, window=12)
    lance_edge.load(signed, "cpu").close()
    assert "manifest.json is not the file that was signed" in refusal(signed, key[1])


@pytest.mark.parametrize("name", ["extra.json", "folder/extra.json", ".gitignore"])
def test_an_added_file_is_refused(signed: Path, key: Key, name: str) -> None:
    (signed / name).parent.mkdir(exist_ok=True)
    (signed / name).write_text("{}", encoding="utf-8")
    assert refusal(signed, key[1]).startswith(
        f"{signed} holds {name}, which {SIGNATURE} does not name; remove what was added"
    )


def test_a_removed_file_is_refused(signed: Path, key: Key) -> None:
    (signed / "goldens.json").unlink()
    assert refusal(signed, key[1]).startswith(
        f"{signed / 'goldens.json'} was signed and is missing"
    )


def test_a_link_is_refused(signed: Path, key: Key, tmp_path: Path) -> None:
    (signed / "goldens.json").replace(tmp_path / "elsewhere.json")
    (signed / "goldens.json").symlink_to(tmp_path / "elsewhere.json")
    assert "goldens.json is a symbolic link" in refusal(signed, key[1])


def test_what_was_verified_is_what_is_used(signed: Path, key: Key) -> None:
    """A file that changes after the check is caught by the manifest's hash, which was signed."""
    bundle = open_bundle(signed, key[1])
    (signed / "screener.onnx").write_bytes(b"other")
    with pytest.raises(lance_edge.BundleCorrupt, match=r"screener\.onnx has 5 bytes"):
        bundle.read("screener.onnx")


# Signatures that are none


def rewrite_signature(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((folder / SIGNATURE).read_bytes())
    change(values["dsseEnvelope"])
    (folder / SIGNATURE).write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(
    "contents",
    [b"", b"nonsense", b"[]", b"{}", b'{"dsseEnvelope": {"payload": 3}}', b"\xff\xfe", b"[" * 9999],
)
def test_a_file_that_is_no_signature_is_refused(signed: Path, key: Key, contents: bytes) -> None:
    (signed / SIGNATURE).write_bytes(contents)
    assert refusal(signed, key[1]).startswith(f"{signed / SIGNATURE} is no model signature (")


def test_a_statement_that_was_edited_is_refused(signed: Path, key: Key) -> None:
    """The list of files agrees with the folder, but nobody signed that list."""
    (signed / "extra.json").write_text("{}", encoding="utf-8")
    own, _ = write_key(signed.parent / "forger")
    honest = json.loads((signed / SIGNATURE).read_bytes())["dsseEnvelope"]["signatures"]
    sign(signed, own, "tiny")
    rewrite_signature(signed, lambda envelope: envelope.update(signatures=honest))
    assert "was not made with the private key of" in refusal(signed, key[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"predicateType": "https://example.org/other"}, "is a https://example.org/other by files"),
        ({"_type": "other"}, "by files and sha256; this version reads"),
        ({"predicate": {"serialization": {"method": "files"}}}, "does not list files (KeyError"),
        (
            {"predicate": {"serialization": {"method": "shards"}, "resources": []}},
            "by shards",
        ),
    ],
)
def test_what_else_a_key_may_have_signed_is_refused(
    signed: Path, key: Key, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    from lance_edge import signature

    real = signature._statement
    monkeypatch.setattr(signature, "_statement", lambda *given: {**real(*given), **change})
    sign(signed, key[0], "tiny")
    assert said in refusal(signed, key[1])


def test_a_payload_of_another_type_is_refused(signed: Path, key: Key) -> None:
    rewrite_signature(signed, lambda envelope: envelope.update(payloadType="text/plain"))
    assert "signs a 'text/plain', not a 'application/vnd.in-toto+json'" in refusal(signed, key[1])


# Keys that cannot be used


def test_keys_that_cannot_be_used_are_named(signed: Path, tmp_path: Path) -> None:
    missing, text, other = tmp_path / "no.pem", tmp_path / "text.pem", tmp_path / "rsa.pem"
    text.write_text("a key", encoding="utf-8")
    odd = rsa.generate_private_key(65537, 2048)
    other.write_bytes(
        odd.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    for path, said in (
        (missing, "cannot be read: No such file"),
        (text, "is not a public key in PEM"),
        (other, "is not a key on one of the curves secp256r1"),
    ):
        with pytest.raises(InvalidOption, match=said) as caught:
            lance_edge.load(signed, "cpu", public_key=path)
        assert str(path) in str(caught.value)
    for path, said in ((missing, "cannot be read"), (text, "is not a private key in PEM")):
        with pytest.raises(InvalidOption, match=said):
            sign(signed, path, "tiny")


def test_an_encrypted_private_key_names_the_way_out(signed: Path, tmp_path: Path) -> None:
    private, _ = write_key(tmp_path / "locked", password=b"secret")
    with pytest.raises(InvalidOption, match=r"is encrypted; .*model_signing sign key --password"):
        sign(signed, private, "tiny")


def test_without_cryptography_nothing_is_loaded_unchecked(
    signed: Path, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    assert r"install `lance-edge[sign]`" in refusal(signed, key[1])


# The environment and the command line


def invoke(*arguments: str | Path, **environment: str) -> Any:
    return CliRunner().invoke(cli.app, list(map(str, arguments)), env=environment)


def test_the_environment_may_name_the_key(
    signed: Path, tiny_bundle: Path, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANCE_EDGE_PUBLIC_KEY", str(key[1]))
    lance_edge.load(signed, "cpu").close()
    with pytest.raises(BundleUntrusted, match="is not signed"):
        lance_edge.load(tiny_bundle, "cpu")
    monkeypatch.setenv("LANCE_EDGE_PUBLIC_KEY", "")
    lance_edge.load(tiny_bundle, "cpu").close()


@pytest.mark.parametrize(
    "command", [("screen", "hello"), ("refine", "hello"), ("verify",), ("info",), ("pull",)]
)
def test_every_command_that_reads_a_bundle_checks_it(
    tiny_bundle: Path, key: Key, command: tuple[str, ...]
) -> None:
    for given in (
        invoke(*command, "--bundle", tiny_bundle, "--public-key", key[1]),
        invoke(*command, "--bundle", tiny_bundle, LANCE_EDGE_PUBLIC_KEY=str(key[1])),
    ):
        assert (given.exit_code, given.stdout) == (3, "")
        assert f"lance-edge: {tiny_bundle} is not signed" in given.stderr


@pytest.mark.parametrize("tool", ["plan", "export refiner", "pack"])
def test_every_tool_that_reads_a_bundle_checks_it(
    tiny_bundle: Path, key: Key, tmp_path: Path, tool: str
) -> None:
    if tool == "export refiner":
        pytest.importorskip("torch", reason="needs torch (the export extra)")
    out = tmp_path / "out"
    command: dict[str, tuple[str | Path, ...]] = {
        "plan": ("plan", tiny_bundle, "--runtime", "rtx", "--out", out),
        "export refiner": (
            *("export", "refiner", "--checkpoint", tmp_path),
            *("--bundle", tiny_bundle, "--out", out),
        ),
        "pack": ("pack", tiny_bundle, "--out", out),
    }
    done = invoke(*command[tool], LANCE_EDGE_PUBLIC_KEY=str(key[1]))
    assert done.exit_code == 3, done.output
    assert f"lance-edge: {tiny_bundle} is not signed" in done.stderr
    assert not out.exists()


def test_the_doctor_says_that_a_bundle_is_not_signed(tiny_bundle: Path, key: Key) -> None:
    done = invoke("doctor", "--bundle", tiny_bundle, "--public-key", key[1])
    assert done.exit_code == 3
    assert f"{tiny_bundle} is not signed" in done.stdout


def test_verify_says_who_signed(signed: Path, key: Key) -> None:
    done = invoke("verify", "--bundle", signed, "--public-key", key[1])
    assert done.exit_code == 0
    assert done.stdout.startswith(f"signed   by the owner of {key[1]}\nhashes   5 files agree")


def test_a_missing_key_is_wrong_usage(signed: Path, tmp_path: Path) -> None:
    done = invoke("screen", "hello", "--bundle", signed, "--public-key", tmp_path / "no.pem")
    assert done.exit_code == 2
    assert "no.pem cannot be read: No such file" in done.stderr


# The official tool


def model_signing(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if missing := [name for name in ("model_signing", "OpenSSL") if find_spec(name) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed (the dev extra)")
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, "-m", "model_signing", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=quiet,
    )


def test_the_official_tool_verifies_what_we_sign(signed: Path, key: Key) -> None:
    renamed = signed.rename(signed.with_name("renamed"))
    command = ("verify", "key", renamed, "--signature", renamed / SIGNATURE, "--public_key", key[1])
    done = model_signing(*command)
    assert (done.returncode, done.stdout.strip()) == (0, "Verification succeeded"), done.stderr
    (renamed / "goldens.json").write_text("[]", encoding="utf-8")
    refused = model_signing(*command)
    assert refused.returncode == 1
    assert "Hash mismatch for" in refused.stderr and "goldens.json" in refused.stderr


def test_we_verify_what_the_official_tool_signs(tmp_path: Path, key: Key) -> None:
    folder = tiny.write_bundle(tmp_path / "own")
    done = model_signing(
        "sign", "key", folder, "--signature", folder / SIGNATURE, "--private_key", key[0]
    )
    assert done.returncode == 0, done.stderr
    with lance_edge.load(folder, "cpu", public_key=key[1]) as guard:
        assert guard.screen("hello").decision == "allow"
    (folder / "goldens.json").write_text("[]", encoding="utf-8")
    assert "goldens.json is not the file that was signed" in refusal(folder, key[1])
