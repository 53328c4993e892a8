"""What travels between the grader and a learner's process: plain values, arrays and calls, never pickles.

The judge runs in the grader's process and the answer stays in the learner's. A function is not sent: its place is taken
by a proxy that sends the arguments there and the result back. So code of a learner cannot touch the judge; all it can do
is return values. What is read here comes from an untrusted process: only exact built-in types, numeric and text arrays,
paths and labkit's own records are made of it, and a message has a limited size.
"""

from __future__ import annotations

import base64
import builtins
import dataclasses
import importlib
import json
import queue
import re
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np

MOST = 8_000_000  # bytes of one message
DTYPE = re.compile(r"[<>|=]?(?:[biufc]\d{1,2}|[US]\d{1,6})")
_END = object()


class Broken(Exception):
    """The other side is gone, late, or does not keep to the protocol."""


class Foreign:
    """An object that cannot travel; only its kind and its text are known."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind, self.text = kind, text

    def __repr__(self) -> str:
        return f"{self.kind} {self.text}"


class Peer:
    """One end of a two-way line: requests, replies, and calls of functions that were sent as values."""

    def __init__(self, source: BinaryIO, sink: BinaryIO, handlers: dict[str, Callable[..., Any]] | None = None) -> None:
        self._sink, self._handlers = sink, handlers or {}
        self._functions: list[Callable[..., Any]] = []
        self._asked = 0
        self._inbox: queue.Queue[Any] = queue.Queue(maxsize=2)  # a flood waits outside
        threading.Thread(target=self._listen, args=(source,), daemon=True).start()

    def ask(self, what: str, *values: Any, seconds: float | None = None) -> Any:
        """Have the other side do `what`; its result, or the error it raised. Broken after `seconds` without a reply."""
        self._asked += 1
        mine = self._asked
        self._send({"ask": mine, "what": what, "with": [self.pack(v) for v in values]})
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            message = self._next(until)
            if "ask" in message:
                self._serve(message)
            elif message.get("reply") == mine:  # an older reply, to a question given up, is passed over
                if message.get("error"):
                    raise _error(*map(str, message["error"][:2]))
                return self._unpacked(message.get("value"))

    def serve(self) -> None:
        """Answer what the other side asks until it is gone."""
        while True:
            try:
                self._serve(self._next(None))
            except Broken:
                return

    def pack(self, value: Any) -> Any:
        """`value` as JSON; a function becomes a number under which the other side may call it."""
        if value is None or type(value) in (bool, float, str):
            return value
        if type(value) is int:
            return value if abs(value) < 2**63 else {"int": hex(value)}
        if type(value) in (list, tuple, set, frozenset):
            items = [self.pack(v) for v in value]
            return items if type(value) is list else {type(value).__name__: items}
        if isinstance(value, dict):
            return {"dict": [[self.pack(k), self.pack(v)] for k, v in value.items()]}
        return self._pack_object(value)

    def _pack_object(self, value: Any) -> Any:
        if value is ...:
            return {"dots": True}
        if isinstance(value, (bytes, bytearray, memoryview)):
            return {"bytes": _base64(bytes(value))}
        if isinstance(value, complex) and type(value) is complex:
            return {"complex": [value.real, value.imag]}
        if isinstance(value, (np.ndarray, np.generic)) and DTYPE.fullmatch(_dtype(value)):
            kind = "array" if isinstance(value, np.ndarray) else "scalar"
            flat = np.ascontiguousarray(value).tobytes()
            return {kind: [_dtype(value), list(value.shape), _base64(flat)]}
        if isinstance(value, PurePath):
            return {"path": str(value)}
        if _is_record(type(value)):
            fields = [[f.name, self.pack(getattr(value, f.name))] for f in dataclasses.fields(value)]
            return {"record": [type(value).__module__, type(value).__qualname__, fields]}
        if isinstance(value, Iterator):
            return {"iterator": self._export(value.__next__)}
        if callable(value):
            return {"function": [self._export(value), str(getattr(value, "__name__", "your function"))]}
        return {"foreign": [type(value).__name__, repr(value)[:200]]}

    def unpack(self, data: Any) -> Any:
        """The value `pack` made `data` of on the other side; raises ValueError for anything else."""
        if data is None or type(data) in (bool, int, float, str):
            return data
        if type(data) is list:
            return [self.unpack(v) for v in data]
        if type(data) is not dict or len(data) != 1:
            raise ValueError("not a value of this protocol")
        ((kind, held),) = data.items()
        simple = {"tuple": tuple, "set": set, "frozenset": frozenset}
        if kind in simple:
            return simple[kind](self.unpack(v) for v in held)
        return getattr(self, f"_unpack_{kind}" if kind in _KINDS else "_unpack_unknown")(held)

    def _unpack_int(self, held: str) -> int:
        return int(held, 16)

    def _unpack_dict(self, held: list) -> dict:
        return {self.unpack(k): self.unpack(v) for k, v in held}

    def _unpack_dots(self, held: Any) -> Any:
        return ...

    def _unpack_bytes(self, held: str) -> bytes:
        return base64.b64decode(held)

    def _unpack_complex(self, held: list) -> complex:
        return complex(*held)

    def _unpack_array(self, held: list) -> np.ndarray:
        dtype, shape, flat = held
        if not DTYPE.fullmatch(dtype):
            raise ValueError(f"an array of {dtype!r}")
        return np.frombuffer(base64.b64decode(flat), np.dtype(dtype)).reshape(shape).copy()

    def _unpack_scalar(self, held: list) -> Any:
        return self._unpack_array(held).reshape(())[()]

    def _unpack_path(self, held: str) -> Path:
        return Path(held)

    def _unpack_record(self, held: list) -> Any:
        module, kind, fields = held
        found = getattr(importlib.import_module(module), kind) if module in sys.modules and _ours(module) else None
        if not (isinstance(found, type) and _is_record(found)):
            raise ValueError(f"a record of {module}.{kind}")
        names, made = {f.name for f in dataclasses.fields(found)}, object.__new__(found)
        for name, value in fields:  # as `copy` would: a record's own __init__ may take other arguments than its fields
            if name not in names:
                raise ValueError(f"a field {name!r} of {found.__name__}")
            object.__setattr__(made, name, self.unpack(value))
        return made

    def _unpack_iterator(self, held: int) -> Iterator[Any]:
        step = _remote(self, int(held), "next")
        while True:
            try:
                value = step()
            except StopIteration:
                return
            yield value

    def _unpack_function(self, held: list) -> Callable[..., Any]:
        return _remote(self, int(held[0]), str(held[1])[:80])

    def _unpack_foreign(self, held: list) -> Foreign:
        return Foreign(str(held[0])[:80], str(held[1])[:200])

    def _unpack_unknown(self, held: Any) -> Any:
        raise ValueError("not a value of this protocol")

    def _unpacked(self, data: Any) -> Any:
        try:
            return self.unpack(data)
        except Exception as error:  # whatever is wrong with it, it did not come from `pack`
            raise Broken(f"unreadable value ({type(error).__name__}: {error})") from None

    def _export(self, function: Callable[..., Any]) -> int:
        self._functions.append(function)
        return len(self._functions) - 1

    def _serve(self, message: dict[str, Any]) -> None:
        try:
            values = [self.unpack(v) for v in message.get("with", [])]
            if message.get("what") == "call":
                result = self._functions[values[0]](*values[1], **values[2])
            else:
                result = self._handlers[message["what"]](*values)
            reply = {"reply": message["ask"], "value": self.pack(result)}
        except Exception as error:
            reply = {"reply": message.get("ask"), "error": [type(error).__name__, str(error)[:2000]]}
        self._send(reply)

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        if len(data) > MOST:
            raise ValueError(f"a value of {len(data):,} bytes is too large to be judged")
        try:
            self._sink.write(struct.pack("<I", len(data)) + data)
            self._sink.flush()
        except (OSError, ValueError) as error:
            raise Broken(f"the line is closed ({error})") from None

    def _next(self, until: float | None) -> dict[str, Any]:
        try:
            message = self._inbox.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise Broken("no reply in time") from None
        if message is _END:
            self._inbox.put(_END)
            raise Broken("the process ended")
        return message

    def _listen(self, source: BinaryIO) -> None:
        """Read messages as they come, so that giving up on one never leaves half of it in the line."""
        try:
            while True:
                (length,) = struct.unpack("<I", _exactly(source, 4))
                if length > MOST:
                    break
                message = json.loads(_exactly(source, length))
                if not isinstance(message, dict):
                    break
                self._inbox.put(message)
        except (OSError, EOFError, ValueError, RecursionError):
            pass
        self._inbox.put(_END)


def _remote(peer: Peer, number: int, name: str) -> Callable[..., Any]:
    """A function that stands for function `number` on the other side."""

    def function(*values: Any, **named: Any) -> Any:
        return peer.ask("call", number, values, named)

    function.__name__ = name
    return function


_KINDS = {name.removeprefix("_unpack_") for name in vars(Peer) if name.startswith("_unpack_")}


def _error(kind: str, text: str) -> Exception:
    """The other side's error, as the same built-in kind where there is one, so that a judge can tell kinds apart."""
    found = getattr(builtins, kind, None)
    if isinstance(found, type) and issubclass(found, Exception) and found is not UnicodeDecodeError:
        try:
            return found(text)
        except TypeError:
            pass
    return type(kind if kind.isidentifier() else "Error", (Exception,), {})(text)


def _is_record(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) and _ours(kind.__module__)


def _ours(module: str) -> bool:
    return module == "labkit" or module.startswith("labkit.")


def _dtype(value: Any) -> str:
    return value.dtype.str.replace("|b1", "b1")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _exactly(source: BinaryIO, count: int) -> bytes:
    data = source.read(count)
    if len(data) < count:
        raise EOFError
    return data
