"""The client of registries: who asks, over which way, and how a transfer goes on after a break."""

import base64
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from flops.core.errors import (
    FailedError,
    InvalidInputError,
    NotFoundError,
    UnauthorizedError,
    UnavailableError,
)
from flops.images.credentials import Credentials, find_credentials
from flops.images.descriptor import OCI_LAYER_GZIP, Descriptor
from flops.images.registry import Registry
from flops.images.registry_connection import Answer, Connection
from flops.images.registry_service import collect_command, registry_command, registry_installed
from tests.conftest import Require
from tests.registries import (
    PASSWORD,
    USER,
    Asked,
    RegistryProcess,
    Reply,
    authority,
    free_port,
    htpasswd,
    running_registry,
    scripted,
)

MB = 1 << 20
GOOD = Credentials(USER, PASSWORD)
NO_PAUSES = (0.0, 0.0)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, require: Require) -> Iterator[RegistryProcess]:
    """A registry that knows one user."""
    require(registry_installed() is not None, "docker-registry")
    folder = tmp_path_factory.mktemp("guarded")
    with running_registry(folder, htpasswd=htpasswd(folder)) as process:
        yield process


def _blob(folder: Path, content: bytes) -> tuple[Descriptor, Path]:
    file = folder / "blob"
    file.write_bytes(content)
    return Descriptor(OCI_LAYER_GZIP, f"sha256:{hashlib.sha256(content).hexdigest()}", len(content)), file


def _configuration(folder: Path, value: Mapping[str, Any]) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(value))
    return {"DOCKER_CONFIG": str(folder), "PATH": f"{folder}:{os.defpath}"}


def _auth(username: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{username}:{password}".encode()).decode()}


def _helper(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    file = folder / f"docker-credential-{name}"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


# -- who asks


def test_a_registry_with_passwords_lets_in_who_knows_one(guarded: RegistryProcess, tmp_path: Path) -> None:
    blob, file = _blob(tmp_path, b"content")
    with Registry(guarded.host, GOOD) as registry:
        registry.ping()
        assert registry.send_blob("a/b", blob, file) == "sent"
        assert registry.has_blob("a/b", blob.digest)
    with (
        Registry(guarded.host, Credentials(USER, "wrong", "a test")) as registry,
        pytest.raises(
            UnauthorizedError, match=f"refuses the credentials of user '{USER}', from a test.*login"
        ),
    ):
        registry.send_blob("a/b", blob, file)
    with (
        Registry(guarded.host) as registry,
        pytest.raises(UnauthorizedError, match=r"wants credentials.*there are none.*docker login"),
    ):
        registry.ping()


def test_credentials_are_found_in_dockers_configuration(guarded: RegistryProcess, tmp_path: Path) -> None:
    environment = _configuration(tmp_path / "docker", {"auths": {guarded.host: _auth(USER, PASSWORD)}})
    with Registry.of_user(guarded.host, environment) as registry:
        registry.ping()


def test_credentials_are_asked_of_a_helper(guarded: RegistryProcess, tmp_path: Path) -> None:
    answer = json.dumps({"ServerURL": guarded.host, "Username": USER, "Secret": PASSWORD})
    for key, value in (("credHelpers", {guarded.host: "ours"}), ("credsStore", "ours")):
        folder = tmp_path / key
        _helper(folder, "ours", f'[ "$1" = get ] && [ "$(cat)" = {guarded.host} ] && echo \'{answer}\'')
        environment = _configuration(folder, {key: value, "auths": {guarded.host: {}}})
        with Registry.of_user(guarded.host, environment) as registry:
            registry.ping()


@pytest.mark.parametrize(
    ("host", "key"),
    [
        ("docker.io", "https://index.docker.io/v1/"),
        ("docker.io", "docker.io"),
        ("registry.example:5000", "registry.example:5000"),
        ("registry.example", "https://registry.example/v2/"),
    ],
)
def test_entries_are_found_under_all_names_that_docker_gives_them(
    tmp_path: Path, host: str, key: str
) -> None:
    environment = _configuration(tmp_path / "docker", {"auths": {key: _auth("u", "p:w")}})
    found = find_credentials(host, environment)
    assert found is not None
    assert (found.username, found.password) == ("u", "p:w")
    assert "p:w" not in repr(found)
    assert find_credentials("another.example", environment) is None


def test_the_file_named_by_the_environment_comes_first(tmp_path: Path) -> None:
    environment = _configuration(tmp_path / "docker", {"auths": {"x.example": _auth("docker", "1")}})
    file = tmp_path / "auth.json"
    file.write_text(json.dumps({"auths": {"x.example": {"identitytoken": "t", **_auth("podman", "")}}}))
    found = find_credentials("x.example", {**environment, "REGISTRY_AUTH_FILE": str(file)})
    assert found is not None
    assert (found.username, found.identity_token, found.source) == ("podman", "t", str(file))
    assert find_credentials("x.example", {"HOME": str(tmp_path)}) is None
    assert find_credentials("x.example", {}) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "does not hold a JSON object"),
        ({"auths": {"x.example": {"auth": "%%%"}}}, "entry of registry x.example .* broken"),
        ({"auths": {"x.example": {"auth": "bm8gY29sb24="}}}, "broken"),
        ({"auths": {"x.example": "text"}}, "broken"),
        ({"credHelpers": {"x.example": "../../bin/sh"}}, "cannot name a credential helper"),
        ({"credsStore": "not-installed"}, "docker-credential-not-installed, which is not on PATH"),
    ],
)
def test_broken_configurations_are_named(tmp_path: Path, value: Any, message: str) -> None:
    environment = _configuration(tmp_path / "docker", value)
    with pytest.raises(InvalidInputError, match=message):
        find_credentials("x.example", environment)


def test_a_helper_that_fails_or_has_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "docker"
    environment = _configuration(folder, {"credsStore": "ours"})
    _helper(folder, "ours", "echo credentials not found in native keychain; exit 1")
    assert find_credentials("x.example", environment) is None
    _helper(folder, "ours", "echo the keychain is locked >&2; exit 1")
    with pytest.raises(FailedError, match=r"the keychain is locked.*docker-credential-ours get"):
        find_credentials("x.example", environment)
    _helper(folder, "ours", "echo nonsense")
    with pytest.raises(FailedError, match="gave no credentials"):
        find_credentials("x.example", environment)
    _helper(folder, "ours", """echo '{"Username": "<token>", "Secret": "t"}'""")
    found = find_credentials("x.example", environment)
    assert found is not None
    assert found.identity_token == "t"


# -- tokens


class TokenService:
    """Gives tokens that a registry of ours believes, to whoever knows the password."""

    def __init__(self, life_s: int = 300, *, public: bool = False) -> None:
        self.public = public
        self.life_s = life_s
        self.given: dict[str, tuple[str, float]] = {}
        self.asked: list[Asked] = []

    def __call__(self, asked: Asked) -> Reply:
        if asked.path == "/token":
            self.asked.append(asked)
            wanted = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            if asked.method == "POST":
                form = asked.read(int(asked.headers["content-length"])).decode()
                allowed, scope = "refresh_token=forever" in form, form
            else:
                allowed = self.public or asked.headers.get("authorization") == wanted
                scope = " ".join(asked.query["scope"])
            if not allowed:
                return 401, {}, b'{"errors": [{"code": "UNAUTHORIZED", "message": "who are you"}]}'
            token = f"token-{len(self.asked)}"
            self.given[token] = (scope, time.monotonic() + self.life_s)
            return 200, {}, json.dumps({"token": token, "expires_in": self.life_s}).encode()
        scope, until = self.given.get(
            asked.headers.get("authorization", "").removeprefix("Bearer "), ("", 0.0)
        )
        if "a/b" in scope.replace("%2F", "/") and time.monotonic() < until:
            return 200, {"Docker-Content-Digest": "sha256:" + "0" * 64}, b""
        challenge = f'Bearer realm="http://{asked.headers["host"]}/token",service="here",scope="x"'
        return 401, {"WWW-Authenticate": challenge}, b""


def test_tokens_are_fetched_kept_and_renewed() -> None:
    service = TokenService()
    with scripted(service) as host, Registry(host, GOOD) as registry:
        for _ in range(3):
            assert registry.has_blob("a/b", "sha256:" + "0" * 64)
        assert len(service.asked) == 1
        assert service.asked[0].query == {"service": ["here"], "scope": ["repository:a/b:pull"]}
        service.given.clear()  # the registry forgets them early
        assert registry.has_blob("a/b", "sha256:" + "0" * 64)
        assert len(service.asked) == 2
        with pytest.raises(UnauthorizedError, match=f"denies user '{USER}'.*another repository"):
            registry.has_blob("c", "sha256:" + "0" * 64)


def test_public_images_need_a_token_and_no_password() -> None:
    service = TokenService(public=True)
    with scripted(service) as host, Registry(host) as registry:
        assert registry.has_blob("a/b", "sha256:" + "0" * 64)
        assert "authorization" not in service.asked[0].headers
        with pytest.raises(UnauthorizedError, match="there are none"):
            registry.has_blob("private", "sha256:" + "0" * 64)


def test_a_token_that_runs_out_is_renewed_before_it_is_refused() -> None:
    service = TokenService(life_s=1)
    with scripted(service) as host, Registry(host, GOOD) as registry:
        assert registry.has_blob("a/b", "sha256:" + "0" * 64)
        time.sleep(1.1)
        assert registry.has_blob("a/b", "sha256:" + "0" * 64)
        assert len(service.asked) == 2


def test_identity_tokens_are_exchanged_and_registry_tokens_taken_as_they_are() -> None:
    service = TokenService()
    with scripted(service) as host:
        with Registry(host, Credentials("", "", identity_token="forever")) as registry:
            assert registry.has_blob("a/b", "sha256:" + "0" * 64)
        assert service.asked[0].method == "POST"
        service.given["ready"] = ("a/b", time.monotonic() + 60)
        with Registry(host, Credentials("", "", registry_token="ready")) as registry:
            assert registry.has_blob("a/b", "sha256:" + "0" * 64)
        assert len(service.asked) == 1


def test_a_token_service_that_refuses_or_babbles() -> None:
    with (
        scripted(TokenService()) as host,
        Registry(host, Credentials(USER, "wrong")) as registry,
        pytest.raises(UnauthorizedError, match=f"refuses the credentials of user '{USER}'.*who are you"),
    ):
        registry.has_blob("a/b", "sha256:" + "0" * 64)

    def babbling(asked: Asked) -> Reply:
        if asked.path == "/token":
            return 200, {}, b'{"token": "with\\nline"}'
        return 401, {"WWW-Authenticate": f'Bearer realm="http://{asked.headers["host"]}/token"'}, b""

    with (
        scripted(babbling) as host,
        Registry(host, GOOD) as registry,
        pytest.raises(FailedError, match="gave no token"),
    ):
        registry.ping()


def test_debians_registry_behind_a_token_service_is_asked_for_the_right_scope(
    tmp_path: Path, require: Require
) -> None:
    """The challenge is the real registry's; tokens that it cannot check it refuses."""
    require(registry_installed() is not None, "docker-registry")
    made = authority(tmp_path)
    service = TokenService()
    blob, file = _blob(tmp_path, b"content")
    with scripted(service) as host:
        settings = {
            "REGISTRY_AUTH": "token",
            "REGISTRY_AUTH_TOKEN_REALM": f"http://{host}/token",
            "REGISTRY_AUTH_TOKEN_SERVICE": "the service",
            "REGISTRY_AUTH_TOKEN_ISSUER": "us",
            "REGISTRY_AUTH_TOKEN_ROOTCERTBUNDLE": str(made.certificate),
        }
        with (
            running_registry(tmp_path / "registry", extra=settings) as process,
            Registry(process.host, GOOD) as registry,
            pytest.raises(UnauthorizedError, match="denies user"),
        ):
            registry.send_blob("a/b", blob, file)
    assert service.asked[-1].query == {"service": ["the service"], "scope": ["repository:a/b:pull,push"]}


def test_a_password_is_told_to_no_service_without_tls() -> None:
    def answer(_: Asked) -> Reply:
        return 401, {"WWW-Authenticate": 'Bearer realm="ftp://elsewhere.example/token"'}, b""

    with (
        scripted(answer) as host,
        Registry(host, GOOD) as registry,
        pytest.raises(FailedError, match="not fit to be told a password"),
    ):
        registry.ping()


# -- the way


def test_credentials_do_not_follow_a_redirect_to_another_host(tmp_path: Path) -> None:
    content = b"content of a blob"
    blob, _ = _blob(tmp_path, content)
    seen: dict[str, list[str | None]] = {"registry": [], "store": []}

    def store(asked: Asked) -> Reply:
        seen["store"].append(asked.headers.get("authorization"))
        return 200, {}, content

    with scripted(store) as other:

        def registry_answer(asked: Asked) -> Reply:
            seen["registry"].append(asked.headers.get("authorization"))
            if "authorization" not in asked.headers:
                return 401, {"WWW-Authenticate": 'Basic realm="x"'}, b""
            return 307, {"Location": f"http://{other}/blob"}, b""

        got = bytearray()
        with scripted(registry_answer) as host, Registry(host, GOOD) as registry:
            registry.fetch_blob("a", blob, got.extend)
    assert bytes(got) == content
    assert seen["registry"][0] is None
    assert str(seen["registry"][1]).startswith("Basic ")
    assert seen["store"] == [None]


def test_another_host_that_asks_for_a_password_gets_none(tmp_path: Path) -> None:
    seen: list[str | None] = []

    def greedy(asked: Asked) -> Reply:
        seen.append(asked.headers.get("authorization"))
        return 401, {"WWW-Authenticate": 'Basic realm="give"'}, b""

    with (
        scripted(greedy) as other,
        scripted(lambda _: (302, {"Location": f"http://{other}/"}, b"")) as host,
        Registry(host, GOOD) as registry,
        pytest.raises(UnauthorizedError),
    ):
        registry.has_blob("a", "sha256:" + "0" * 64)
    assert seen == [None]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("/v2/around", "again and again"),
        ("", "no usable address"),
        ("file:///etc/passwd", "no usable address"),
        ("mailto:somebody", "not answer in HTTP"),
    ],
)
def test_redirects_lead_neither_in_a_circle_nor_out_of_http(location: str, message: str) -> None:
    with (
        scripted(lambda _: (302, {"Location": location}, b"")) as host,
        Registry(host) as registry,
        pytest.raises(FailedError, match=message),
    ):
        registry.has_blob("a", "sha256:" + "0" * 64)


def test_tls_with_an_authority_of_our_own(tmp_path: Path, require: Require) -> None:
    require(registry_installed() is not None, "docker-registry")
    made = authority(tmp_path)
    blob, file = _blob(tmp_path, b"content")
    certificate = (made.certificate, made.key)
    with running_registry(tmp_path / "registry", certificate=certificate) as process:
        with Registry(process.host, ca=made.ca) as registry:
            assert registry.send_blob("a", blob, file) == "sent"
        with (
            Registry(process.host, insecure=False) as registry,
            pytest.raises(
                FailedError, match=rf"certificate .* is not trusted: .*docker/certs.d/{process.host}/ca.crt"
            ),
        ):
            registry.ping()
        trusted = tmp_path / "home/.config/docker/certs.d" / process.host
        trusted.mkdir(parents=True)
        (trusted / "ca.crt").write_bytes(made.ca.read_bytes())
        with Registry.of_user(process.host, {"HOME": str(tmp_path / "home")}) as registry:
            assert registry.has_blob("a", blob.digest)
        with Registry(process.host) as registry, pytest.raises(FailedError, match="answers 400"):
            registry.ping()  # plain HTTP, as is usual on this machine
    with pytest.raises(InvalidInputError, match="PEM"):
        Registry("x.example", ca=tmp_path / "blob")


def test_plain_http_is_only_for_this_machine(guarded: RegistryProcess) -> None:
    with (
        Registry(guarded.host, insecure=False, pauses_s=()) as registry,
        pytest.raises(FailedError, match="does not speak TLS"),
    ):
        registry.ping()


def test_https_is_not_led_down_to_http() -> None:
    connection = Connection("registry.example")
    try:

        def next_of(location: str) -> str:
            url = connection.url("a/blobs/uploads/")
            return str(
                connection.location(Answer(202, httpx.Headers({"location": location}), b"", url), "it")
            )

        assert next_of("/v2/x") == "https://registry.example/v2/x"
        assert next_of("http://registry.example/v2/x") == "https://registry.example/v2/x"
        assert next_of("https://store.example/x") == "https://store.example/x"
        with pytest.raises(FailedError, match="plain HTTP, which is refused"):
            next_of("http://store.example/x")
    finally:
        connection.close()


# -- patience


def test_a_busy_registry_is_given_the_time_that_it_asks_for() -> None:
    answers: list[Reply] = [
        (429, {"Retry-After": "7"}, b""),
        (503, {}, b""),
        (429, {"Retry-After": "100000"}, b""),
        (200, {}, b""),
    ]
    pauses: list[float] = []
    with (
        scripted(lambda _: answers.pop(0)) as host,
        Registry(host, pauses_s=(1.0, 2.0, 4.0), sleep=pauses.append) as registry,
    ):
        registry.ping()
    assert pauses == [7.0, 2.0, 30.0]


def test_patience_ends() -> None:
    pauses: list[float] = []
    body = b'{"errors": [{"code": "UNAVAILABLE", "message": "service\\u001b[31m down"}]}'
    with (
        scripted(lambda _: (503, {}, body)) as host,
        Registry(host, pauses_s=(1.0, 2.0), sleep=pauses.append) as registry,
        pytest.raises(UnavailableError, match=r"answers 503 \(UNAVAILABLE service \[31m down\)"),
    ):
        registry.ping()
    assert pauses == [1.0, 2.0]


def test_a_registry_that_says_nothing_is_not_waited_for_without_end() -> None:
    def silent(_: Asked) -> Reply | None:
        time.sleep(0.5)
        return None

    with (
        scripted(silent) as host,
        Registry(host, silence_s=0.1, pauses_s=(0.0,)) as registry,
        pytest.raises(UnavailableError, match=r"broke over .*timed out"),
    ):
        registry.ping()


def test_what_is_no_registry_is_said_to_be_none() -> None:
    with (
        scripted(lambda _: (404, {}, b"<html>")) as host,
        Registry(host) as registry,
        pytest.raises(FailedError, match="not an image registry"),
    ):
        registry.ping()


# -- uploads that break


class Careful:
    """A registry that keeps every byte it got, breaks off when told, and takes what continues it only."""

    def __init__(self, breaks: list[int], *, lies: bool = False, whole_only: bool = False) -> None:
        self.breaks = breaks
        self.lies = lies
        self.whole_only = whole_only
        self.data = bytearray()
        self.sent = 0
        self.stored: bytes | None = None
        self.lock = threading.Lock()

    def __call__(self, asked: Asked) -> Reply | None:
        with self.lock:
            return self._answer(asked)

    def _answer(self, asked: Asked) -> Reply | None:
        here = {"Location": "/v2/a/blobs/uploads/1", "Range": f"0-{max(len(self.data) - 1, 0)}"}
        if asked.method == "POST":
            self.data.clear()
            return 202, {**here, "Range": "0-0"}, b""
        if asked.method == "GET":
            if self.lies:
                return 204, {**here, "Range": "0-999999999"}, b""
            return 204, here, b""
        if asked.method == "HEAD":
            return (404 if self.stored is None else 200), {}, b""
        if asked.method == "DELETE":
            return 204, {}, b""
        size = int(asked.headers.get("content-length", 0))
        start = asked.headers.get("content-range", f"{len(self.data) if not size else 0}-").partition("-")[0]
        if self.whole_only and asked.method == "PATCH":
            asked.read(size)
            return 405, {}, b'{"errors": [{"code": "UNSUPPORTED", "message": "no chunks"}]}'
        if int(start) != len(self.data):
            asked.read(size)
            return 416, here, b""
        left = size
        while left:
            piece = asked.read(min(left, 64 << 10))
            self.data += piece
            self.sent += len(piece)
            left -= len(piece)
            if self.breaks and len(self.data) >= self.breaks[0]:
                self.breaks.pop(0)
                return None
        here["Range"] = f"0-{len(self.data) - 1}"
        if asked.method == "PATCH":
            return 202, here, b""
        self.stored = bytes(self.data)
        return 201, {}, b""


@pytest.mark.parametrize("chunk_bytes", [MB, 64 * MB])
def test_only_the_rest_is_sent_after_a_break_in_the_middle_of_a_chunk(
    tmp_path: Path, chunk_bytes: int
) -> None:
    content = os.urandom(5 * MB)
    blob, file = _blob(tmp_path, content)
    careful = Careful([MB + 100_000, 3 * MB + 300_000, 4 * MB])
    with scripted(careful) as host, Registry(host, chunk_bytes=chunk_bytes, pauses_s=NO_PAUSES) as registry:
        assert registry.send_blob("a", blob, file) == "sent"
    assert careful.stored == content
    assert careful.sent == len(content)  # three breaks with two pauses: each had got further


def test_an_upload_that_never_gets_further_is_given_up(tmp_path: Path) -> None:
    blob, file = _blob(tmp_path, os.urandom(2 * MB))

    def breaking(asked: Asked) -> Reply | None:
        if asked.method == "POST":
            return 202, {"Location": "/v2/a/blobs/uploads/1"}, b""
        return None if asked.method in ("PUT", "PATCH") else (404, {}, b"")

    with (
        scripted(breaking) as host,
        Registry(host, chunk_bytes=MB, pauses_s=NO_PAUSES) as registry,
        pytest.raises(UnavailableError, match="broke over blob"),
    ):
        registry.send_blob("a", blob, file)


def test_a_registry_that_claims_more_than_was_sent_is_not_believed(tmp_path: Path) -> None:
    blob, file = _blob(tmp_path, os.urandom(2 * MB))
    with (
        scripted(Careful([MB // 2], lies=True)) as host,
        Registry(host, chunk_bytes=MB, pauses_s=NO_PAUSES) as registry,
        pytest.raises(FailedError, match="claims to have more"),
    ):
        registry.send_blob("a", blob, file)


def test_a_registry_without_chunks_gets_the_blob_in_one_request(tmp_path: Path) -> None:
    content = os.urandom(3 * MB)
    blob, file = _blob(tmp_path, content)
    careful = Careful([], whole_only=True)
    with scripted(careful) as host, Registry(host, chunk_bytes=MB) as registry:
        registry.send_blob("a", blob, file)
    assert careful.stored == content


def test_an_upload_whose_last_answer_was_lost_is_not_sent_again(tmp_path: Path) -> None:
    content = os.urandom(MB)
    blob, file = _blob(tmp_path, content)

    class Losing(Careful):
        def _answer(self, asked: Asked) -> Reply | None:
            if asked.method == "GET":
                return 404, {}, b""
            answer = super()._answer(asked)
            return None if asked.method == "PUT" else answer

    losing = Losing([])
    with scripted(losing) as host, Registry(host, pauses_s=NO_PAUSES) as registry:
        assert registry.send_blob("a", blob, file) == "sent"
    assert losing.sent == len(content)


def test_an_empty_blob_is_a_blob(guarded: RegistryProcess, tmp_path: Path) -> None:
    blob, file = _blob(tmp_path, b"")
    with Registry(guarded.host, GOOD) as registry:
        registry.send_blob("a/b", blob, file)
        registry.fetch_blob("a/b", blob, lambda piece: pytest.fail(f"there is {piece!r}"))


def test_downloads_go_on_where_they_broke_off(tmp_path: Path) -> None:
    content = os.urandom(3 * MB)
    blob, _ = _blob(tmp_path, content)
    starts: list[int] = []

    def cutting(asked: Asked) -> Reply:
        start = int(asked.headers.get("range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        starts.append(start)
        headers = {"Content-Length": str(len(content) - start)}
        body = content[start : start + MB]  # says more than it sends: the connection breaks
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return (206 if start else 200), {**headers, "Connection": "close"}, body

    got = bytearray()
    with scripted(cutting) as host, Registry(host, pauses_s=(0.0,)) as registry:
        registry.fetch_blob("a", blob, got.extend)
    assert bytes(got) == content
    assert starts == [0, MB, 2 * MB]


def test_a_registry_without_ranges_is_read_from_the_start_again(tmp_path: Path) -> None:
    content = os.urandom(3 * MB)
    blob, _ = _blob(tmp_path, content)
    lengths = [MB, 2 * MB, 3 * MB]

    def whole(_: Asked) -> Reply:
        return 200, {"Content-Length": str(len(content)), "Connection": "close"}, content[: lengths.pop(0)]

    got = bytearray()
    with scripted(whole) as host, Registry(host, pauses_s=(0.0,)) as registry:
        registry.fetch_blob("a", blob, got.extend)
    assert bytes(got) == content


def test_another_part_than_asked_for_is_refused(tmp_path: Path) -> None:
    content = os.urandom(MB)
    blob, _ = _blob(tmp_path, content)

    def wrong(asked: Asked) -> Reply:
        if "range" in asked.headers:
            return 206, {"Content-Range": "bytes 5-9/10"}, b"other"
        return 200, {"Content-Length": str(MB), "Connection": "close"}, content[:1000]

    with (
        scripted(wrong) as host,
        Registry(host, pauses_s=(0.0,)) as registry,
        pytest.raises(FailedError, match="another part"),
    ):
        registry.fetch_blob("a", blob, lambda _: None)


# -- the service


def test_the_service_keeps_its_folder_and_secret_private(tmp_path: Path, require: Require) -> None:
    require(registry_installed() is not None, "docker-registry")
    folder = tmp_path / "with: # odd" / "name"
    command, environment = registry_command(folder, "127.0.0.1", 5000)
    configuration = json.loads(Path(command[-1]).read_text())
    assert configuration["http"]["addr"] == "127.0.0.1:5000"
    assert "debug" not in configuration["http"]
    assert "secret" not in str(environment)
    assert folder.stat().st_mode & 0o077 == 0
    assert Path(command[-1]).stat().st_mode & 0o077 == 0
    again, _ = registry_command(folder, "::1", 5000)
    assert json.loads(Path(again[-1]).read_text())["http"]["secret"] == configuration["http"]["secret"]
    assert json.loads(Path(again[-1]).read_text())["http"]["addr"] == "[::1]:5000"
    assert collect_command(folder)[1] == "garbage-collect"
    with running_registry(folder) as process, Registry(process.host) as registry:
        registry.ping()
        with pytest.raises(NotFoundError, match="nothing/here:1 is not in image registry"):
            registry.manifest("nothing/here", "1")


def test_without_docker_registry_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(InvalidInputError, match="apt install docker-registry"):
        registry_command(tmp_path, "127.0.0.1", free_port())
