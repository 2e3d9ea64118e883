"""Streams of a page's regions, and calls within the process."""

import asyncio
import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from flops.web.call import Api, RefusedError
from flops.web.live import changes
from tests.web.fake_api import FakeApi

REQUEST: Any = SimpleNamespace(
    scope={"type": "http", "headers": [(b"host", b"127.0.0.1")], "client": ("::1", 1)}
)


def test_only_regions_that_changed_are_sent_and_at_once() -> None:
    regions = {"a": "1", "b": '<time data-ago="5">1 s ago</time>'}

    async def work() -> list[str]:
        woken, closing = asyncio.Event(), asyncio.Event()

        async def render() -> Mapping[str, str]:
            return dict(regions)

        messages = changes(render, woken, closing, look_s=30.0)
        found = [await anext(messages), await anext(messages)]
        regions.update(a="2", b='<time data-ago="5">2 s ago</time>')
        woken.set()
        found.append(await asyncio.wait_for(anext(messages), 1.0))
        closing.set()
        async for message in messages:
            found.append(message)
        return found

    _, first, second = asyncio.run(work())
    assert json.loads(first.removeprefix("data: "))["regions"].keys() == {"a", "b"}
    assert json.loads(second.removeprefix("data: ")) == {"regions": {"a": "2"}}


def test_a_stream_ends_where_the_right_to_see_does() -> None:
    async def work() -> list[str]:
        async def render() -> Mapping[str, str]:
            raise RefusedError(401, "unauthorized", "revoked")

        return [one async for one in changes(render, asyncio.Event(), asyncio.Event())]

    assert asyncio.run(work())[-1].startswith("event: reload")


def test_a_stream_waits_where_too_much_was_asked() -> None:
    told = [RefusedError(429, "too-many-requests", "slower"), None]

    async def work() -> list[str]:
        async def render() -> Mapping[str, str]:
            if error := told.pop(0):
                raise error
            return {"a": "1"}

        messages = changes(render, asyncio.Event(), asyncio.Event(), look_s=0.01)
        return [await anext(messages) for _ in range(3)]

    assert "regions" in asyncio.run(work())[-1]


def test_a_stream_of_the_api_ends_for_the_api_when_its_reader_leaves() -> None:
    ended = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        finally:
            ended.set()

    async def work() -> None:
        async with Api(endless, "t", REQUEST).open("GET", "x") as answer:
            assert await anext(answer.body) == b"x"
        await asyncio.wait_for(ended.wait(), 1.0)

    asyncio.run(work())


def test_what_the_api_does_after_its_answer_is_left_to_end() -> None:
    done = []

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 202, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})
        await asyncio.sleep(0.01)
        done.append(1)

    asyncio.run(Api(slow, "t", REQUEST).send("POST", "x"))
    assert done == [1]


def test_half_an_answer_does_not_look_like_a_whole_one() -> None:
    async def breaks(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}", "more_body": True})
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        asyncio.run(Api(breaks, "t", REQUEST).get("x"))


def test_the_api_hears_the_browsers_address_and_host_and_the_persons_token() -> None:
    heard: dict[str, Any] = {}
    fake = FakeApi({"GET /v1/a/b c": {"ok": True}}, token="t")

    async def listening(scope: Scope, receive: Receive, send: Send) -> None:
        heard.update(scope)
        await fake(scope, receive, send)

    assert asyncio.run(Api(listening, "t", REQUEST).get("a", "b c", q=["x", "y"], no=None)) == {"ok": True}
    assert heard["client"] == ("::1", 1)
    assert dict(heard["headers"])[b"host"] == b"127.0.0.1"
    assert heard["query_string"] == b"q=x&q=y"
    assert heard["raw_path"] == b"/v1/a/b%20c"


def test_a_refusal_is_told_with_its_status_and_words() -> None:
    with pytest.raises(RefusedError, match="is not there") as caught:
        asyncio.run(Api(FakeApi(token="t"), "t", REQUEST).get("nothing"))
    assert caught.value.status == 404
    assert asyncio.run(Api(FakeApi(token="t"), "t", REQUEST).find("nothing")) is None
