"""Every page over a stand-in of the API: what it shows, to whom, and what it never does."""

import asyncio
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.web.conftest import Visitor
from tests.web.fake_api import HOSTILE, FakeApi, empty, full, project

PROJECT = "/projects/p-7k2mqd"
TABS = [PROJECT] + [f"{PROJECT}/{tab}" for tab in ("learners", "events?all=1", "logs", "spec", "lineage")]
PAGES = ["/", "/new", "/new?as=spec", "/new?from=p-7k2mqd", "/models", "/data", "/nodes", "/users", "/audit"]
PAGES += ["/compare", "/compare?id=p-7k2mqd", *TABS]
NewVisitor = Callable[..., Visitor]


class Found(HTMLParser):
    """What a page holds that the policy would have to stop: scripts and styles inside it, things from
    elsewhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []

    @classmethod
    def of(cls, text: str) -> "Found":
        found = cls()
        found.feed(text)
        return found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        wrong = [name for name in given if name.startswith("on") or name == "style"]
        wrong += [
            name
            for name in ("src", "href", "action")
            if re.match("(https?:)?//|[a-z]+:", given.get(name) or "")
        ]
        if wrong or (tag == "script" and "src" not in given) or tag in ("style", "iframe", "object", "base"):
            self.problems.append(f"{tag} {attrs}")


def run(work: Any) -> Any:
    return asyncio.run(work)


@pytest.mark.parametrize("path", [*PAGES, "/models/scans"])
def test_every_page_is_whole_and_tells_browsers_to_be_careful(visitor: NewVisitor, path: str) -> None:
    answer: httpx.Response = run(visitor(full()).get(path))
    assert answer.status_code == 200, answer.text
    assert answer.text.rstrip().endswith("</html>")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert Found.of(answer.text).problems == []


@pytest.mark.parametrize("path", [*PAGES, f"/models/{quote(HOSTILE, safe='')}"])
def test_text_from_outside_is_only_text(visitor: NewVisitor, path: str) -> None:
    api = full(HOSTILE)
    answer: httpx.Response = run(visitor(api).get(path))
    assert answer.status_code in (200, 404)
    assert Found.of(answer.text).problems == []
    assert "<script>alert" not in answer.text
    assert "\x1b" not in answer.text


@pytest.mark.parametrize("path", ["/", "/models", "/data", "/nodes", "/compare", "/users", "/audit"])
def test_an_empty_page_says_what_to_do_next(visitor: NewVisitor, path: str) -> None:
    answer: httpx.Response = run(visitor(empty()).get(path))
    assert answer.status_code == 200
    if path not in ("/users", "/audit"):
        assert "<code>" in answer.text, "a command"
    assert 'class="empty"' in answer.text or "nothing" in answer.text


@pytest.mark.parametrize("path", [*PAGES, f"{PROJECT}/stream", f"{PROJECT}/spec.json", "/models/x/1/archive"])
def test_nobody_sees_anything_without_signing_in(visitor: NewVisitor, path: str) -> None:
    api = full()
    answer: httpx.Response = run(visitor(api, signed_in=False).get(path))
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/login")
    assert api.asked == []


def test_a_token_that_was_revoked_leads_to_signing_in_and_is_forgotten(visitor: NewVisitor) -> None:
    api = full()
    who = visitor(api)
    api.token = "another"
    answer: httpx.Response = run(who.get(PROJECT))
    assert answer.status_code == 303
    assert answer.headers["location"] == "/login?next=%2Fprojects%2Fp-7k2mqd"
    assert 'flops-8080=""' in answer.headers["set-cookie"]


def test_signing_in_keeps_the_token_where_no_script_reads_it(visitor: NewVisitor) -> None:
    who = visitor(full(), signed_in=False)

    async def work() -> httpx.Response:
        refused = await who.http.post("/login", data={"token": "wrong", "next": "/models"})
        assert refused.status_code == 401
        assert "set-cookie" not in refused.headers
        return await who.http.post("/login", data={"token": "good-token", "next": "/models"})

    answer = run(work())
    assert (answer.status_code, answer.headers["location"]) == (303, "/models")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "path=/" in cookie
    assert "good-token" not in answer.text


@pytest.mark.parametrize(
    "there", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:x", "/\\/x", "x"]
)
def test_signing_in_leads_to_no_other_site(visitor: NewVisitor, there: str) -> None:
    who = visitor(full(), signed_in=False)
    answer = run(who.http.post("/login", data={"token": "good-token", "next": there}))
    assert answer.headers["location"] == "/"


def test_a_code_signs_in_once(visitor: NewVisitor) -> None:
    who = visitor(full(), signed_in=False)

    async def work() -> None:
        nobody = await who.http.post("/login/codes", headers={"Authorization": "Bearer wrong"})
        assert nobody.status_code == 401
        issued = await who.http.post("/login/codes", headers={"Authorization": "Bearer good-token"})
        code = issued.json()["code"]
        first = await who.http.post("/login", data={"code": code, "token": ""})
        assert first.status_code == 303
        assert "good-token" in first.headers["set-cookie"]
        assert (await who.http.post("/login", data={"code": code, "token": ""})).status_code == 401

    run(work())


def test_signing_out_forgets_the_token(visitor: NewVisitor) -> None:
    answer = run(visitor(full()).post("/logout"))
    assert answer.headers["location"] == "/login"
    assert 'flops-8080=""' in answer.headers["set-cookie"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
@pytest.mark.parametrize("path", [f"{PROJECT}/stop", "/login", "/theme", "/users", "/logout"])
def test_a_form_of_another_site_does_nothing(visitor: NewVisitor, headers: dict[str, str], path: str) -> None:
    api = full()
    who = visitor(api)

    async def work() -> httpx.Response:
        fields = {"csrf": await who.csrf(), "token": "good-token"}
        return await who.http.post(path, data=fields, headers=headers)

    answer = run(work())
    assert answer.status_code == 403
    assert api.changes() == []
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("csrf", ["", "0" * 64, "ä"])
def test_a_form_without_the_sessions_own_value_does_nothing(visitor: NewVisitor, csrf: str) -> None:
    api = full()
    answer = run(visitor(api).http.post(f"{PROJECT}/stop", data={"csrf": csrf}))
    assert answer.status_code == 403
    assert api.changes() == []


@pytest.mark.parametrize(
    ("action", "fields", "asked"),
    [
        ("stop", {}, ("POST", "/v1/projects/p-7k2mqd/stop", None)),
        ("pause", {}, ("POST", "/v1/projects/p-7k2mqd/pause", None)),
        ("resume", {}, ("POST", "/v1/projects/p-7k2mqd/resume", None)),
        ("retry", {}, ("POST", "/v1/projects/p-7k2mqd/retry", None)),
        ("extend", {"rounds": "7"}, ("POST", "/v1/projects/p-7k2mqd/extend", {"rounds": 7})),
        ("deploy", {}, ("PUT", "/v1/projects/p-7k2mqd/deployment", None)),
        ("undeploy", {}, ("DELETE", "/v1/projects/p-7k2mqd/deployment", None)),
        ("delete", {}, ("DELETE", "/v1/projects/p-7k2mqd", None)),
    ],
)
def test_a_button_asks_the_api_once_in_the_persons_name(
    visitor: NewVisitor, action: str, fields: dict[str, str], asked: tuple[str, str, Any]
) -> None:
    api = full()
    api.answers[f"{asked[0]} {asked[1]}"] = project()
    answer = run(visitor(api).post(f"{PROJECT}/{action}", **fields))
    assert answer.status_code == 303
    assert api.changes() == [asked]
    assert {token for *_, token in api.asked} == {"good-token"}


def test_what_the_api_refuses_is_told_in_its_words(visitor: NewVisitor) -> None:
    api = full()
    api.problem("POST /v1/projects/p-7k2mqd/stop", 409, "it is finished <b>already</b>")
    answer = run(visitor(api).post(f"{PROJECT}/stop"))
    assert answer.status_code == 409
    assert "it is finished &lt;b&gt;already&lt;/b&gt;" in answer.text


def test_projects_of_others_are_not_there(visitor: NewVisitor) -> None:
    api = full()
    api.problem("GET /v1/projects/p-7k2mqd", 404, "there is no project p-7k2mqd")
    for path in (PROJECT, f"{PROJECT}/stream", f"{PROJECT}/events", "/compare?id=p-7k2mqd"):
        assert run(visitor(api).get(path)).status_code == 404


def test_a_picture_that_was_made_for_one_is_not_shown_to_another(visitor: NewVisitor) -> None:
    api = full()
    who = visitor(api)

    async def work() -> int:
        assert (await who.get(PROJECT)).status_code == 200
        api.problem("GET /v1/projects/p-7k2mqd/events", 404, "there is no project p-7k2mqd")
        return (await who.get(PROJECT)).status_code

    assert run(work()) == 404


def test_a_path_of_the_page_cannot_reach_another_route_of_the_api(visitor: NewVisitor) -> None:
    api = full()
    who = visitor(api)
    run(who.post("/users/..%2Faudit%2Fverify", role="admin"))
    assert all("/../" not in path and path != "/v1/audit/verify" for _, path, *_ in api.asked)
    assert run(who.get("/projects/..%2Fme")).status_code == 404


@pytest.mark.parametrize("name", ["nonsense", "p-", "p-7k2mqd%0a", "..", "P-7K2MQD"])
def test_what_is_no_project_is_not_found(visitor: NewVisitor, name: str) -> None:
    who = visitor(full())
    assert run(who.get(f"/projects/{name}")).status_code in (200, 404)  # ".." is the list
    assert run(who.post(f"/projects/{name}/stop")).status_code in (404, 405)
    assert run(who.get(f"/compare?id={name}")).status_code == 404
    assert who.api.changes() == []


def test_pages_of_what_the_api_does_not_have_explain_themselves(visitor: NewVisitor) -> None:
    api = full()
    for name in ("users", "tokens", "audit"):
        del api.answers[f"GET /v1/{name}"]
    assert "Ask an admin" in run(visitor(api).get("/users")).text
    assert "Ask an admin" in run(visitor(api).get("/audit")).text


def test_what_one_may_not_do_is_not_offered(visitor: NewVisitor) -> None:
    api = full()
    api.answers["GET /v1/me"] |= {"scopes": ["projects:read", "data:read"]}
    assert "Stop…" not in run(visitor(api).get(PROJECT)).text
    assert "/new" not in run(visitor(api).get("/")).text
    assert 'href="/audit"' not in run(visitor(api).get("/")).text
    assert "/delete" not in run(visitor(api).get("/data")).text


def test_whoever_sees_no_projects_begins_with_the_data(visitor: NewVisitor) -> None:
    api = full()
    api.answers["GET /v1/me"] |= {"scopes": ["data:read"]}
    assert run(visitor(api).get("/")).headers["location"] == "/data"


def test_what_is_refused_leaves_the_way_to_other_pages_open(visitor: NewVisitor) -> None:
    api = full()
    api.problem("GET /v1/projects", 403, "you may not")
    answer = run(visitor(api).get("/projects"))
    assert answer.status_code == 403
    assert "you may not" in answer.text
    assert 'href="/data"' in answer.text


def test_an_unknown_page_says_so(visitor: NewVisitor) -> None:
    answer = run(visitor(full()).get("/nowhere"))
    assert answer.status_code == 404
    assert "there is no page" in answer.text


def test_the_files_of_a_model_pass_through(visitor: NewVisitor) -> None:
    api = full()
    parts = [b"a" * 100_000, b"b" * 100_000]
    api.answers["GET /v1/models/m/versions/1/archive"] = lambda _: (200, iter(parts))
    answer = run(visitor(api).get("/models/m/1/archive"))
    assert answer.content == b"".join(parts)
    assert answer.headers["content-disposition"] == 'attachment; filename="m-1.tar"'


def test_a_new_token_is_shown_once_and_in_no_address(visitor: NewVisitor) -> None:
    api = full()
    api.answers["POST /v1/tokens"] = (201, {"name": "ci", "user": "ada", "token": "flops_secret"})
    answer = run(visitor(api).post("/tokens", name="ci", expires_s="86400"))
    assert answer.status_code == 200
    assert "flops_secret" in answer.text
    assert api.changes() == [("POST", "/v1/tokens", {"name": "ci", "expires_s": 86400})]


def test_a_form_becomes_a_spec(visitor: NewVisitor) -> None:
    api = full()
    api.answers["POST /v1/projects"] = (201, project())
    fields = {
        "repo": "https://example.org/r",
        "data": "tags",
        "data.tags": "scans, x , ",
        "data.mock.dataset": "mnist",
        "mode": "hierarchical",
        "training.clusters.count": "3",
        "training.cycles": "2",
        "training.rounds": "4",
        "training.strategy.name": "FedAdam",
        "training.strategy.parameters": "eta=0.01\nbeta_1=1",
        "deploy_trained_model_image": "on",
    }
    answer = run(visitor(api).post("/new", **fields))
    assert answer.headers["location"].startswith(PROJECT)
    ((_, _, body),) = api.changes()
    assert body["spec"] == {
        "repo": "https://example.org/r",
        "training": {
            "mode": "hierarchical",
            "strategy": {"name": "FedAdam", "parameters": {"eta": 0.01, "beta_1": 1}},
            "rounds": 4,
            "cycles": 2,
            "clusters": {"count": 3},
        },
        "data": {"tags": ["scans", "x"]},
        "post_training_steps": ["deploy_trained_model_image"],
    }


def test_a_project_can_be_a_teams(visitor: NewVisitor) -> None:
    api = full()
    api.answers["GET /v1/me"]["teams"] = ["red", "blue"]
    api.answers["GET /v1/projects/p-7k2mqd"] = project(team="red")
    api.answers["POST /v1/projects"] = (201, project())
    who = visitor(api)
    offered = re.findall('<option value="([a-z]*)"( selected)?>(?:team|nobody)', run(who.get("/new")).text)
    assert offered == [("", ""), ("blue", ""), ("red", "")]
    again = run(who.get("/new?from=p-7k2mqd")).text
    assert '<option value="red" selected>' in again
    run(who.post("/new", repo="r", team="red"))
    run(who.post("/new", repo="r", team=""))
    teams = [body.get("team") for _, _, body in api.changes()]
    assert teams == ["red", None]
    api.answers["GET /v1/me"]["teams"] = []
    assert 'name="team"' not in run(who.get("/new")).text


def test_a_form_that_is_refused_comes_back_with_its_values_and_what_is_wrong(visitor: NewVisitor) -> None:
    api = full()
    api.problem("POST /v1/projects", 422, "wrong")
    answer = run(visitor(api).post("/new", repo="my-repo", **{"training.rounds": "many"}))
    assert answer.status_code == 422
    assert 'value="my-repo"' in answer.text
    assert 'value="many"' in answer.text
    assert re.search(r'id="problem-training\.rounds"[^>]*>scans<', answer.text)


def test_a_spec_as_text_is_sent_as_it_is(visitor: NewVisitor) -> None:
    api = full()
    api.answers["POST /v1/projects"] = (201, project())
    run(visitor(api).post("/new", spec="repo: r\ntraining: {rounds: 2}\n"))
    assert api.changes() == [("POST", "/v1/projects", {"spec": {"repo": "r", "training": {"rounds": 2}}})]
    answer = run(visitor(api).post("/new", spec="a: b: c"))
    assert answer.status_code == 422
    assert "not valid YAML" in answer.text


def test_the_theme_stays_chosen(visitor: NewVisitor) -> None:
    async def work() -> str:
        who = visitor(full())
        await who.http.post("/theme", data={"theme": "dark", "next": "/models"})
        return (await who.get("/models")).text

    assert '<html lang="en" data-theme="dark">' in run(work())


def test_static_files_are_kept_by_browsers_under_their_digest(visitor: NewVisitor) -> None:
    async def work() -> None:
        who = visitor(full())
        page = (await who.get("/")).text
        for path in re.findall(r'(?:href|src)="(/static/[^"]+)"', page):
            answer = await who.get(path)
            assert answer.status_code == 200
            assert "immutable" in answer.headers["cache-control"]
        assert (await who.get("/static/../app.py")).status_code == 404

    run(work())


def test_licences_stand_beside_what_others_made() -> None:
    import flops.web

    static = Path(flops.web.__file__).parent / "static"
    assert "SIL OPEN FONT LICENSE" in (static / "inter.LICENSE.txt").read_text().upper()


def test_nothing_is_asked_of_the_api_by_a_foreign_token_holder(visitor: NewVisitor) -> None:
    api = FakeApi(token="x")
    who = visitor(api, signed_in=False)
    assert run(who.http.post("/login", data={"token": "bad token with spaces"})).status_code == 401
    assert api.asked == [("GET", "/v1/oidc", None, "")]  # who else one could sign in with


def test_machines_that_joined_are_shown_with_what_their_owners_allow(visitor: NewVisitor) -> None:
    api = full()
    page = run(visitor(api).get("/nodes")).text
    assert "away" in page
    assert "last seen" in page
    assert "and 1 more" in page  # of nine tags, and of five owners
    none_yet = run(visitor(empty()).get("/nodes")).text
    assert "flops node token" not in none_yet  # first of all there has to be any machine
    (orchestrators, _) = api.answers["GET /v1/nodes"]["nodes"]
    api.answers["GET /v1/nodes"] = {"nodes": [orchestrators]}
    assert "flops node token clinic-north" in run(visitor(api).get("/nodes")).text
