"""The authority's certificates, in real TLS handshakes."""

import asyncio
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography import x509

from flops.api.server import QuietServer, keep_certified
from flops.core.settings import Settings
from flops.manager.authority import Authority, is_due
from flops.manager.home import TlsListener, claim_home


def handshake(listener: socket.socket, certificate: Path, key: Path, trusted: str, host: str) -> str:
    """Connect to a server with that certificate; returns the TLS version that was agreed on."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                with server.wrap_socket(connection, server_side=True) as secure:
                    secure.recv(1)
            except OSError:
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    client = ssl.create_default_context(cadata=trusted)
    try:
        with (
            socket.create_connection(listener.getsockname()[:2]) as plain,
            client.wrap_socket(plain, server_hostname=host) as secure,
        ):
            secure.send(b"x")
            return str(secure.version())
    finally:
        thread.join()


def test_the_managers_own_listener_is_trusted_by_whoever_trusts_its_authority(tmp_path: Path) -> None:
    home = claim_home(Settings(home=tmp_path))
    remote = home.listen_for_remote_reports("127.0.0.1")
    authority = Authority(home.settings.authority_dir)
    with remote.listener:
        found = handshake(remote.listener, remote.certificate, remote.key, authority.certificate, "127.0.0.1")
    assert found in ("TLSv1.2", "TLSv1.3")
    assert remote.key.stat().st_mode & 0o777 == 0o600
    home.leave()


def test_another_authority_or_another_name_is_not_trusted(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    issued = ours.issue("p-1-aggregator", ["127.0.0.1"])
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_text(issued.certificate)
    key.write_text(issued.key)
    for trusted, name in ((theirs.certificate, "127.0.0.1"), (ours.certificate, "127.0.0.2")):
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            pytest.raises(ssl.SSLCertVerificationError),
        ):
            handshake(listener, certificate, key, trusted, name)


def test_an_authority_is_the_same_for_every_manager_of_a_home(tmp_path: Path) -> None:
    assert Authority(tmp_path).certificate == Authority(tmp_path).certificate
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600


def test_a_certificate_of_a_service_is_kept_while_half_of_its_life_is_left(tmp_path: Path) -> None:
    authority, file = Authority(tmp_path / "authority"), tmp_path / "aggregator.json"
    day = 1.0
    first = authority.issue_once(file, "aggregator", ["127.0.0.1"], client=True, days=day)
    assert authority.issue_once(file, "aggregator", ["127.0.0.1"], client=True, days=day) == first
    assert not is_due(file, day)
    assert is_due(file, 3.1 * day), "less than a third of what such a certificate has"
    second = authority.issue_once(file, "aggregator", ["127.0.0.1"], client=True, days=2.1 * day)
    assert second != first
    assert not is_due(tmp_path / "nothing.json", day)


def test_a_server_that_runs_gets_new_certificates_before_the_old_ones_are_over(tmp_path: Path) -> None:
    """They live ten seconds; what stays connected is not disturbed."""
    lives_s = 10.0
    asyncio.run(_serve_longer_than(tmp_path, lives_s))


async def _serve_longer_than(folder: Path, lives_s: float) -> None:
    home = claim_home(Settings(home=folder))
    tls = home.listen_for_remote_reports("127.0.0.1", days=lives_s / 86400)
    trusted = ssl.create_default_context(cadata=Authority(home.settings.authority_dir).certificate)

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    config = uvicorn.Config(
        answer, ssl_certfile=tls.certificate, ssl_keyfile=tls.key, lifespan="off", ws="none", log_config=None
    )
    server = QuietServer(config)
    serving = asyncio.create_task(server.serve(sockets=[tls.listener]))
    looking = asyncio.create_task(keep_certified(server, tls))
    seen: dict[int, float] = {}
    begun = time.monotonic()
    try:
        async with httpx.AsyncClient(verify=trusted, trust_env=False, timeout=60) as staying:
            assert (await staying.get(tls.url)).text == "ok"
            while len(seen) < 2 or time.monotonic() - begun < lives_s + 1:
                assert time.monotonic() - begun < 60, seen
                # a handshake that trusts only what is signed and not over
                serial = await asyncio.to_thread(_serial_of, tls, trusted)
                seen.setdefault(serial, time.monotonic() - begun)
                assert (await staying.get(tls.url)).text == "ok"
                await asyncio.sleep(0.2)
    finally:
        looking.cancel()
        server.should_exit = True
        await serving
        home.leave()


def _serial_of(tls: TlsListener, trusted: ssl.SSLContext) -> int:
    with (
        socket.create_connection(tls.listener.getsockname()[:2], timeout=60) as plain,
        trusted.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        return x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"").serial_number
