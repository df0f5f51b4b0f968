"""Who vouches for a bundle: signatures over all files of its folder. Needs the `sign` extra.

The format is that of OpenSSF model signing 1.0 with an elliptic-curve key: a Sigstore bundle around
a DSSE envelope around an in-toto statement, which names every file with its SHA-256. So the
`model_signing` command reads what `sign` writes, and `check` reads what that command writes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lance_edge.cache import sha256_of
from lance_edge.errors import BundleUntrusted, InvalidOption

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        ECDSA,
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )

SIGNATURE = "bundle.sig"

SIGSTORE_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
IN_TOTO = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
CURVES = ("secp256r1", "secp384r1", "secp521r1")  # those that the format allows


def check(folder: Path, public_key: Path, hashes: Mapping[str, str]) -> None:
    """Raise unless the owner of a key signed exactly the files that are in a folder.

    hashes  SHA-256 of files whose bytes are in use already: they are not read again

    Raises BundleUntrusted, or InvalidOption for a public key that cannot be used.
    """
    key = _public_key(public_key)
    path = folder / SIGNATURE
    if not path.is_file():
        raise BundleUntrusted(
            f"{folder} is not signed and a public key is set ({public_key}); sign the bundle with "
            "`lance-edge pack --sign`, or load it without a key"
        )
    signed = _files(path, _payload(path, key, public_key))
    found = set(_names(folder))
    if added := sorted(found - set(signed)):
        raise BundleUntrusted(
            f"{folder} holds {', '.join(added)}, which {SIGNATURE} does not name; remove what was "
            "added, or sign the bundle again"
        )
    for name, digest in signed.items():
        if name not in found:
            raise BundleUntrusted(f"{folder / name} was signed and is missing; {_AGAIN}")
        if (hashes.get(name) or sha256_of(folder / name)) != digest:
            raise BundleUntrusted(f"{folder / name} is not the file that was signed; {_AGAIN}")


def sign(folder: Path, private_key: Path, name: str) -> Path:
    """Sign all files of a folder under a name; returns the signature's path. Raises InvalidOption."""
    key = _private_key(private_key)
    path = folder / SIGNATURE
    files = {name: sha256_of(folder / name) for name in sorted(_names(folder))}
    payload = json.dumps(_statement(name, files)).encode()
    signature = key.sign(_signed_bytes(payload), _algorithm(key.public_key()))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": IN_TOTO,
        "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
    }
    values = {
        "mediaType": SIGSTORE_BUNDLE,
        "verificationMaterial": {
            "publicKey": {"hint": _fingerprint(key.public_key())},
            "tlogEntries": [],
        },
        "dsseEnvelope": envelope,
    }
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


_AGAIN = "copy the bundle again, or have it signed again"


def _payload(path: Path, key: EllipticCurvePublicKey, public_key: Path) -> bytes:
    """The statement that was signed. Raises BundleUntrusted if it was not, or by another key."""
    from cryptography.exceptions import InvalidSignature

    try:
        envelope = json.loads(path.read_bytes())["dsseEnvelope"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        kind = envelope["payloadType"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise BundleUntrusted(f"{path} is no model signature ({error!r}); {_AGAIN}") from error
    try:
        key.verify(signature, _signed_bytes(payload), _algorithm(key))
    except InvalidSignature as error:
        raise BundleUntrusted(
            f"{path} was not made with the private key of {public_key}, or was changed since; "
            "get the bundle and the key from its publisher again"
        ) from error
    if kind != IN_TOTO:
        raise BundleUntrusted(f"{path} signs a {kind!r}, not a {IN_TOTO!r}; {_AGAIN}")
    return payload


def _files(path: Path, payload: bytes) -> dict[str, str]:
    """What a statement says: file -> SHA-256."""
    try:
        statement = json.loads(payload)
        predicate = statement["predicate"]
        kinds = (statement["_type"], statement["predicateType"])
        method = predicate["serialization"]["method"]
        algorithms = {item["algorithm"] for item in predicate["resources"]}
        files = {str(item["name"]): str(item["digest"]) for item in predicate["resources"]}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise BundleUntrusted(f"{path} does not list files ({error!r}); {_AGAIN}") from error
    if kinds != (STATEMENT, PREDICATE) or method != "files" or algorithms != {"sha256"}:
        raise BundleUntrusted(
            f"{path} is a {kinds[1]} by {method} and {', '.join(sorted(map(str, algorithms)))}; "
            f"this version reads {PREDICATE} by files and sha256: sign the bundle again"
        )
    return files


def _names(folder: Path) -> list[str]:
    """All files of a folder but its signature, with slashes. Raises BundleUntrusted for a link."""
    found = []
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise BundleUntrusted(f"{path} is a symbolic link, which a bundle may not hold")
        if not path.is_dir() and path != folder / SIGNATURE:
            found.append(path.relative_to(folder).as_posix())
    return found


def _statement(name: str, files: Mapping[str, str]) -> dict[str, Any]:
    root = hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in files.values()))
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": root.hexdigest()}}],
        "predicateType": PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [SIGNATURE],
            },
            "resources": [
                {"name": name, "algorithm": "sha256", "digest": digest}
                for name, digest in files.items()
            ],
        },
    }


def _signed_bytes(payload: bytes) -> bytes:
    """What DSSE signs: the payload with its type, and the lengths of both."""
    return b"DSSEv1 %d %s %d %s" % (len(IN_TOTO), IN_TOTO.encode(), len(payload), payload)


def _algorithm(key: EllipticCurvePublicKey) -> ECDSA:
    """A curve's hash, as Sigstore pairs them."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    paired = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}
    return ec.ECDSA(paired[key.curve.key_size])


def _fingerprint(key: EllipticCurvePublicKey) -> str:
    from cryptography.hazmat.primitives import serialization

    pem = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(pem).hexdigest()


def _public_key(path: Path) -> EllipticCurvePublicKey:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ModuleNotFoundError as error:  # never go on unchecked
        raise BundleUntrusted(
            f"the bundle's signature cannot be checked with {path}: cryptography is not installed; "
            "install `lance-edge[sign]`"
        ) from error
    pem = _read(path)
    try:
        key = load_pem_public_key(pem)
    except (UnsupportedAlgorithm, ValueError) as error:
        raise InvalidOption(f"{path} is not a public key in PEM: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise InvalidOption(f"{path} is not a key on one of the curves {', '.join(CURVES)}")
    return key


def _private_key(path: Path) -> EllipticCurvePrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    pem = _read(path)
    try:
        key = load_pem_private_key(pem, None)
    except TypeError as error:  # it has a password
        raise InvalidOption(
            f"{path} is encrypted; decrypt it for the time of signing, or sign with "
            "`model_signing sign key --password`"
        ) from error
    except (UnsupportedAlgorithm, ValueError) as error:
        raise InvalidOption(f"{path} is not a private key in PEM: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        raise InvalidOption(f"{path} is not a key on one of the curves {', '.join(CURVES)}")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidOption(f"the key {path} cannot be read: {error.strerror}") from error
