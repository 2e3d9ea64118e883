"""Signing in at a certified provider of OpenID Connect, in a real browser over a real manager."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import ManagerProcess
from tests.issuers import SECRET, RealIssuer
from tests.web.test_browser import DESK, PHONE, check, chromium

__all__ = ["chromium"]  # a fixture

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.network]


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory, real_issuer: RealIssuer) -> Iterator[ManagerProcess]:
    folder = tmp_path_factory.mktemp("web")
    (folder / "secret").write_text(SECRET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOPS_OIDC_ISSUER", real_issuer.url)
        patch.setenv("FLOPS_OIDC_CLIENT_ID", "flops")
        patch.setenv("FLOPS_OIDC_CLIENT_SECRET_FILE", str(folder / "secret"))
        manager = ManagerProcess(folder / "home").start()
    yield manager
    manager.end()


def ours(context: Any) -> list[Any]:
    """Cookies that are not the provider's, which is on the same host."""
    return [cookie for cookie in context.cookies() if cookie["name"].startswith("flops-")]


def say_yes(page: Any, person: str) -> None:
    """At the provider: who one is, and that we may know."""
    page.wait_for_selector("[name=login]")
    page.fill("[name=login]", person)
    page.fill("[name=password]", "any")
    page.click("[type=submit]")
    page.wait_for_selector("[name=prompt][value=consent]", state="attached")
    page.click("[type=submit]")


def test_somebody_signs_in_comes_back_to_where_they_were_and_out_again(
    chromium: Any, manager: ManagerProcess, real_issuer: RealIssuer, tmp_path: Path
) -> None:
    admin = manager.client()
    admin.post("/v1/users", json={"name": "ann@example.org", "teams": ["vision"]}).raise_for_status()
    real_issuer.know({"sub-1": {"email": "ann@example.org", "email_verified": True}})
    context = chromium.new_context(base_url=manager.url, viewport=DESK, reduced_motion="reduce")
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto("/models?page=1")
    assert page.url.endswith("/login?next=%2Fmodels%3Fpage%3D1")
    page.screenshot(path=tmp_path / "login.png")
    assert check(page) == []
    page.click("text=Sign in with 127.0.0.1")
    say_yes(page, "sub-1")
    page.wait_for_url("**/models?page=1")
    assert page.inner_text(".me-name").strip() == "ann@example.org"
    (cookie,) = ours(context)
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert cookie["value"].startswith("flops_")
    page.goto("/users")
    assert "sign-in with 127.0.0.1" in page.inner_text("section[aria-label=Tokens]")
    assert check(page) == []
    page.click("[aria-label='Sign out']")
    page.wait_for_url("**/login")
    assert manager.client(cookie["value"]).get("/v1/me").status_code == 401
    assert complaints == []
    told = [entry["action"] for entry in admin.get("/v1/audit?user=ann@example.org").json()["entries"]]
    assert (told[0], told[-1]) == ("POST /v1/oidc/finish", "DELETE /v1/tokens/{id}")
    context.close()


def test_who_may_not_come_in_is_told_on_the_page(
    chromium: Any, manager: ManagerProcess, real_issuer: RealIssuer, tmp_path: Path
) -> None:
    real_issuer.know({"sub-2": {"email": "eve@example.org", "email_verified": True}})
    context = chromium.new_context(base_url=manager.url, viewport=PHONE, color_scheme="dark")
    page = context.new_page()
    page.goto("/login")
    page.click("text=Sign in with 127.0.0.1")
    say_yes(page, "sub-2")
    page.wait_for_selector("[role=alert]")
    assert "nobody has added eve@example.org here" in page.inner_text("[role=alert]")
    page.screenshot(path=tmp_path / "refused.png")
    assert check(page) == []
    assert ours(context) == []
    page.reload()
    assert "No sign-in was begun in this browser" in page.inner_text("[role=alert]")
    context.close()


def test_nobody_is_signed_in_as_somebody_else_by_a_link(
    chromium: Any, manager: ManagerProcess, real_issuer: RealIssuer
) -> None:
    """Another's code and state, in a browser that began nothing, or something else."""
    real_issuer.know({"sub-3": {"email": "eve@example.org", "email_verified": True}})
    back = f"{manager.url}/login/oidc"
    begun = manager.client("").post("/v1/oidc/begin", json={"redirect_uri": back}).json()
    returned = real_issuer.come_back(begun["url"], "sub-3")
    context = chromium.new_context(base_url=manager.url)
    page = context.new_page()
    for _ in range(2):
        page.goto(f"/login/oidc?code={returned['code']}&state={returned['state']}")
        assert "begin again" in page.inner_text("[role=alert]")
        page.goto("/login")
        page.click("text=Sign in with 127.0.0.1")  # and does not go through with it
        page.wait_for_selector("[name=login]")
    assert [cookie["name"][-5:] for cookie in ours(context)] == ["-oidc"]
    context.close()
