import datetime
import ipaddress
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flops.core.errors import ConflictError, InvalidInputError, UnavailableError
from flops.data import DataClient, unix_location
from flops.data.listening import check_listen, prepare_socket
from tests.data.conftest import TOKEN, StartServer


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key, as PEM files."""
    folder.mkdir(exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "flops test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths


def test_tls_serves_those_who_trust_its_certificate(
    tmp_path: Path, start_data_server: StartServer, table: pa.Table
) -> None:
    certificate, key = write_certificate(tmp_path / "server")
    stranger, _ = write_certificate(tmp_path / "stranger")
    options = ["--listen", "grpc+tls://127.0.0.1:0"]
    options += ["--tls-cert", str(certificate), "--tls-key", str(key)]
    server = start_data_server(*options)
    unix, tls = server.locations
    assert tls.startswith("grpc+tls://127.0.0.1:")
    with DataClient(tls, TOKEN, tls_ca=certificate) as client, DataClient(unix, TOKEN) as local:
        fragment = client.put(table, ["t"])
        assert client.get(fragment.id).equals(table)
        assert local.list() == [fragment]
    with (
        DataClient(tls, TOKEN, tls_ca=stranger) as client,
        pytest.raises(UnavailableError, match="check the location and its certificate"),
    ):
        client.ping()
    with (
        DataClient(tls.replace("+tls", ""), TOKEN) as plain,
        pytest.raises(UnavailableError, match="no data server answers"),
    ):
        plain.ping()


def test_plain_tcp_is_for_loopback_only(start_data_server: StartServer) -> None:
    server = start_data_server("--listen", "grpc://127.0.0.1:0", unix=False)
    with DataClient(server.location, TOKEN) as client:
        assert client.ping().fragments == 0
    for host in ("0.0.0.0", "192.0.2.1", "[::]", "example.org"):
        with pytest.raises(InvalidInputError, match=r"would send data unencrypted - use grpc.tls"):
            check_listen(f"grpc://{host}:0")


@pytest.mark.parametrize(
    "location", ["", "127.0.0.1:0", "http://127.0.0.1:0", "grpc+tls://x", "grpc+tls://x:99999", "grpc://["]
)
def test_locations_that_cannot_be_listened_on_are_refused(location: str) -> None:
    with pytest.raises(InvalidInputError, match=r"cannot listen on .* - use grpc.tls://HOST:PORT"):
        check_listen(location)


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        location = f"grpc://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConflictError, match=f"cannot listen on '{location}': Address already in"):
            check_listen(location)


def test_a_socket_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(InvalidInputError, match=r"'.*open' is open to other users - run 'chmod 700'"):
        prepare_socket(folder / "s")


def test_a_socket_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is longer than 107 bytes - use a shorter one"):
        prepare_socket(tmp_path / ("x" * 108))


def test_a_socket_left_by_a_killed_server_is_taken_over_and_a_living_one_is_not(
    new_home: Callable[[], Path],
) -> None:
    path = new_home() / "run" / "s p%ce.sock"
    assert prepare_socket(path) == unix_location(path)
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        living.listen()
        with pytest.raises(ConflictError, match="another server listens on"):
            prepare_socket(path)
    assert path.exists()
    assert prepare_socket(path) == unix_location(path)


def test_a_path_with_odd_characters_can_be_served(
    new_home: Callable[[], Path], start_data_server: StartServer
) -> None:
    home = new_home() / "ü %41 #?"
    home.mkdir(mode=0o700)
    server = start_data_server(home=home)
    assert (home / "run" / "data.sock").is_socket()
    with DataClient(server.location, TOKEN) as client:
        assert client.ping().fragments == 0
    with DataClient(unix_location(home / "run" / "data.sock"), TOKEN) as client:
        assert client.ping().fragments == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the data server has nowhere to listen - give --socket or --listen"),
        (["--listen", "grpc://0.0.0.0:0"], "would send data unencrypted"),
        (["--listen", "grpc+tls://127.0.0.1:0"], "needs --tls-cert and --tls-key"),
        (["--listen", "grpc+tls://127.0.0.1:0", "--tls-cert", "x"], "go together"),
        (
            ["--listen", "grpc+tls://127.0.0.1:0", "--tls-cert", "/none", "--tls-key", "/none"],
            "the TLS file '/none' cannot be read (No such file or directory) - check its path",
        ),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(
    tmp_path: Path, options: list[str], message: str
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    token_file.chmod(0o600)
    command = [sys.executable, "-m", "flops.data.server", "--root", str(tmp_path / "data")]
    done = subprocess.run(
        [*command, "--token-file", str(token_file), *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_location_that_makes_no_sense_is_the_callers_error() -> None:
    with pytest.raises(InvalidInputError, match="'nonsense' is no location of a data server"):
        DataClient("nonsense", TOKEN)


def test_a_missing_certificate_is_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"the certificate file '.*ca.pem' cannot be read"):
        DataClient("grpc+tls://127.0.0.1:1", TOKEN, tls_ca=tmp_path / "ca.pem")
