"""A connection that does not finish the head of its request is closed: without that, a few hundred slow ones use a server up.

uvicorn limits how long a connection idles after an answer, and the guard how long a body takes; the time before the first body byte
is counted here.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def patient(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol (h11), with `seconds` for the head of every request: `uvicorn.Config(app, http=patient(10))`."""

    class Patient(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()  # the head is there; what follows is the guard's business
            elif self._timer is None:
                self._wait()  # the next head has begun

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _wait(self) -> None:
            self._timer = self.loop.call_later(seconds, self._late)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _late(self) -> None:
            if self.transport is not None and not self.transport.is_closing():
                self.transport.close()

    return Patient
