"""What a manager answers while it stands by for another one: that it does, and where the one is that acts."""

import asyncio
import os
import socket
import threading
from http import HTTPStatus

import uvicorn
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from flops import __version__
from flops.api.access import OwnNamesOnly
from flops.api.problems import problem
from flops.api.schemas import Health
from flops.api.server import QuietServer
from flops.core.errors import UnavailableError

_RETRY_AFTER_S = 2


class Standby:
    """Answers at a socket, in a thread of its own, until `close`; the socket itself stays open for whoever
    serves it afterwards.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._active: tuple[str | None, str] | None = None
        self._listener = listener.dup()
        self._server = QuietServer(
            uvicorn.Config(
                OwnNamesOnly(self._answer),
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(target=self._serve, name="flops-standby", daemon=True)
        self._thread.start()

    def tell(self, address: str | None, who: str) -> None:
        """Another manager acts.

        Args:
            address: of its REST API, once it answers.
            who: it, in words.
        """
        self._active = address, who

    def close(self) -> None:
        """From now on connections wait for whoever serves the socket next."""
        self._server.should_exit = True
        self._thread.join()

    def _serve(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._listener]))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._response(scope["method"], scope["path"])(scope, receive, send)

    def _response(self, method: str, path: str) -> Response:
        address, who = self._active or (None, "the one that acts, which is not known yet")
        if (method, path) == ("GET", "/v1/health"):
            health = Health(status="standby", version=__version__, pid=os.getpid(), active=address)
            return JSONResponse(health.model_dump())
        answer = problem(
            HTTPStatus.SERVICE_UNAVAILABLE,
            UnavailableError.code,
            f"this manager stands by for {who} - ask that one, or this one again once it has taken over",
        )
        answer.headers["Retry-After"] = str(_RETRY_AFTER_S)
        return answer
