"""Fetch a checkpoint from a model hub: announced, resumable, checked, and never anything that could run.

Only safetensors, JSON, tokenizer and licence files at the top of the repository are taken. huggingface_hub knows the
address (HF_ENDPOINT), the token and the proxies; the transfer is ours because a cut one must go on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit import host
from labkit._files import PARTIAL, is_disk_full, locked, need_space, read_json, size, sync, write_json
from labkit.checkpoint import Checkpoint, open_checkpoint
from labkit.types import LabkitError

WANTED = re.compile(
    r"(model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|config\.json|generation_config\.json"
    r"|tokenizer\.json|tokenizer\.model|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|chat_template\.(jinja|json)|LICEN[CS]E[\w.-]*|NOTICE[\w.-]*|README\.md)"
)
ATTEMPTS = 5  # fruitless ones in a row; any byte received starts the count anew
PAUSE = 1.0  # seconds before the first new attempt, doubled each time
CHUNK = 1 << 20
RECORD = "download.json"
PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers that another attempt may change


@dataclass(frozen=True)
class RemoteFile:
    name: str
    bytes: int
    sha256: str | None  # of large files
    blob: str | None  # git's own sha1 of small ones


def looks_like_id(text: str) -> bool:
    """Whether `text` has the form of a hub id: organisation/model."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and ".." not in text


def fetch(identifier: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint `identifier` at `revision` (default: main), from disk when it was fetched before.

    The size is announced on stderr before anything is transferred. Raises LabkitError when the hub cannot be reached,
    refuses, lacks the model, or sends something else than it promised.
    """
    folder = host.home() / "checkpoints" / identifier.replace("/", "--")
    with locked(folder.parent / f".lock-{folder.name}"):
        commit = _known_commit(folder, revision)
        if commit is None:
            commit, files = _listing(identifier, revision)
            try:
                if not (folder / commit / RECORD).exists():
                    _download(identifier, commit, files, folder)
                _remember(folder, revision, commit)
            except OSError as error:
                if not is_disk_full(error):
                    raise
                said = f"The disk filled up; what came of {identifier} is kept. Free some and run this again."
                raise LabkitError(said) from error
    return open_checkpoint(folder / commit, name=identifier, revision=commit)


def _known_commit(folder: Path, revision: str | None) -> str | None:
    """Commit of a complete local copy of this revision, None when it must be asked for."""
    refs = read_json(folder / "refs.json", "Download record") if (folder / "refs.json").exists() else {}
    commit = refs.get(revision or "main", revision)
    return commit if commit and (folder / commit / RECORD).exists() else None


def _remember(folder: Path, revision: str | None, commit: str) -> None:
    refs = read_json(folder / "refs.json", "Download record") if (folder / "refs.json").exists() else {}
    write_json(folder / "refs.json", {**refs, revision or "main": commit})


def endpoint() -> str:
    """Address of the hub: $HF_ENDPOINT, else the public one."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _listing(identifier: str, revision: str | None) -> tuple[str, list[RemoteFile]]:
    """(commit, files worth having) as the hub lists them."""
    from huggingface_hub import HfApi

    with _explained(identifier, revision):
        info = HfApi(endpoint=endpoint()).model_info(identifier, revision=revision, files_metadata=True, timeout=20)
    names = [entry.rfilename for entry in info.siblings or []]
    files = [_remote(entry) for entry in info.siblings or [] if WANTED.fullmatch(entry.rfilename)]
    if not any(file.name.endswith(".safetensors") for file in files):
        others = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".gguf", ".onnx")))
        raise LabkitError(
            f"{identifier} offers no model.safetensors" + (f" (only {', '.join(others[:3])})" if others else "")
            + "; pickled weights are never opened. Look for a safetensors copy of this model."
        )  # fmt: skip
    if missing := {"config.json", "tokenizer.json"} - set(names):
        lacking = " and no ".join(sorted(missing))
        raise LabkitError(f"{identifier} offers no {lacking}, which labkit needs; look for a copy that has it.")
    if not info.sha or not re.fullmatch(r"[0-9a-f]{7,64}", info.sha):
        raise LabkitError(f"{endpoint()} names no commit for {identifier}; expected a model hub there.")
    return info.sha, files


def _remote(entry: Any) -> RemoteFile:
    return RemoteFile(entry.rfilename, int(entry.size or 0), entry.lfs.sha256 if entry.lfs else None, entry.blob_id)


def _download(identifier: str, commit: str, files: list[RemoteFile], folder: Path) -> None:
    """Fill folder/commit: into a partial folder that survives interruptions, then renamed when all is checked."""
    from tqdm.auto import tqdm

    total = sum(file.bytes for file in files)
    partial = folder / f"{PARTIAL}{commit}"
    partial.mkdir(parents=True, exist_ok=True)
    here = sum(f.stat().st_size for f in partial.iterdir())
    need_space(folder, total - here, f"The download of {identifier}")
    resumed = f" ({size(here)} of it is here already)" if here else ""
    announce(f"{identifier} at {commit[:12]}: {len(files)} files, {size(total)}{resumed}, to {folder}")
    with tqdm(total=total, unit="B", unit_scale=True, desc=identifier, disable=None) as bar:
        for file in files:
            _file(identifier, commit, file, partial / file.name, bar)
    write_json(partial / RECORD, {"id": identifier, "commit": commit, "files": {f.name: f.bytes for f in files}})
    partial.rename(folder / commit)
    sync(folder)


def announce(sentence: str) -> None:
    """Say something on stderr, where it disturbs no `--json` output."""
    print(sentence, file=sys.stderr, flush=True)


def _file(identifier: str, commit: str, file: RemoteFile, path: Path, bar: Any) -> None:
    """Fetch one file to `path`, going on after what is there; checked against the hub's own digest."""
    unfinished = path.with_name(path.name + ".part")
    if path.exists():
        bar.update(file.bytes)
        return
    bar.update(unfinished.stat().st_size if unfinished.exists() else 0)
    fruitless = 0
    while (before := _have(unfinished)) < file.bytes or not unfinished.exists():
        try:
            _transfer(identifier, commit, file, unfinished, bar)
        except _transport_errors() as error:
            fruitless = 0 if _have(unfinished) > before else fruitless + 1
            if fruitless >= ATTEMPTS:
                raise LabkitError(_cut(identifier, file, _have(unfinished), error)) from None
            time.sleep(PAUSE * 2**fruitless)
    _verify(identifier, file, unfinished)
    sync(unfinished)
    unfinished.rename(path)


def _have(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _cut(identifier: str, file: RemoteFile, have: int, error: Exception) -> str:
    return (
        f"The transfer of {identifier}/{file.name} was cut after {size(have)} of {size(file.bytes)} "
        f"({type(error).__name__}); run the same command again and it goes on from there."
    )


def _transport_errors() -> tuple[type[Exception], ...]:
    """What a broken connection raises: the HTTP library's errors, except an answer that says no."""
    from huggingface_hub.errors import HTTPError

    return (HTTPError, ConnectionError, TimeoutError)


def _transfer(identifier: str, commit: str, file: RemoteFile, unfinished: Path, bar: Any) -> None:
    """One request for what is still missing of a file, appended to `unfinished`."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    have = _have(unfinished)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    url = hf_hub_url(identifier, file.name, revision=commit, endpoint=endpoint())
    with get_session().stream("GET", url, headers=headers, timeout=30) as response:
        if response.status_code in PASSING:
            raise ConnectionError(f"answer {response.status_code}")
        with _explained(identifier, commit, file.name):
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
        goes_on = response.status_code == 206  # 200: the server sends everything again
        if have and not goes_on:
            bar.update(-have)
        with open(unfinished, "ab" if goes_on else "wb") as stream:
            for chunk in response.iter_raw():  # as it arrives: what is held back would be lost in a cut
                stream.write(chunk)
                bar.update(len(chunk))
    if _have(unfinished) < file.bytes:
        raise ConnectionError("the server ended early")


def _verify(identifier: str, file: RemoteFile, path: Path) -> None:
    """Compare with sha256 (large files) or git's blob sha1 (small ones); a wrong file is removed."""
    if file.sha256:
        expected, digest = file.sha256, hashlib.sha256()
    elif file.blob:
        expected, digest = file.blob, hashlib.sha1(b"blob %d\0" % _have(path), usedforsecurity=False)
    else:
        expected, digest = "", hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    wrong_size = _have(path) != file.bytes
    if wrong_size or (expected and digest.hexdigest() != expected):
        found = f"{_have(path)} bytes instead of {file.bytes}" if wrong_size else "another checksum than promised"
        path.unlink()
        raise LabkitError(f"{identifier}/{file.name} arrived with {found}; it was removed. Run the command again.")


@contextmanager
def _explained(identifier: str, revision: str | None, name: str | None = None) -> Iterator[None]:
    """Turn what the hub's client raises into one sentence."""
    from huggingface_hub import errors

    at = f" at {revision}" if revision else ""
    try:
        yield
    except errors.GatedRepoError:
        raise LabkitError(
            f"{identifier} needs its owner's permission: accept its terms at {endpoint()}/{identifier}, "
            "then `hf auth login` and run this again."
        ) from None
    except errors.RevisionNotFoundError:
        raise LabkitError(f"{identifier} has no revision {revision!r}; expected a branch, a tag or a commit.") from None
    except errors.EntryNotFoundError:
        raise LabkitError(f"{identifier}{at} lists {name}, but {endpoint()} lacks it; try again later.") from None
    except errors.RepositoryNotFoundError:
        raise LabkitError(
            f"{endpoint()} has no model {identifier!r}, or it is private; check the spelling, or `hf auth login`."
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        if status in (401, 403):
            raise LabkitError(f"{endpoint()} refused {identifier} ({status}); `hf auth login` and try again.") from None
        raise LabkitError(f"{endpoint()} answered {status} for {identifier}; try again later.") from None
    except errors.HFValidationError as error:
        raise LabkitError(f"{identifier!r} is not a hub id ({error}); expected organisation/model.") from None
    except errors.OfflineModeIsEnabled:
        raise LabkitError(_offline(identifier, "offline mode is set (HF_HUB_OFFLINE)")) from None
    except errors.HTTPError as error:
        raise LabkitError(_offline(identifier, f"{endpoint()} cannot be reached ({type(error).__name__})")) from None


def _offline(identifier: str, why: str) -> str:
    return (
        f"{identifier} was not fetched before and {why}; connect, or use what needs no network: "
        "edgehome, a local folder, or standin:NAME (see `labkit models`)."
    )
