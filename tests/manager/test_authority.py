"""The authority's certificates, in real TLS handshakes."""

import socket
import ssl
import threading
from pathlib import Path

import pytest

from flops.core.settings import Settings
from flops.manager.authority import Authority
from flops.manager.home import claim_home


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
