"""The GUI in a real browser, over a real manager that trains a real project."""

import json
import shutil
import statistics
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import ManagerProcess, wait_for

pytestmark = [pytest.mark.browser, pytest.mark.slow]

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "mnist-sklearn"
WCAG_AA = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1360, "height": 900}
PAGES = ["/", "/new", "/new?as=spec", "/models", "/models/digits", "/data", "/nodes", "/users", "/audit"]
TABS = ["", "/learners", "/events?all=1", "/logs", "/spec", "/lineage"]


@pytest.fixture(scope="module")
def chromium(require: Callable[[bool, str], None]) -> Iterator[Any]:
    path = shutil.which("chromium")
    require(path is not None, "chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


class Person:
    """Somebody with a browser, who notes what it complains about."""

    def __init__(self, chromium: Any, manager: ManagerProcess) -> None:
        self._chromium = chromium
        self.manager = manager
        self.complaints: list[str] = []
        self._contexts: list[Any] = []

    def page(self, *, signed_in: bool = True, **options: Any) -> Any:
        context = self._chromium.new_context(
            base_url=self.manager.url, **{"viewport": DESK, "reduced_motion": "reduce", **options}
        )
        self._contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on(
            "console",
            lambda told: self.complaints.append(told.text) if told.type in ("error", "warning") else None,
        )
        page.on(
            "request",
            lambda asked: (
                None if asked.url.startswith(self.manager.url) else self.complaints.append(asked.url)
            ),
        )
        if signed_in:
            page.goto("/login")
            page.fill("#token", self.manager.token)
            page.keyboard.press("Enter")
            page.wait_for_url("**/")
        return page

    def close(self) -> None:
        for context in self._contexts:
            context.close()


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagerProcess]:
    manager = ManagerProcess(tmp_path_factory.mktemp("web") / "home").start()
    yield manager
    manager.end()


@pytest.fixture
def person(chromium: Any, manager: ManagerProcess) -> Iterator[Person]:
    person = Person(chromium, manager)
    yield person
    person.close()


@pytest.fixture(scope="module")
def finished(chromium: Any, manager: ManagerProcess) -> str:
    """A project that was submitted with the form and watched to its end; how quick that was is checked."""
    person = Person(chromium, manager)
    page = person.page()
    page.goto("/new")
    page.fill("[name=repo]", str(EXAMPLE))
    page.fill("[name=name]", "digits")
    page.select_option("[name='data.mock.dataset']", "digits")
    page.fill("[name='training.rounds']", "none")
    page.wait_for_selector("[name='training.rounds'][aria-invalid=true]")
    assert "whole number" in page.inner_text("[id='problem-training.rounds']")
    page.fill("[name='training.rounds']", "30")
    page.wait_for_selector("[name='training.rounds']:not([aria-invalid])")
    page.wait_for_selector("#region-preview .chip.ok")
    page.click("text=Start the project")
    page.wait_for_url("**/projects/p-*")
    page.evaluate(
        """() => {
            window.seen = {};
            new MutationObserver(() => {
                for (const row of document.querySelectorAll("#region-rounds tbody tr"))
                    window.seen[row.dataset.key] ??= Date.now() / 1000;
            }).observe(document.body, { subtree: true, childList: true });
        }"""
    )
    page.wait_for_selector("h1 .chip:has-text('finished')", timeout=180_000)
    project = str(page.url).rpartition("/projects/")[2].partition("?")[0]
    ended = {
        f"r{event['data']['round']}": event["time"]
        for event in manager.client().get(f"/v1/projects/{project}/events").json()["events"]
        if event["kind"] == "round.finished"
    }
    seen = page.evaluate("window.seen")
    late = sorted(seen[key] - ended[key] for key in ended if key in seen)
    print(f"event to page: median {statistics.median(late):.2f} s, longest {late[-1]:.2f} s of {len(late)}")
    assert len(late) >= 25
    # A second, where nobody else wants the processors; tests share theirs.
    assert statistics.median(late) < 1.0
    assert page.locator("#region-topology use.state-done").count() >= 4
    assert page.locator(".chart .line").count() >= 3
    assert page.locator("[aria-label='Pipeline'] .stage.done").count() == 6
    assert person.complaints == []
    person.close()
    return project


def check(page: Any) -> list[str]:
    """What axe finds against WCAG 2.2 AA."""
    page.evaluate((HERE / "axe" / "axe.min.js").read_text())
    found = page.evaluate("tags => axe.run(document, {runOnly: tags})", WCAG_AA)
    return [
        f"{page.url}: {one['id']}: {one['help']}: {one['nodes'][0]['html'][:200]}"
        for one in found["violations"]
    ]


@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pages_are_accessible_and_fit(
    person: Person, finished: str, theme: str, viewport: dict[str, int]
) -> None:
    page = person.page(color_scheme=theme, viewport=viewport)
    paths = [*PAGES, f"/compare?id={finished}", *(f"/projects/{finished}{tab}" for tab in TABS)]
    problems = []
    for path in paths:
        page.goto(path)
        problems += check(page)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if wide > 0:
            problems.append(f"{path} is {wide} px too wide")
    page.goto(f"/projects/{finished}")
    page.click("text=Extend…")
    problems += check(page)
    assert not problems, "\n".join(problems)
    assert person.complaints == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_signing_in_and_errors_are_accessible(person: Person, theme: str) -> None:
    page = person.page(signed_in=False, color_scheme=theme)
    page.goto("/login")
    problems = check(page)
    page.fill("#token", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("[role=alert]")
    problems += check(page)
    assert not problems, "\n".join(problems)


def test_pages_are_painted_within_a_second(person: Person, finished: str) -> None:
    state = person.page().context.storage_state()
    took = []
    for path in [*PAGES, f"/projects/{finished}"]:
        page = person.page(signed_in=False, storage_state=state)  # nothing is cached
        page.goto(path)
        wait_for(lambda page=page: bool(_painted(page)), f"paint of {path}")  # type: ignore[misc]
        took.append((_painted(page), path))
        page.context.close()
    print(f"first paint: median {statistics.median(ms for ms, _ in took):.0f} ms, slowest {max(took)}")
    assert statistics.median(ms for ms, _ in took) < 1000


def _painted(page: Any) -> float:
    found = page.evaluate("performance.getEntriesByName('first-contentful-paint').map(one => one.startTime)")
    return float(found[0]) if found else 0.0


def test_the_keyboard_suffices(person: Person, finished: str) -> None:
    page = person.page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("g")
    page.keyboard.press("m")
    page.wait_for_url("**/models")
    page.keyboard.press("/")
    page.keyboard.type("no such model")
    wait_for(lambda: page.locator("#models-table tbody tr:visible").count() == 0, "the filter")
    page.keyboard.press("Escape")
    page.locator("body").click(position={"x": 900, "y": 700})
    page.keyboard.press("?")
    page.wait_for_selector("#keys[open]")
    page.keyboard.press("Escape")
    page.goto(f"/projects/{finished}")
    page.locator("text=Extend…").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#ask-extend:popover-open")
    page.keyboard.press("Escape")
    wait_for(lambda: not page.locator("#ask-extend").is_visible(), "the question to close")
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.textContent.trim().slice(0, 20)"))
    assert {"Overview", "Learners", "Lineage", "Deploy…"} <= seen
    assert person.complaints == []


def test_what_is_typed_and_opened_stays_while_the_page_changes(person: Person, finished: str) -> None:
    page = person.page()
    page.goto(f"/projects/{finished}/learners")
    page.fill("[data-filter=learners-table]", "learner-2")
    wait_for(lambda: page.locator("#learners-table tbody tr:visible").count() == 1, "the filter")
    page.evaluate("document.documentElement.dataset.updated = ''")
    post(person.manager, f"/v1/projects/{finished}/extend", {"rounds": 2})
    page.wait_for_selector("h1 .chip:has-text('training')", timeout=60_000)
    page.wait_for_selector("h1 .chip:has-text('finished')", timeout=120_000)
    assert page.input_value("[data-filter=learners-table]") == "learner-2"
    assert page.evaluate("document.activeElement.dataset.filter") == "learners-table"
    assert page.locator("#learners-table tbody tr:visible").count() == 1
    assert person.complaints == []


def test_everything_but_liveness_works_without_scripts(person: Person, finished: str) -> None:
    page = person.page(java_script_enabled=False)
    page.goto(f"/projects/{finished}")
    assert page.locator(".chart").count() >= 3
    page.click("text=Lineage")
    assert "commit" in page.inner_text(".lineage")
    page.goto("/new?as=spec")
    page.fill("#f-spec", "repo: ''")
    page.click("text=Start the project")
    assert "not submitted" in page.inner_text(".alert.bad")
    page.click("[aria-label='Dark theme']")
    assert page.locator("html[data-theme=dark]").count() == 1
    page.goto("/")
    page.click("[aria-label='Sign out']")
    page.wait_for_url("**/login")


def test_an_address_of_flops_web_signs_in_once(person: Person) -> None:
    def address() -> str:
        answer = person.manager.client().post("/login/codes")
        return f"/login#{answer.json()['code']}"

    page = person.page(signed_in=False)
    once = address()
    page.goto(once)
    page.wait_for_url("**/")
    page.wait_for_selector("h1:has-text('Projects')")
    other = person.page(signed_in=False)
    other.goto(once)
    other.wait_for_selector("[role=alert]:has-text('used before')")
    assert "#" not in other.url


def test_a_page_goes_on_when_the_manager_comes_back(person: Person, finished: str) -> None:
    page = person.page()
    page.goto(f"/projects/{finished}")
    person.manager.kill()
    page.wait_for_selector(".away", timeout=20_000)
    person.manager.start()
    page.wait_for_selector(".away", state="detached", timeout=20_000)
    assert page.inner_text("h1 .chip").strip() == "finished"


def post(manager: ManagerProcess, path: str, body: Any) -> None:
    request = urllib.request.Request(
        manager.url + path,
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {manager.token}", "Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=60).close()
