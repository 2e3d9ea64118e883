"""References are read by docker's rules, and what breaks them is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flops.core.errors import InvalidInputError
from flops.images.references import Reference, is_loopback, parse_place

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "host", "repository", "tag", "digest"),
    [
        ("python", "docker.io", "library/python", "latest", None),
        ("python:3.12-slim", "docker.io", "library/python", "3.12-slim", None),
        ("someone/thing", "docker.io", "someone/thing", "latest", None),
        ("index.docker.io/python", "docker.io", "library/python", "latest", None),
        ("localhost/a", "localhost", "a", "latest", None),
        ("localhost:5000/a/b:1", "localhost:5000", "a/b", "1", None),
        ("127.0.0.1:5000/a", "127.0.0.1:5000", "a", "latest", None),
        ("[::1]:5000/a", "[::1]:5000", "a", "latest", None),
        ("ghcr.io/o/r@" + DIGEST, "ghcr.io", "o/r", None, DIGEST),
        ("ghcr.io/o/r:v1@" + DIGEST, "ghcr.io", "o/r", "v1", DIGEST),
        ("Registry/a", "Registry", "a", "latest", None),
        ("a__b/c--d.e_f", "docker.io", "a__b/c--d.e_f", "latest", None),
    ],
)
def test_what_docker_understands_is_understood_the_same(
    text: str, host: str, repository: str, tag: str | None, digest: str | None
) -> None:
    reference = Reference.parse(text)
    assert (reference.host, reference.repository, reference.tag, reference.digest) == (
        host,
        repository,
        tag,
        digest,
    )
    assert Reference.parse(str(reference)) == reference


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "a//b",
        "A",
        "a/B",
        "host.example/",
        "a:",
        "a:b:c",
        "a@",
        "a@sha256:12",
        "a@md5:" + "0" * 64,
        "a" * 300,
        "a.-b",
        "a___b",
        "-a",
        "../a",
        "a/../b",
        "host:99999/a",
        "host:/a",
        "user@host/a",
        "http://host/a",
        "a b",
        "a\nb",
        "a\n",
        "ä",
        "a?x=1",
        "a%2e",
        "0" * 64,
        "a:" + "t" * 129,
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        Reference.parse(text)


@given(
    st.from_regex(r"[a-z0-9]{1,10}(\.[a-z]{1,5})?(:[1-9][0-9]{0,3})?", fullmatch=True),
    st.lists(st.from_regex(r"[a-z0-9]{1,8}([._-][a-z0-9]{1,4})?", fullmatch=True), min_size=1, max_size=4),
    st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True),
    st.none() | st.just(DIGEST),
)
def test_writing_and_reading_is_identity(
    host: str, path: list[str], tag: str | None, digest: str | None
) -> None:
    if "." not in host and ":" not in host:
        host = "localhost"
    reference = Reference(host, "/".join(path), tag if digest or tag else "latest", digest)
    assert Reference.parse(str(reference)) == reference


def test_a_place_for_images_is_a_registry_with_or_without_a_prefix() -> None:
    assert parse_place("registry.example:5000/team/flops/") == ("registry.example:5000", "team/flops")
    assert parse_place("127.0.0.1:5000") == ("127.0.0.1:5000", "")
    for text in ("", "http://registry.example", "registry.example/Team", "/team", "a b"):
        with pytest.raises(InvalidInputError):
            parse_place(text)


def test_another_tag_or_digest_of_the_same_repository() -> None:
    reference = Reference.parse("ghcr.io/o/r:v1")
    assert str(reference.with_tag("v2")) == "ghcr.io/o/r:v2"
    assert str(reference.with_digest(DIGEST)) == f"ghcr.io/o/r@{DIGEST}"
    assert reference.with_digest(DIGEST).target == DIGEST
    assert reference.target == "v1"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("localhost:5000", True),
        ("127.0.0.1:5000", True),
        ("127.9.9.9", True),
        ("[::1]:5000", True),
        ("docker.io", False),
        ("localhost.example", False),
        ("10.0.0.1:5000", False),
        ("127.0.0.1.example", False),
    ],
)
def test_only_this_machine_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
