"""Is this model the one that was published? A signed list of its files, and a bill of what it is made of and served with.

    sign(folder, key)                 # writes manifest.json and manifest.sig
    verify(folder, public_key)        # LabkitError names the first file that is not as signed

The signature is Ed25519 over the exact bytes of manifest.json. A checksum alone tells a damaged file; only the signature
tells a file that somebody exchanged together with its checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from labkit.types import Artifact, LabkitError, NotInstalled

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
SCHEMA = 1


def new_key(file: Path | str) -> str:
    """Write a new private key (PEM, only its owner can read it) and give the public one: 64 hexadecimal digits."""
    keys, serialization = _cryptography()
    private = keys.Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise LabkitError(f"{file} is there already; give another name, so that no key is lost.") from None
    with os.fdopen(handle, "wb") as sink:
        sink.write(pem)
    return private.public_key().public_bytes_raw().hex()


def sign(folder: Path | str, key: Path | str) -> Path:
    """Write the manifest of every file in `folder`, and its signature with the private key in `key`; gives the manifest."""
    keys, serialization = _cryptography()
    try:
        private = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise LabkitError(f"{key} is no private key in PEM form ({error}); make one with new_key.") from None
    if not isinstance(private, keys.Ed25519PrivateKey):
        raise LabkitError(f"{key} is no Ed25519 key; make one with new_key.")
    folder = Path(folder)
    told = {"schema": SCHEMA, "made": datetime.now(UTC).isoformat(timespec="seconds"), "files": digests(folder)}
    text = (json.dumps(told, indent=1, sort_keys=True) + "\n").encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / SIGNATURE).write_text(private.sign(text).hex() + "\n")
    return folder / MANIFEST


def verify(folder: Path | str, public_key: str) -> dict[str, Any]:
    """The manifest, when its signature and every file are right. LabkitError says what is changed, missing or new."""
    keys, _ = _cryptography()
    from cryptography.exceptions import InvalidSignature

    folder = Path(folder)
    try:
        text, signature = (folder / MANIFEST).read_bytes(), bytes.fromhex((folder / SIGNATURE).read_text().strip())
    except (OSError, ValueError):
        raise LabkitError(f"{folder} has no signed manifest; get the model from who signs it, or sign it yourself.") from None
    try:
        keys.Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(signature, text)
    except ValueError:
        raise LabkitError(f"{public_key[:70]!r} is no public key; expected 64 hexadecimal digits.") from None
    except InvalidSignature:
        raise LabkitError(f"The manifest of {folder} is not signed with this key; do not use the model.") from None
    told, found = json.loads(text), digests(folder)
    for name in sorted(told["files"].keys() | found.keys()):
        signed, there = told["files"].get(name), found.get(name)
        if signed != there:
            what = "is not in the signed manifest" if signed is None else "is missing" if there is None else "was changed"
            raise LabkitError(f"{name} in {folder} {what}; do not use the model, get it again.")
    return told


def digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `folder` but the manifest's own; names with / on every system. No links."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise LabkitError(f"{name} in {folder} is a link, which points where no manifest reaches; put the file itself there.")
        if path.is_file() and name not in (MANIFEST, SIGNATURE):
            with path.open("rb") as file:
                found[name] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return found


def bill(artifact: Artifact, extras: tuple[str, ...] = ("serve",)) -> dict[str, Any]:
    """A software bill of materials in CycloneDX 1.6 (JSON): the model, the engine, and labkit with what it needs here."""
    model: dict[str, Any] = {
        "type": "machine-learning-model", "bom-ref": "model", "name": artifact.checkpoint.name, "version": artifact.checkpoint.revision or "local",
        "description": f"{artifact.recipe.engine} {artifact.recipe.precision}, {artifact.bits_per_weight:.3f} bits per weight",
        "hashes": [{"alg": "SHA-256", "content": artifact.checkpoint.fingerprint}],
        "modelCard": {"modelParameters": {"architectureFamily": artifact.checkpoint.architecture}},
        "components": [
            {"type": "file", "name": name, "hashes": [{"alg": "SHA-256", "content": one["sha256"]}]}
            for name, one in digests(artifact.path).items()
        ],
    }  # fmt: skip
    libraries = [_library(found) for found in _needed("labkit", (artifact.recipe.engine.replace("onnxruntime", "onnx"), *extras))]
    return {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "serialNumber": f"urn:uuid:{uuid.uuid4()}", "version": 1,
        "metadata": {"timestamp": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"), "component": model},
        "components": libraries,
    }  # fmt: skip


def _library(found: metadata.Distribution) -> dict[str, Any]:
    name = found.metadata["Name"]
    entry = {"type": "library", "name": name, "version": found.version, "purl": f"pkg:pypi/{name.lower().replace('_', '-')}@{found.version}"}
    licence = found.metadata.get("License-Expression")
    return entry | ({"licenses": [{"expression": licence}]} if licence else {})


def _needed(name: str, extras: tuple[str, ...]) -> list[metadata.Distribution]:
    """The distribution and, transitively, the installed ones its metadata asks for on this machine, by name."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, metadata.Distribution] = {}
    waiting: list[tuple[str, tuple[str, ...]]] = [(name, extras)]
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while waiting:
        asked = name, wanted = waiting.pop()
        if asked in seen:
            continue
        seen.add(asked)
        try:
            one = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # an extra that is not installed is not served with either
            continue
        found[canonicalize_name(name)] = one
        for line in one.requires or ():
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *wanted)):
                waiting.append((need.name, tuple(sorted(need.extras))))
    return [found[key] for key in sorted(found)]


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise NotInstalled("Signing needs the package cryptography. Try:  pip install cryptography") from None
    return ed25519, serialization
