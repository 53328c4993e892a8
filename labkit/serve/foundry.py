"""Foundry Local through its own SDK: register a GenAI folder, load it, chat, stream, see what was refused.

    with foundry.host() as local:
        model = local.register(folder, "edgehome")     # -> "edgehome:1"; nothing is copied
        local.load(model)
        reply = local.chat(model, [{"role": "user", "content": "Turn on the lamp"}], max_output_tokens=64)

The SDK runs the model in the process that imports it, and brings a newer onnxruntime-genai than labkit's engine uses; the
two do not fit into one process. So it lives in a child (`_foundry_child`), which also makes its memory easy to read.
Source of the calls: the README and the sources of foundry-local-sdk 2.2.1 (MIT).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from labkit.i18n import tr
from labkit.types import LabkitError, NotInstalled

PACKAGE, VARIABLE = "foundry-local-sdk", "LABKIT_FOUNDRY_PYTHON"
CHILD = Path(__file__).with_name("_foundry_child.py")
ROLES = ("system", "user", "assistant", "developer")
OUTPUT_TOKENS = 2048  # what the runtime reserves for an answer when a request does not say
SETTINGS = (
    "temperature", "top_p", "top_k", "max_output_tokens", "frequency_penalty", "presence_penalty", "seed", "early_stopping", "do_sample",
)  # fmt: skip
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Reply:
    """An answer: its text, why it ended (stop, length, cancelled), the runtime's own token counts, seconds."""

    text: str
    reason: str
    prompt_tokens: int | None = None  # None: cancelled
    completion_tokens: int | None = None
    seconds: float = 0.0
    first_seconds: float | None = None  # to the first piece; None when the answer was not streamed


@dataclass(frozen=True)
class Budget:
    """What a request would need, asked of the runtime before it is made."""

    prompt_tokens: int
    reserved: int  # for the answer
    context: int
    fits: bool


def interpreter() -> str:
    """The Python that has foundry-local-sdk: this one, else the one that $LABKIT_FOUNDRY_PYTHON names; NotInstalled without."""
    given = os.environ.get(VARIABLE)
    if given and not Path(given).is_file():
        raise LabkitError(tr("{variable} names {given}, which is no file; give a Python that has {package}.",
                             variable=VARIABLE, given=given, package=PACKAGE))  # fmt: skip
    if not given and find_spec("foundry_local_sdk") is None:
        raise NotInstalled(tr(
            "Foundry Local is not installed. Try:  pip install {package}  or let {variable} name a Python that has it.",
            package=PACKAGE, variable=VARIABLE,
        ))  # fmt: skip
    return given or sys.executable


@cache
def version() -> str | None:
    """The version of the SDK that `host` will use; None where there is none."""
    ask = f"from importlib.metadata import version; print(version({PACKAGE!r}))"
    try:
        said = subprocess.run([interpreter(), "-c", ask], capture_output=True, text=True, timeout=60)
    except NotInstalled:
        return None
    return said.stdout.strip() or None


class Host:
    """The child process, its catalog of local folders, and what can be asked of it. Use `host()`."""

    def __init__(self, folder: Path, threads: int | None):
        self.folder, self._number = folder, 0
        limit = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        self._log = (folder / "child.log").open("w+", errors="replace")
        self._process = subprocess.Popen(
            [interpreter(), "-P", str(CHILD), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            text=True, encoding="utf-8", env={**os.environ, **limit, "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def register(self, folder: Path | str, name: str, *, version: int = 1, task: str = "chat-completion", **about: Any) -> str:
        """Add a GenAI folder to the local catalog and give its id, NAME:VERSION. Nothing is copied; an id is given once."""
        given = {"folder": str(Path(folder).resolve()), "name": f"{name}:{version}", "about": {"task": task, **about}}
        return self._ask("register", **given)["id"]

    def unregister(self, model: str) -> None:
        """Take a model out of the catalog; its folder stays, and so does its memory when it is loaded: `unload` first."""
        self._ask("unregister", model=model)

    def models(self) -> dict[str, bool]:
        """The ids of the local catalog, and whether each is loaded."""
        return {one["id"]: one["loaded"] for one in self._ask("list")["models"]}

    def load(self, model: str) -> float:
        """Open a registered model; gives the seconds it took."""
        return self._ask("load", model=model)["seconds"]

    def unload(self, model: str) -> None:
        self._ask("unload", model=model)

    def budget(self, model: str, messages: Messages, **search: Any) -> Budget:
        """Tokens of the rendered prompt and of the answer, against the context: what `chat` would check."""
        told = self._ask("budget", model=model, messages=_plain(messages), search=_search(search))
        return Budget(told["prompt_tokens"], told["reserved"], told["context"], told["fits"])

    def chat(self, model: str, messages: Messages, **search: Any) -> Reply:
        """The answer to a conversation, in the model's own chat template. `search`: any of SETTINGS.

        Without do_sample=False or temperature=0 the runtime draws, whatever genai_config.json says; without
        max_output_tokens it reserves OUTPUT_TOKENS and refuses a model whose context is smaller.
        """
        return _reply(self._ask("chat", model=model, messages=_plain(messages), search=_search(search)))

    def stream(self, model: str, messages: Messages, **search: Any) -> Iterator[str]:
        """The same, piece by piece; closing the iterator cancels the request. The generator's value is the `Reply`."""
        self._send("stream", model=model, messages=_plain(messages), search=_search(search))
        ended = None
        try:
            while ended is None:
                answer = self._read()
                if answer.get("done"):
                    ended = _reply(answer)
                else:
                    yield answer["piece"]
        except LabkitError:  # the runtime's own: nothing is left to read
            ended = False
            raise
        finally:
            if ended is None:
                self._write({"what": "cancel", "number": self._number})
                while not self._read().get("done"):
                    pass
        return ended

    def memory(self) -> int:
        """Resident bytes of the child now."""
        return self._child().memory_info().rss

    def cpu_seconds(self) -> float:
        """Processor seconds the child has used."""
        return sum(self._child().cpu_times()[:2])

    def close(self) -> None:
        """Free everything and end the process. Safe to call twice."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _child(self) -> Any:
        import psutil

        return psutil.Process(self.pid)

    def _ask(self, what: str, **given: Any) -> dict[str, Any]:
        self._send(what, **given)
        return self._read()

    def _send(self, what: str, **given: Any) -> None:
        self._number += 1
        self._write({"what": what, "number": self._number, "given": given})

    def _write(self, command: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # reading says what happened
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            said = " | ".join(self._log.read().strip().splitlines()[-2:]) or "it wrote nothing"
            raise LabkitError(tr("Foundry Local's process ended with status {status}: {said}", status=status, said=said))
        answer = json.loads(line)
        if "error" in answer:
            raise LabkitError(tr("Foundry Local refused: {reason}.", reason=plainly(answer["error"]).rstrip(".")))
        return answer


@contextlib.contextmanager
def host(threads: int | None = None) -> Iterator[Host]:
    """A Foundry Local of its own, offline, in a child process that ends with the block. NotInstalled where it is absent."""
    with tempfile.TemporaryDirectory(prefix="labkit-foundry-", ignore_cleanup_errors=True) as folder:
        opened = Host(Path(folder), threads)
        try:
            yield opened
        finally:
            opened.close()


def plainly(error: str) -> str:
    """A message of the runtime without the C++ file, line and signature before it."""
    if not re.match(r"[\w.]+\.cc:\d+ ", error) or "(" not in error:
        return error
    depth = 0
    for place, letter in enumerate(error):
        depth += (letter == "(") - (letter == ")")
        if letter == ")" and depth == 0:
            return re.sub(r"^(const|noexcept)\b", "", error[place + 1 :].strip()).strip()
    return error


def _plain(messages: Messages) -> list[dict[str, str]]:
    for place, one in enumerate(messages):
        if set(one) != {"role", "content"} or one["role"] not in ROLES or not isinstance(one["content"], str):
            raise LabkitError(tr("messages[{place}] is {given}; expected role ({roles}) and content, a text.",
                                 place=place, given=str(dict(one))[:80], roles=", ".join(ROLES)))  # fmt: skip
        if "\0" in one["content"]:  # the runtime would read up to there, and say nothing
            raise LabkitError(tr("messages[{place}] holds a zero character, at which the runtime would cut it; leave it out.", place=place))
    return [dict(one) for one in messages]


def _search(given: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(given) - set(SETTINGS)):
        raise LabkitError(tr("Foundry Local has no setting {name!r}; expected one of {known}.", name=unknown[0], known=", ".join(SETTINGS)))
    return dict(given)


def _reply(answer: Mapping[str, Any]) -> Reply:
    return Reply(**{key: value for key, value in answer.items() if key in Reply.__dataclass_fields__})
