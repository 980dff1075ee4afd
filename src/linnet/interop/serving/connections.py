"""Connections that bring their requests in time."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["timely_connections"]

_Uvicorn: Any = AutoHTTPProtocol


def timely_connections(seconds: float) -> type[asyncio.Protocol]:
    """The ``http`` of a ``uvicorn.Config``: its protocol, which waits for ever for the head of a request, and counts
    who it waits for among those it works for.

    Args:
        seconds: how long a connection may take until the head of its first request is there, or of a later one that it
            has begun; then it is closed. Between requests uvicorn's own time counts.
    """

    class Connection(_Uvicorn):
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.forget()

        def watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self.forget()
            elif self.timer is None:
                self.timer = self.loop.call_later(seconds, self.shutdown)  # at once, as there is no request

        def forget(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

    return Connection
