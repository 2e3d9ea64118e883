"""Somebody with a browser without scripts: the pages over a stand-in of the API."""

import re
from collections.abc import Callable

import httpx
import pytest

from flops.web import Web
from tests.web.fake_api import FakeApi

ADDRESS = "http://127.0.0.1:8080"


class Visitor:
    """Signed in from the start."""

    def __init__(self, api: FakeApi, *, signed_in: bool = True) -> None:
        self.api = api
        self.web = Web()
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.web.beside(api)),
            base_url=ADDRESS,
            cookies={"flops-8080": api.token} if signed_in else {},
        )

    async def get(self, path: str) -> httpx.Response:
        return await self.http.get(path)

    async def csrf(self) -> str:
        found = re.search(r'data-csrf="([0-9a-f]{64})"', (await self.get("/users")).text)
        assert found
        return found[1]

    async def post(self, path: str, **fields: str) -> httpx.Response:
        return await self.http.post(path, data={"csrf": await self.csrf(), **fields})


@pytest.fixture
def visitor() -> Callable[..., Visitor]:
    return Visitor
