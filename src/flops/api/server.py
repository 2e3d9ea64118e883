"""Serving the applications in one event loop until somebody ends it."""

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from flops.api.app import create_app, create_reports_app
from flops.api.beside import Pages
from flops.core.errors import FlopsError
from flops.manager import Home, Manager, TlsListener

log = logging.getLogger(__name__)

_GRACE_S = 3
_LOOK_S = 3600.0
"""Between looks at certificates."""
_RETRY_S = 60.0
_SOONEST_S = 0.2


class QuietServer(uvicorn.Server):
    """A server that leaves signals to us: two of them live in one process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    manager: Manager,
    home: Home,
    api: socket.socket,
    reports: socket.socket,
    *,
    remote: TlsListener | None = None,
    network: TlsListener | None = None,
    pages: Pages | None = None,
) -> None:
    """Serve until POST /v1/shutdown, SIGTERM or SIGINT; the address file is there while requests are
    answered.

    Args:
        remote: where services of other machines report, if there are any.
        network: where the REST API answers other machines, if it does.
        pages: the GUI beside the REST API.
    """
    asyncio.run(_serve(manager, home, api, reports, remote, network, pages))


async def _serve(
    manager: Manager,
    home: Home,
    api: socket.socket,
    reports: socket.socket,
    remote: TlsListener | None,
    network: TlsListener | None,
    pages: Pages | None,
) -> None:
    loop = asyncio.get_running_loop()
    servers: list[QuietServer] = []

    def stop() -> None:
        manager.broadcast.close()  # event streams end, so that nobody waits for them
        if pages is not None:
            pages.close()
        for server in servers:
            server.should_exit = True

    def stop_soon() -> None:
        loop.call_soon_threadsafe(stop)

    names = network.names if network is not None else ()
    app = create_app(manager, home.token, stop_soon, names, pages)
    servers += [_server(app), _server(create_reports_app(manager))]
    listeners = [api, reports]
    if network is not None:
        servers.append(_server(app, network))
        listeners.append(network.listener)
    if remote is not None:
        servers.append(_server(create_reports_app(manager), remote))
        listeners.append(remote.listener)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    running = [
        asyncio.create_task(server.serve(sockets=[listener]))
        for server, listener in zip(servers, listeners, strict=True)
    ]
    looking = [
        asyncio.create_task(keep_certified(server, tls))
        for server, tls in zip(
            servers[2:], [one for one in (network, remote) if one is not None], strict=True
        )
    ]
    looking.append(asyncio.create_task(_keep_models_certified(manager)))
    gc.collect()
    gc.freeze()  # what is loaded by now stays, and a look through it would hold up all requests for 80 ms
    # Both sockets listen already: whoever comes from now on is answered, a moment later at worst.
    url = home.announce(api)
    manager.announce(url if network is None else network.url)
    log.info("listening on %s%s", url, f" and {network.url}" if network is not None else "")
    try:
        await asyncio.gather(*running)
    finally:
        for task in looking:
            task.cancel()


async def keep_certified(server: uvicorn.Server, tls: TlsListener) -> None:
    """Give a server that runs a new certificate whenever half of the old one's life is over: connections from
    then on see it, those that are open go on.
    """
    while True:
        try:
            due_s = await asyncio.to_thread(tls.due_in_s)
            if due_s <= 0 and server.started:
                await asyncio.to_thread(tls.renew)
                context = server.config.ssl
                assert context is not None
                context.load_cert_chain(tls.certificate, tls.key)
                log.info("the certificate of %s is renewed", tls.url)
                continue
        except (OSError, ValueError, FlopsError):  # a full disk; there is half a life to try again
            log.exception("the certificate of %s cannot be renewed", tls.url)
            due_s = _RETRY_S
        await asyncio.sleep(min(max(due_s, _SOONEST_S), _LOOK_S))  # a machine may sleep meanwhile


async def _keep_models_certified(manager: Manager) -> None:
    while True:
        await asyncio.sleep(_LOOK_S)
        try:
            await asyncio.to_thread(manager.renew_certificates)
        except FlopsError:
            log.exception("certificates of served models cannot be renewed")


def _server(app: FastAPI, tls: TlsListener | None = None) -> QuietServer:
    return QuietServer(
        uvicorn.Config(
            app,
            ssl_certfile=tls.certificate if tls else None,
            ssl_keyfile=tls.key if tls else None,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
            timeout_keep_alive=30,
        )
    )
