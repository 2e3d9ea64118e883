"""What somebody with a browser waits for: first paints, and events until they stand on the page.

The browser is this machine's chromium, driven by playwright; pages are those of a manager that runs.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

_PAINT = "performance.getEntriesByName('first-contentful-paint').map(one => one.startTime)"
_NOTE_EVENTS = """() => {
    window.seen = {};
    const note = () => {
        for (const row of document.querySelectorAll("[data-key^=e]"))
            window.seen[row.dataset.key.slice(1)] ??= Date.now() / 1000;
    };
    note();
    window.there = new Set(Object.keys(window.seen));
    new MutationObserver(note).observe(document.body, { subtree: true, childList: true });
}"""
_NEWS = "Object.fromEntries(Object.entries(window.seen).filter(([seq]) => !window.there.has(seq)))"
_ENDED = "h1 .chip:has-text('finished'), h1 .chip:has-text('failed'), h1 .chip:has-text('stopped')"


class Person:
    """Somebody who is signed in; each page is opened with nothing cached."""

    def __init__(self, browser: Any, url: str) -> None:
        self._browser = browser
        self._url = url
        self._state: Any = None

    async def sign_in(self, token: str) -> None:
        page = await self._page()
        await page.goto("/login")
        await page.fill("#token", token)
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/")
        self._state = await page.context.storage_state()
        await page.context.close()

    async def first_paints(self, paths: Sequence[str]) -> list[float]:
        """Seconds from the beginning of a visit until anything is seen, path by path."""
        took = []
        for path in paths:
            page = await self._page()
            await page.goto(path)
            while not (painted := await page.evaluate(_PAINT)):
                await asyncio.sleep(0.02)  # the pages' policy leaves nothing that would tell
            took.append(float(painted[0]) / 1000)
            await page.context.close()
        return took

    async def watch(self, project: str, deadline_s: float = 600.0) -> dict[int, float]:
        """When each event that came while the page was open stood on it, by number; until the end."""
        page = await self._page()
        await page.goto(f"/projects/{project}/events?all=1")
        await page.evaluate(_NOTE_EVENTS)
        await page.wait_for_selector(_ENDED, timeout=deadline_s * 1000)
        seen = await page.evaluate(_NEWS)
        await page.context.close()
        return {int(seq): float(at) for seq, at in seen.items()}

    async def _page(self) -> Any:
        context = await self._browser.new_context(
            base_url=self._url, storage_state=self._state, viewport={"width": 1360, "height": 900}
        )
        return await context.new_page()


@asynccontextmanager
async def person(url: str, token: str) -> AsyncIterator[Person | None]:
    """Somebody with a browser; None: this machine has no chromium."""
    path = shutil.which("chromium")
    if path is None:
        yield None
        return
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        try:
            found = Person(browser, url)
            await found.sign_in(token)
            yield found
        finally:
            await browser.close()
