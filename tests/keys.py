"""Keys for signatures. Needs the `sign` extra."""

from __future__ import annotations

from pathlib import Path


def write_key(
    folder: Path, curve: str = "SECP256R1", password: bytes | None = None
) -> tuple[Path, Path]:
    """Write a new private key and its public one; returns their paths.

    password  encrypts the private key
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(getattr(ec, curve)())
    pem = serialization.Encoding.PEM
    lock = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    folder.mkdir(parents=True, exist_ok=True)
    private, public = folder / "key.pem", folder / "public.pem"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, lock))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem, form))
    return private, public
