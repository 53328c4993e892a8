"""Keep the stack on which a thread takes its signals: a library that swaps it may leave one that no longer exists."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """C's stack_t, as Linux has it."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Afterwards this thread's alternate signal stack is the one it had before (Linux; elsewhere nothing happens).

    On processors with AMX every instance of OpenVINO's CPU plugin gives the thread that creates it a stack of its own, and puts
    back the one it found when it goes. Instances that end in another order than they began leave a stack that was freed, and
    the next signal (an interrupt, a time limit) ends the process. An instance that finds its stack replaced leaves all as it is.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    libc, before = ctypes.CDLL(None), _Stack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)
