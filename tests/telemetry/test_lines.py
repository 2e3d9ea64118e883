import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flops.core import tokens
from flops.telemetry import JsonLines, about, belongs, parse, readable, said, without_credentials

TOKEN = f"flops_0123456789ab_{'S' * 43}"


def written(message: str, *arguments: object, error: BaseException | None = None) -> str:
    info = (type(error), error, error.__traceback__) if error is not None else None
    record = logging.LogRecord("flops.x", logging.WARNING, __file__, 1, message, arguments, info)
    return JsonLines().format(record)


def test_a_line_carries_the_facts_of_its_moment() -> None:
    with about(project="p-abcd", learner="learner-1", round=7, request="r1"):
        line = json.loads(written("said %s", "so"))
    assert line["time"][10] == "T"
    assert line["time"].endswith("Z")
    assert {key: line[key] for key in ("level", "logger", "message", "project", "learner", "round")} == {
        "level": "warning",
        "logger": "flops.x",
        "message": "said so",
        "project": "p-abcd",
        "learner": "learner-1",
        "round": 7,
    }
    assert "project" not in json.loads(written("nobody's"))


@given(st.text())
def test_whatever_is_said_stays_one_line_that_reads_back(text: str) -> None:
    line = written("%s", text)
    assert "\n" not in line
    assert line.isascii()
    if without_credentials(text) == text:
        assert said(line) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot clone https://me:pw@host/r.git", "cannot clone https://***@host/r.git"),
        ("postgresql://u:p%40@db:5432/x is away", "postgresql://***@db:5432/x is away"),
        (f"no such token {TOKEN}", "no such token flops_0123456789ab_***"),
        ("Authorization: Bearer abcdef0123456789abcd", "Authorization: Bearer ***"),
        ("GET https://host/x?a=1&token=abc&b=2", "GET https://host/x?a=1&token=***&b=2"),
        ("git@host:me/repo stays", "git@host:me/repo stays"),
        ("https://host/a@b stays", "https://host/a@b stays"),
        ("the bearer certificates", "the bearer certificates"),
    ],
)
def test_credentials_are_left_out(text: str, shown: str) -> None:
    assert said(written("%s", text)) == shown


def test_credentials_are_left_out_of_tracebacks_too() -> None:
    try:
        raise OSError(f"401 for {TOKEN}")
    except OSError as error:
        line = written("failed", error=error)
    assert "SSSS" not in line
    assert "OSError: 401 for flops_0123456789ab_***" in json.loads(line)["traceback"]


@pytest.mark.parametrize("prefix", [tokens.USER, tokens.JOIN, tokens.NODE])
def test_tokens_of_every_kind_are_left_out(prefix: str) -> None:
    number, text = tokens.make(prefix)
    assert said(written("%s", f"no such token {text}")) == f"no such token {prefix}_{number}_***"


def test_a_long_message_is_cut() -> None:
    assert len(written("%s", "x" * 1_000_000)) < 20_000


@pytest.mark.parametrize(
    "text", ["", "printed", "{", '{"time": 3, "message": "x"}', '{"time"', '["time"]', '{"time"' + "[" * 9999]
)
def test_what_others_print_stays_as_it_is(text: str) -> None:
    assert parse(text) is None
    assert said(text) == text
    assert readable(text) == text
    assert not belongs(text, request="r")


def test_a_line_is_readable() -> None:
    with about(request="r1"):
        line = written("too late")
    assert readable(line)[12:] == "  warning: too late"
    assert belongs(line, request="r1")
    assert not belongs(line, request="r1", project="p-abcd")
