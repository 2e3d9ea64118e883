"""Writes the pictures of docs/gui: ``python -m tests.web.screenshots``, with a manager running.

It looks at whatever the manager of this FLOPS_HOME has; `docs/gui.md` names what was there.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

OUT = Path(__file__).parents[2] / "docs" / "gui"
DESK, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
_COLOURS = 256


def main() -> None:
    home = Path(os.environ["FLOPS_HOME"])
    url = str(json.loads((home / "manager.json").read_text())["url"])
    token = (home / "token").read_text().strip()
    OUT.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser: Any = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for theme, viewport, suffix in (
            ("light", DESK, ""),
            ("dark", DESK, "-dark"),
            ("light", PHONE, "-phone"),
        ):
            page = browser.new_context(base_url=url, viewport=viewport, color_scheme=theme).new_page()
            page.goto("/login")
            if not suffix:
                _take(page, "login")
            page.fill("#token", token)
            page.keyboard.press("Enter")
            page.wait_for_url("**/")
            _take(page, f"projects{suffix}")
            ids = [link.get_attribute("href").rpartition("/")[2] for link in page.locator(".row-link").all()]
            page.goto(f"/projects/{ids[0]}")
            _take(page, f"project{suffix}", full=True)
            if suffix == "-phone":
                continue
            page.goto(f"/compare?id={ids[-1]}&id={ids[-2]}")
            _take(page, f"compare{suffix}")
            if suffix:
                continue
            for tab in ("learners", "events", "logs", "spec", "lineage"):
                page.goto(f"/projects/{ids[0]}/{tab}")
                _take(page, f"project-{tab}")
            for name in ("new", "models", "data", "nodes", "users", "audit"):
                page.goto(f"/{name}")
                if name == "new":
                    page.fill("[name=repo]", "https://example.org/you/your-repo")
                    page.fill("[name='training.rounds']", "0")
                    page.wait_for_selector("[aria-invalid=true]")
                _take(page, name)
            page.goto("/models")
            page.click("#models-table .row-link")
            page.wait_for_selector(".facts")
            _take(page, "model")
        browser.close()


def _take(page: Any, name: str, *, full: bool = False) -> None:
    from PIL import Image

    page.wait_for_timeout(400)
    path = OUT / f"{name}.png"
    page.screenshot(path=path, full_page=full)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(_COLOURS).save(path, optimize=True)


if __name__ == "__main__":
    main()
