"""MLflow behind the manager's sign-in: a real MLflow over what a real recorder wrote for several users."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flops.core.ids import ProjectId
from flops.tracking import (
    ArtifactExported,
    ModelExported,
    RegisteredModel,
    Result,
    RoundMetrics,
    RunEnded,
    RunStarted,
    Spool,
    recorder_command,
    tracking_environment,
)
from tests.api.conftest import ManagerProcess, wait_for

AUDIENCES = {
    "p-alice1": "user:alice",
    "p-bobby1": "user:bob",
    "p-vision1": "team:vision",
    "p-legacy1": "",  # made before there were audiences
}
READ = "/mlflow/ajax-api/2.0/mlflow"


@dataclass
class House:
    """A manager, the runs of several users, and their tokens."""

    manager: ManagerProcess
    results: dict[str, Result]
    tokens: dict[str, str]

    def client(self, user: str) -> httpx.Client:
        return self.manager.client(self.tokens[user])


def _secret_of(project: str) -> str:
    return f"secret-of-{project}"


def _record(home: Path) -> dict[str, Result]:
    """The same family and model name for everybody, written by a recorder."""
    spool = Spool(home / "spool")
    for project, audience in AUDIENCES.items():
        secret = _secret_of(project)
        file = home / f"{secret}.txt"
        file.write_text(secret)
        model = home / f"exported-{project}"
        model.mkdir()
        (model / "MLmodel").write_text("flavors: {}\n")
        (model / "told.txt").write_text(secret)
        spool.append(
            ProjectId(project),
            RunStarted(
                time=1.0, experiment="family", name=secret, params={"told": secret}, audience=audience
            ),
            RoundMetrics(time=2.0, step=1, metrics={secret: 0.5}),
            ArtifactExported(time=3.0, round=1, file=str(file)),
            ModelExported(
                time=4.0,
                round=1,
                name="digits",
                directory=str(model),
                tags={"told": secret},
                audience=audience,
            ),
            RunEnded(time=5.0, status="FINISHED"),
        )
    command = recorder_command(spool.directory, f"sqlite:///{home / 'mlflow.db'}", home / "mlartifacts")
    recorder = subprocess.Popen(command, env={**os.environ, **tracking_environment()}, cwd=home)

    def is_done(project: str) -> bool:
        result = spool.result(ProjectId(project))
        return result is not None and result.status == "FINISHED"

    try:
        wait_for(lambda: all(map(is_done, AUDIENCES)), "the recorder", 120.0)
    finally:
        recorder.kill()
        recorder.wait()
    found = {project: spool.result(ProjectId(project)) for project in AUDIENCES}
    for project in AUDIENCES:
        spool.remove(ProjectId(project))
    return {project: result for project, result in found.items() if result is not None}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    home = tmp_path_factory.mktemp("behind") / "home"
    home.mkdir(mode=0o700)
    results = _record(home)
    manager = ManagerProcess(home).start()
    admin = manager.client()
    users: dict[str, dict[str, Any]] = {
        "alice": {"role": "engineer"},
        "bob": {"role": "engineer"},
        "carla": {"role": "engineer", "teams": ["vision"]},
        "audrey": {"role": "auditor"},
        "dan": {"role": "data-owner"},
    }
    tokens = {"admin": manager.token}
    for name, what in users.items():
        admin.post("/v1/users", json={"name": name, **what}).raise_for_status()
        made = admin.post("/v1/tokens", json={"name": "test", "user": name}).raise_for_status()
        tokens[name] = made.json()["token"]
    # The first question starts MLflow, which takes its time.
    assert admin.get("/mlflow/version", timeout=120.0).raise_for_status().text
    yield House(manager, results, tokens)
    manager.end()


@pytest.fixture
def alices(house: House) -> Result:
    return house.results["p-alice1"]


def _questions(result: Result, experiment: str) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Every way to ask for something of a run, each of which tells its secret to whoever may see it."""
    assert result.model is not None
    run, number = result.run_id, result.experiment_id
    model, version, logged = result.model.name, str(result.model.version), result.model.model_id
    secret = _secret_of(result.project)
    graph = "query Q($id: String!) { mlflowGetRun(input: {runId: $id}) { run { info { runName } } } }"
    searched = (
        "query Q($ids: [String!]) { mlflowSearchRuns(input: {experimentIds: $ids})"
        " { runs { info { runName } modelVersions { name } } } }"
    )
    return {
        "search experiments": ("GET", f"{READ}/experiments/search", {"params": {"max_results": "100"}}),
        "search experiments by post": ("POST", f"{READ}/experiments/search", {"json": {"max_results": 100}}),
        "experiment": ("GET", f"{READ}/experiments/get", {"params": {"experiment_id": number}}),
        "experiment by name": (
            "GET",
            f"{READ}/experiments/get-by-name",
            {"params": {"experiment_name": experiment}},
        ),
        "run": ("GET", f"{READ}/runs/get", {"params": {"run_id": run}}),
        "run by its old name": ("GET", f"{READ}/runs/get", {"params": {"run_uuid": run}}),
        "search runs": ("POST", f"{READ}/runs/search", {"json": {"experiment_ids": [number]}}),
        "history": (
            "GET",
            f"{READ}/metrics/get-history",
            {"params": {"run_id": run, "metric_key": secret}},
        ),
        "histories": (
            "GET",
            f"{READ}/metrics/get-history-bulk",
            {"params": {"run_id": run, "metric_key": secret}},
        ),
        "intervals": (
            "GET",
            f"{READ}/metrics/get-history-bulk-interval",
            {"params": {"run_ids": run, "metric_key": secret, "max_results": "10"}},
        ),
        "artifacts": ("GET", f"{READ}/artifacts/list", {"params": {"run_id": run}}),
        "artifact": (
            "GET",
            "/mlflow/get-artifact",
            {"params": {"run_id": run, "path": f"{secret}.txt"}},
        ),
        "search models": ("GET", f"{READ}/registered-models/search", {}),
        "model": ("GET", f"{READ}/registered-models/get", {"params": {"name": model}}),
        "latest versions": (
            "POST",
            f"{READ}/registered-models/get-latest-versions",
            {"json": {"name": model}},
        ),
        "search versions": ("GET", f"{READ}/model-versions/search", {}),
        "search versions of the run": (
            "GET",
            f"{READ}/model-versions/search",
            {"params": {"filter": f"run_id = '{run}'"}},
        ),
        "version": (
            "GET",
            f"{READ}/model-versions/get",
            {"params": {"name": model, "version": version}},
        ),
        "where a version is": (
            "GET",
            f"{READ}/model-versions/get-download-uri",
            {"params": {"name": model, "version": version}},
        ),
        "artifact of a version": (
            "GET",
            "/mlflow/model-versions/get-artifact",
            {"params": {"name": model, "version": version, "path": "told.txt"}},
        ),
        "logged model": ("GET", f"{READ}/logged-models/{logged}", {}),
        "search logged models": (
            "POST",
            f"{READ}/logged-models/search",
            {"json": {"experiment_ids": [number]}},
        ),
        "files of a logged model": (
            "GET",
            f"{READ}/logged-models/{logged}/artifacts/directories",
            {},
        ),
        "file of a logged model": (
            "GET",
            f"{READ}/logged-models/{logged}/artifacts/files",
            {"params": {"artifact_file_path": "told.txt"}},
        ),
        "graph": ("POST", "/mlflow/graphql", {"json": {"query": graph, "variables": {"id": run}}}),
        "graph of runs": (
            "POST",
            "/mlflow/graphql",
            {"json": {"query": searched, "variables": {"ids": [number]}}},
        ),
    }


def _tells(answer: httpx.Response, result: Result) -> bool:
    """Whether an answer holds anything that only those know who see the run."""
    asked = answer.request.url.query.decode() + answer.request.content.decode()
    mark = _secret_of(result.project)
    audience = AUDIENCES[result.project]
    ids = {str(result.run_id), str(result.model and result.model.model_id)}
    if answer.request.url.path.endswith(("/get-artifact", "/artifacts/files")):
        return answer.text == mark
    return (
        '"value": 0.5' in answer.text
        or '"value":0.5' in answer.text
        or any(told in answer.text for told in {mark, audience, *ids} if told not in asked)
    )


QUESTIONS = tuple(
    _questions(
        Result(project="p-nobody1", model=RegisteredModel(name="", version=1, uri="", model_id="", round=0)),
        "",
    )
)


def _ask(house: House, user: str, result: Result, question: str) -> httpx.Response:
    method, path, options = _questions(result, "family")[question]
    return house.client(user).request(method, path, **options)


@pytest.mark.parametrize("question", QUESTIONS)
def test_runs_and_models_are_seen_by_whom_they_belong_to(house: House, question: str) -> None:
    alices, visions = house.results["p-alice1"], house.results["p-vision1"]
    for user in ("alice", "audrey", "admin"):
        answer = _ask(house, user, alices, question)
        assert answer.is_success
        assert _tells(answer, alices), answer.text
    for user in ("bob", "carla"):
        answer = _ask(house, user, alices, question)
        assert not _tells(answer, alices), answer.text
    if question != "experiment by name":  # the team's has a longer name
        assert _tells(_ask(house, "carla", visions, question), visions)
        assert not _tells(_ask(house, "alice", visions, question), visions)


def test_a_name_that_another_took_is_made_longer(house: House) -> None:
    listed = house.client("admin").get(f"{READ}/experiments/search", params={"max_results": "100"}).json()
    names = {experiment["name"] for experiment in listed["experiments"]}
    assert names == {"Default", "family", "family (bob)", "family (team vision)", "family (earlier)"}


def test_a_team_is_left_at_once(house: House) -> None:
    admin, visions = house.client("admin"), house.results["p-vision1"]
    admin.patch("/v1/users/bob", json={"teams": ["vision"]}).raise_for_status()
    assert _tells(_ask(house, "bob", visions, "run"), visions)
    admin.patch("/v1/users/bob", json={"teams": []}).raise_for_status()
    assert not _tells(_ask(house, "bob", visions, "run"), visions)


@pytest.mark.parametrize(
    "twist",
    [
        {"params": {"run_id": "{bob}", "run_uuid": "{alice}"}},
        {"params": [("run_id", "{bob}"), ("run_id", "{alice}")]},
        {"params": {"run_id": "", "run_uuid": "{alice}"}},
        {"json": {"run_id": "{alice}"}},
        {"params": {"run_id": "{bob}"}, "json": {"run_id": "{alice}"}},
        {"params": {"run_id": "{alice}"}, "headers": {"x-flops-audiences": "*"}},
        {"params": {"run_id": "{alice}"}, "headers": {"x-http-method-override": "POST"}},
        {"params": {"run_id": "{alice}"}, "headers": {"x-mlflow-workspace": "default"}},
    ],
)
def test_twisted_questions_tell_nothing(house: House, twist: dict[str, Any]) -> None:
    alices, bobs = house.results["p-alice1"], house.results["p-bobby1"]

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [(key, filled(inner)) for key, inner in value]
        return value.format(alice=alices.run_id, bob=bobs.run_id)

    answer = house.client("bob").request("GET", f"{READ}/runs/get", **filled(twist))
    assert _secret_of("p-alice1") not in answer.text


def test_what_mlflow_serves_beyond_reading_is_closed_to_everybody(house: House) -> None:
    code = "import json; from mlflow.server import app; from mlflow.server.auth import create_app; "
    code += "create_app(app); rules = app.url_map.iter_rules(); "
    code += "print(json.dumps([(rule.rule, sorted(rule.methods)) for rule in rules]))"
    environment = {
        **os.environ,
        **tracking_environment(),
        "_MLFLOW_STATIC_PREFIX": "/mlflow",
        "MLFLOW_AUTH_ADMIN_PASSWORD": "long enough, and of no use",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "x",
    }
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=house.manager.home,
        capture_output=True,
        text=True,
        check=True,
    )
    rules = [tuple(rule) for rule in json.loads(told.stdout.splitlines()[-1])]
    assert len(rules) > 200
    auditor, open_ = house.client("audrey"), set()
    for rule, methods in rules:
        path = re.sub(r"<[^>]*>", "1", rule)
        for method in set(methods) - {"OPTIONS", "HEAD"}:
            answer = auditor.request(method, path)
            if not re.search("is not served here|changed by admins alone", answer.text):
                open_.add((method, path.removeprefix("/mlflow")))
    changing = re.compile(
        "create|delete|update|log-|set-|restore|upload|gateway|webhook|user|role|job|scorer"
    )
    assert {found for found in open_ if changing.search(found[1])} == set()
    assert len(open_) < 60


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", f"{READ}/runs/create"),
        ("POST", f"{READ}/model-versions/create"),
        ("POST", f"{READ}/experiments/create"),
        ("GET", f"{READ}/users/list"),
        ("POST", "/mlflow/ajax-api/3.0/mlflow/webhooks"),
        ("POST", "/mlflow/ajax-api/3.0/mlflow/assistant/message"),
        ("POST", "/mlflow/v1/traces"),
        ("GET", "/mlflow/health"),
        ("HEAD", f"{READ}/runs/get"),
        ("GET", "/mlflow/static-files/../health"),
        ("GET", "/mlflow/static-files/%2e%2e/%2e%2e/server/auth/basic_auth.ini"),
        ("GET", f"{READ}/runs/get%3f"),
        ("GET", "/mlflow//get-artifact"),
        ("GET", "/mlflow/api/2.0/mlflow-artifacts/artifacts"),
    ],
)
def test_admins_find_it_closed_too(house: House, method: str, path: str) -> None:
    answer = house.client("admin").request(method, path)
    assert answer.status_code == 404


def test_nobody_comes_in_without_sign_in(house: House) -> None:
    manager = house.manager
    nobody = manager.client("")
    assert nobody.get(f"{READ}/experiments/search").status_code == 401
    assert nobody.get("/mlflow/static-files/favicon.ico").status_code == 401
    assert manager.client("flops_000000000000_x").get("/mlflow/version").status_code == 401
    visit = nobody.get("/mlflow/", headers={"accept": "text/html,*/*"})
    assert (visit.status_code, visit.headers["location"]) == (303, "/login?next=%2Fmlflow%2F")
    owner = house.client("dan").get("/mlflow/version")
    assert (owner.status_code, owner.json()["code"]) == (403, "forbidden")
    made = house.client("alice").post("/v1/tokens", json={"name": "few", "scopes": ["projects:read"]})
    assert manager.client(made.json()["token"]).get("/mlflow/version").status_code == 403


def test_whoever_is_signed_in_with_a_browser_sees_it_from_our_own_pages_alone(house: House) -> None:
    browser = house.manager.client("")
    port = browser.base_url.port
    browser.headers["cookie"] = f"flops-{port}={house.tokens['alice']}; other=1"
    page = browser.get("/mlflow/", headers={"accept": "text/html"})
    assert "<title>MLflow</title>" in page.text
    policy = page.headers["content-security-policy"]
    assert f"connect-src {house.manager.url}/mlflow/;" in policy
    assert "set-cookie" not in page.headers
    own = {"origin": f"http://127.0.0.1:{port}", "sec-fetch-site": "same-origin"}
    wanted: dict[str, Any] = {"json": {"max_results": 5}}
    assert browser.post(f"{READ}/experiments/search", headers=own, **wanted).is_success
    for foreign in (
        {"origin": "https://evil.example", "sec-fetch-site": "cross-site"},
        {"origin": f"http://localhost:{port}"},
        {"sec-fetch-site": "same-site"},
    ):
        assert browser.post(f"{READ}/experiments/search", headers=foreign, **wanted).status_code == 403


def test_artifacts_run_no_scripts(house: House, alices: Result) -> None:
    answer = _ask(house, "alice", alices, "artifact")
    assert answer.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"


def test_admins_change_and_are_audited(house: House, alices: Result) -> None:
    change = {"run_id": alices.run_id, "key": "note", "value": "good"}
    refused = house.client("alice").post(f"{READ}/runs/set-tag", json=change)
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    admin = house.client("admin")
    admin.post(f"{READ}/runs/set-tag", json=change).raise_for_status()
    tags = _ask(house, "alice", alices, "run").json()["run"]["data"]["tags"]
    assert {"key": "note", "value": "good"} in tags
    newest = admin.get("/v1/audit", params={"newest": True}).json()["entries"]
    told = [
        (entry["user"], entry["outcome"])
        for entry in newest
        if entry["object"].endswith("/runs/set-tag") and entry["user"] != "audrey"
    ]
    assert told == [("admin", 200), ("alice", 403)]
    assert not [entry for entry in newest if "search" in entry["object"] and entry["outcome"] == 200]


def test_mlflows_client_reads_with_a_token(house: House) -> None:
    code = """
import mlflow
found = mlflow.MlflowClient().search_experiments()
runs = mlflow.MlflowClient().search_runs([one.experiment_id for one in found])
print([one.name for one in found], [run.data.params for run in runs])
try:
    mlflow.MlflowClient().create_experiment("mine")
except mlflow.exceptions.MlflowException as error:
    print(error)
"""
    environment = {
        **os.environ,
        **tracking_environment(),
        "MLFLOW_TRACKING_URI": f"{house.manager.url}/mlflow",
        "MLFLOW_TRACKING_TOKEN": house.tokens["bob"],
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=house.manager.home, capture_output=True, text=True
    )
    assert "['family (bob)'] [{'told': 'secret-of-p-bobby1'}]" in told.stdout, told.stderr
    assert "404" in told.stdout


def test_a_killed_mlflow_is_started_again(house: House) -> None:
    def running() -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if "flops.tracking.gui" in (line := " ".join(process.info["cmdline"] or []))
            and str(house.manager.home) in line
        ]

    (process,) = running()
    process.kill()
    process.wait(10)
    port = house.client("bob").base_url.port
    cookie = f"flops-{port}={house.tokens['bob']}"
    page = house.manager.client("").get("/mlflow/", headers={"accept": "text/html", "cookie": cookie})
    assert page.status_code in (200, 503)
    if page.status_code == 503:
        assert page.headers["refresh"] == "2"
        assert "MLflow is being started" in page.text
    assert house.client("bob").get("/mlflow/version", timeout=120.0).is_success
    assert len(running()) == 1


def test_the_address_of_the_gui_is_the_managers_own(house: House) -> None:
    admin = house.client("admin")
    assert admin.post("/v1/ui").json() == {"url": f"{house.manager.url}/mlflow/"}
    told = admin.get("/api/flops/tracking").json()
    assert told == {"tracking_server_url": f"{house.manager.url}/mlflow/"}


def test_the_command_line_gives_an_address_that_signs_in_once(house: House) -> None:
    told = subprocess.run(
        [Path(sys.executable).with_name("flops"), "ui", "--json"],
        env={**os.environ, "FLOPS_HOME": str(house.manager.home)},
        capture_output=True,
        text=True,
        check=True,
    )
    address, _, code = str(json.loads(told.stdout)["url"]).partition("#")
    assert address == f"{house.manager.url}/login?next=%2Fmlflow%2F"
    browser = house.manager.client("")
    sent = {"code": code, "next": "/mlflow/"}
    answer = browser.post("/login", data=sent)
    assert (answer.status_code, answer.headers["location"]) == (303, "/mlflow/")
    assert browser.get("/mlflow/").text.startswith("<!doctype html>")
    assert browser.post("/login", data=sent).status_code == 401


def test_a_server_elsewhere_is_where_the_address_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOPS_TRACKING_URI", "http://127.0.0.1:9")
    manager = ManagerProcess(tmp_path / "home").start()
    try:
        client = manager.client()
        assert client.post("/v1/ui").json() == {"url": "http://127.0.0.1:9"}
        answer = client.get("/mlflow/")
        assert (answer.status_code, answer.headers["location"]) == (303, "http://127.0.0.1:9")
    finally:
        manager.end()


@pytest.fixture
def chromium(require: Callable[[bool, str], None]) -> Iterator[Any]:
    path = shutil.which("chromium")
    require(path is not None, "chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.mark.browser
@pytest.mark.slow
def test_a_link_to_a_run_leads_through_the_sign_in_to_the_run(
    house: House, alices: Result, chromium: Any
) -> None:
    page = chromium.new_context(base_url=house.manager.url).new_page()
    page.set_default_timeout(60_000)
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.on("console", lambda told: broken.append(told.text) if "Content Security" in told.text else None)
    page.on(
        "request",
        lambda asked: (
            None
            if asked.url.startswith((house.manager.url, "data:", "blob:"))
            else broken.append(f"asks {asked.url}")
        ),
    )
    page.goto(f"/mlflow/{alices.page}")
    page.fill("#token", house.tokens["alice"])
    page.keyboard.press("Enter")
    page.wait_for_selector(
        f"h1:has-text('{_secret_of('p-alice1')}'), h2:has-text('{_secret_of('p-alice1')}')"
    )
    assert page.url == f"{house.manager.url}/mlflow/{alices.page}"
    assert broken == []
    # What a script that got into MLflow's page could do: it reaches none of the manager's own.
    assert "refused" in page.evaluate("fetch('/users').then((a) => a.text(), (e) => 'refused: ' + e)")
    assert any("connect-src" in told for told in broken)
