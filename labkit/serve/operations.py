"""The routes of whoever runs the server: /health for the one that restarts it, /metrics for the one that watches it."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from labkit.serve.served import Refused, Served


class Health(BaseModel):
    status: str
    model: str
    waiting: int


def routes(served: Served) -> APIRouter:
    """/health and /metrics of one model."""
    router = APIRouter(tags=["operations"])

    @router.get("/health", responses={503: {"description": "The model's thread has ended"}})
    async def health() -> Health:
        """Whether the model can answer; needs no key."""
        if not served.worker.alive:
            raise Refused(503, "The model's thread has ended; start the server again.")
        return Health(status="ok", model=served.name, waiting=served.worker.waiting)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Counters in Prometheus's text format."""
        return PlainTextResponse(served.meters.text())

    return router
