"""Compare a learner's answer with what was expected, and say where the first difference is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from labkit.i18n import tr


class NotYet(Exception):
    """The answer is not right yet. The message says what was expected, what came, and where they part."""


class NotStarted(Exception):
    """The answer still holds the stub's `...`."""


def same(answer: Any, expected: Any, what: str | None = None) -> None:
    """Equal by value: strings, booleans, integers, lists, dicts. Use `close` for measured or computed floats."""
    unfinished(answer)
    what = what or tr("the answer")
    if isinstance(expected, Mapping) and isinstance(answer, Mapping):
        return _same_mapping(answer, expected, what)
    if isinstance(expected, (list, tuple)) and isinstance(answer, (list, tuple)):
        return _same_sequence(answer, expected, what)
    if isinstance(expected, bool) != isinstance(answer, (bool, np.bool_)):
        raise _expected(what, _short(expected), _short(answer))
    if type(answer) is not type(expected) and not _both_numbers(answer, expected):
        raise _expected(what, _kind(expected), _kind(answer))
    if answer != expected:
        raise _expected(what, _short(expected), _short(answer) + _where(answer, expected))


def close(answer: Any, expected: Any, *, rel: float = 1e-6, abs: float = 0.0, what: str | None = None) -> None:
    """Equal within `abs + rel * |expected|`, element by element, and of the same shape. NaN equals NaN."""
    unfinished(answer)
    what = what or tr("the answer")
    got, want = _array(answer, what), np.asarray(expected, dtype=float)
    if got.shape != want.shape:
        raise NotYet(tr("{what}: expected shape {want}, got {got}", what=what, want=want.shape, got=got.shape))
    wrong = ~np.isclose(got, want, rtol=rel, atol=abs, equal_nan=True)
    if not wrong.any():
        return
    if want.ndim == 0:
        raise _expected(what, f"{want:.6g}", f"{got:.6g}")
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    place = at[0] if len(at) == 1 else at
    said = tr("{wrong} of {size} values differ; first difference at {place}", wrong=wrong.sum(), size=wrong.size, place=place)
    raise _expected(f"{what}: {said}", f"{want[at]:.6g}", f"{got[at]:.6g}")


def raw_bytes(answer: Any, expected: bytes, *, block: int = 0, what: str | None = None) -> None:
    """Equal byte for byte. The first differing byte is drawn as bits; `block` > 0 also names its block."""
    unfinished(answer)
    what = what or tr("the bytes")
    if not isinstance(answer, (bytes, bytearray, memoryview, np.ndarray)):
        raise _expected(what, tr("bytes or a uint8 array"), _kind(answer))
    if isinstance(answer, np.ndarray) and answer.dtype.itemsize != 1:
        raise _expected(what, tr("one byte an element (uint8)"), answer.dtype)
    got = np.frombuffer(np.ascontiguousarray(answer).tobytes() if isinstance(answer, np.ndarray) else answer, np.uint8)
    want = np.frombuffer(expected, np.uint8)
    if got.size != want.size:
        raise NotYet(tr("{what}: expected {want} bytes, got {got}", what=what, want=want.size, got=got.size))
    differ = np.flatnonzero(got != want)
    if differ.size:
        at = int(differ[0])
        place = tr("byte {at}", at=at)
        if block:
            place = tr("byte {at} (block {block}, byte {inside} of it)", at=at, block=at // block, inside=at % block)
        counts = {"wrong": differ.size, "size": want.size}
        said = tr("{wrong} of {size} bytes differ; first difference at {place}", place=place, **counts)
        raise _expected(f"{what}: {said}", f"{want[at]:08b}", f"{got[at]:08b}")


def function(
    answer: Any,
    reference: Callable[..., Any],
    cases: Sequence[tuple],
    *,
    compare: Callable[..., None] = close,
    **options: Any,
) -> None:
    """Call the learner's function and ours on each tuple of arguments; `compare` judges the two results."""
    unfinished(answer)
    if not callable(answer):
        raise NotYet(tr("expected a function, got {got}", got=_kind(answer)))
    for case in cases:
        call = f"{getattr(answer, '__name__', tr('your function'))}({', '.join(_short(a, 40) for a in case)})"
        expected = reference(*copy.deepcopy(case))
        try:
            got = answer(*copy.deepcopy(case))  # a copy: the learner's function may write into its arguments
        except (NotImplementedError, NotStarted) as error:
            raise NotStarted from error
        except Exception as error:  # whatever the learner's code raises is the answer we judge
            raise NotYet(tr("{call} raised {kind}: {error}", call=call, kind=type(error).__name__, error=error)) from error
        compare(got, expected, what=call, **options)


def unfinished(answer: Any) -> None:
    """Raise NotStarted when `...` (or None) is still in the answer, at any depth of lists and dicts."""
    if answer is ... or answer is None or answer is NotImplemented:
        raise NotStarted
    if isinstance(answer, Mapping):
        for value in answer.values():
            unfinished(value)
    elif isinstance(answer, (list, tuple)):
        for value in answer:
            unfinished(value)


def _expected(what: str, want: Any, got: Any) -> NotYet:
    return NotYet(tr("{what}: expected {want}, got {got}", what=what, want=want, got=got))


def _same_mapping(answer: Mapping, expected: Mapping, what: str) -> None:
    if missing := [k for k in expected if k not in answer]:
        raise NotYet(tr("{what}: the key {key!r} is missing", what=what, key=missing[0]))
    if extra := [k for k in answer if k not in expected]:
        raise NotYet(tr("{what}: the key {key!r} was not expected", what=what, key=extra[0]))
    for key, value in expected.items():
        same(answer[key], value, f"{what}[{key!r}]")


def _same_sequence(answer: Sequence, expected: Sequence, what: str) -> None:
    for i, (got, want) in enumerate(zip(answer, expected, strict=False)):
        same(got, want, f"{what}[{i}]")
    if len(answer) != len(expected):
        raise NotYet(tr("{what}: expected {want} items, got {got}", what=what, want=len(expected), got=len(answer)))


def _array(answer: Any, what: str) -> np.ndarray:
    if isinstance(answer, (bool, np.bool_, str, bytes)):
        raise _expected(what, tr("numbers"), _kind(answer))
    try:
        return np.asarray(answer, dtype=float)
    except (TypeError, ValueError):
        raise _expected(what, tr("numbers"), _kind(answer)) from None


def _both_numbers(a: Any, b: Any) -> bool:
    number = (int, float, np.integer, np.floating)
    return isinstance(a, number) and isinstance(b, number) and not isinstance(a, bool) and not isinstance(b, bool)


def _where(answer: Any, expected: Any) -> str:
    if not (isinstance(answer, str) and isinstance(expected, str)):
        return ""
    at = next((i for i, (a, b) in enumerate(zip(answer, expected, strict=False)) if a != b), min(len(answer), len(expected)))
    return tr("; first difference at character {at}", at=at)


def _short(value: Any, limit: int = 60) -> str:
    if isinstance(value, np.ndarray) and value.size > 6:
        return tr("array of shape {shape}", shape=value.shape)
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {_short(value)}" if not isinstance(value, np.ndarray) else _short(value)
