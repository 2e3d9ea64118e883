"""The form for a new project, checked while one types; and the same as text."""

import re
from collections.abc import Mapping
from typing import Any

import yaml
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flops.core.errors import InvalidInputError
from flops.core.spec_text import read_mapping
from flops.web.call import RefusedError
from flops.web.page import Form, Visit, signed_in
from flops.web.words import clean

_NUMBERS = {
    "training.rounds": int,
    "training.cycles": int,
    "training.learners": int,
    "training.clusters.count": int,
    "training.fraction_fit": float,
    "training.min_available_learners": int,
    "training.quorum": int,
    "training.round_deadline_s": float,
    "training.seed": int,
    "data.mock.alpha": float,
    "data.mock.num_examples": int,
    "resources.memory_mb": int,
    "resources.vcpus": float,
}
_TEXTS = (
    "repo",
    "ref",
    "name",
    "training.strategy.name",
    "selection.metric",
    "data.mock.dataset",
    "data.mock.partition",
    "model.initial",
)
_FIELDS = (*_TEXTS, *_NUMBERS, "training.strategy.parameters", "data.tags", "spec")
_OF_HIERARCHY = ("training.cycles", "training.clusters.count")
_WHOLE = re.compile(r"[+-]?[0-9]{1,12}\Z")
_FALLBACK_STRATEGIES = (
    "FedAvg",
    "FedAdam",
    "FedYogi",
    "FedAdagrad",
    "FedProx",
    "FedMedian",
    "FedBuff",
    "FedAsync",
)
_EXAMPLE = """\
repo: https://example.org/you/your-repo
training:
  rounds: 10
  strategy: FedAvg
data:
  tags: [scans]
"""


def routes() -> list[Route]:
    return [
        Route("/new", _page, methods=["GET"]),
        Route("/new", _submit, methods=["POST"]),
        Route("/new/check", _check, methods=["POST"]),
        Route("/new/tags", _tags, methods=["GET"]),
    ]


@signed_in
async def _page(visit: Visit) -> Response:
    values: dict[str, str] = {
        "training.rounds": "5",
        "training.learners": "3",
        "data": "mock",
        "mode": "classic",
        "training.strategy.name": "FedAvg",
    }
    if visit.query.get("tag"):
        values |= {"data": "tags", "data.tags": visit.query["tag"]}
    text = _EXAMPLE
    if origin := visit.query.get("from"):
        found = await visit.api.find("projects", origin)
        if found is not None:
            values, text = _values_of(found["spec"]), _text_of(found["spec"])
            values["team"] = found.get("team") or ""
    return await _show(visit, values, {}, text)


@signed_in
async def _submit(visit: Visit) -> Response:
    try:
        spec = _spec(visit.form)
        problems = {}
    except InvalidInputError as error:
        spec, problems = {}, {"spec": str(error)}
    if not problems:
        try:
            team = visit.form.one("team")
            body = {"spec": spec, **({"team": team} if team else {})}
            made = await visit.api.send("POST", "projects", body=body)
            return visit.go(f"/projects/{made['id']}", "submitted")
        except RefusedError as error:
            if error.status not in (409, 422):
                raise
            checked = await visit.api.send("POST", "specs", "validate", body={"spec": spec})
            problems = _by_field(checked["problems"]) or {"": error.detail}
    values = {name: visit.form.one(name) for name, _ in visit.form.fields}
    values["data.tags"] = ", ".join(visit.form.every("data.tags"))
    return await _show(visit, values, problems, visit.form.one("spec") or _EXAMPLE, status=422)


@signed_in
async def _check(visit: Visit) -> Response:
    """For the page's script: problems by field, and the spec as it would be sent."""
    try:
        spec = _spec(visit.form)
    except InvalidInputError as error:
        return JSONResponse({"problems": {"spec": str(error)}, "regions": {}})
    found = await visit.api.send("POST", "specs", "validate", body={"spec": spec})
    problems = _by_field(found["problems"])
    rest = [text for field, text in problems.items() if field not in _FIELDS]
    preview = visit.render(
        "new_preview.html", text=_text_of(spec), valid=found["valid"], count=len(found["problems"]), rest=rest
    )
    return JSONResponse({"problems": problems, "regions": {"preview": preview}})


@signed_in
async def _tags(visit: Visit) -> Response:
    """For the page's script: which tags there are; to ask takes a second, and the form does not wait."""
    found = await visit.api.find("data", "tags")
    tags = [one for one in (found["tags"] if found else []) if not one["tag"].startswith("mock-")]
    return JSONResponse({"regions": {"tags": visit.render("new_tags.html", tags=tags)}})


async def _show(
    visit: Visit, values: Mapping[str, str], problems: Mapping[str, str], text: str, status: int = 200
) -> Response:
    found = await visit.api.find("specs", "strategies")
    names = found["strategies"] if found else ["FedAvg"]
    spec = "spec" in visit.query.get("as", "") or bool(problems.get("spec")) or values.get("as") == "spec"
    return visit.page(
        "new.html",
        status=status,
        values=values,
        problems=problems,
        rest=[message for field, message in problems.items() if field not in _FIELDS],
        strategies=names,
        text=text,
        teams=sorted(visit.who.get("teams") or []),
        as_text=spec,
        origin=visit.query.get("from", ""),
    )


def _spec(form: Form) -> dict[str, Any]:
    """What the form asks for, in the words of a spec; what is wrong with it is for the API to say."""
    if form.has("spec"):
        return read_mapping(form.one("spec"), prefix="the text")
    hierarchical, mocked = form.one("mode") == "hierarchical", form.one("data") != "tags"
    spec: dict[str, Any] = {"repo": form.one("repo")}
    for field in (*_TEXTS, *_NUMBERS):
        value = form.one(field)
        if not value or (field in _OF_HIERARCHY and not hierarchical):
            continue
        if field.startswith("data.mock.") and not mocked:
            continue
        if field == "data.mock.alpha" and form.one("data.mock.partition") != "dirichlet":
            continue
        _put(spec, field, _number(value, _NUMBERS[field]) if field in _NUMBERS else value)
    if hierarchical:
        _put(spec, "training.mode", "hierarchical")
    if not mocked:
        tags = [part.strip() for text in form.every("data.tags") for part in text.split(",")]
        _put(spec, "data.tags", list(dict.fromkeys(tag for tag in tags if tag)))
    if parameters := _parameters(form.one("training.strategy.parameters")):
        _put(spec, "training.strategy.parameters", parameters)
    steps = [
        name for name in ("build_image_for_trained_model", "deploy_trained_model_image") if form.has(name)
    ]
    if steps:
        spec["post_training_steps"] = steps
    if form.has("training.virtual"):
        _put(spec, "training.virtual", True)
    return spec


def _put(spec: dict[str, Any], dotted: str, value: object) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        spec = spec.setdefault(section, {})
    spec[last] = value


def _number(text: str, kind: type) -> object:
    """As a number where it is one; the API says what is wrong with everything else."""
    if kind is int and _WHOLE.match(text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def _parameters(text: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for line in re.split(r"[\n,]+", text):
        name, equals, value = line.partition("=")
        if line.strip():
            found[name.strip()] = _scalar(value.strip()) if equals else ""
    return found


def _scalar(text: str) -> object:
    if text in ("true", "false"):
        return text == "true"
    return _number(text, int) if _WHOLE.match(text) else _number(text, float)


def _by_field(problems: list[Mapping[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for problem in problems:
        field = problem["field"]
        # a problem of a list's entry is shown at the list
        field = next((one for one in _FIELDS if field == one or field.startswith(one + ".")), field)
        field = {"training.strategy": "training.strategy.name", "data": "data.tags"}.get(field, field)
        message = clean(problem["message"], 400)
        found[field] = f"{found[field]}; {message}" if field in found else message
    return found


def _values_of(spec: Mapping[str, Any]) -> dict[str, str]:
    """A project's spec as the form shows it."""
    values: dict[str, str] = {"data": "tags", "mode": "classic"}

    def walk(section: Mapping[str, Any], prefix: str) -> None:
        for key, value in section.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping) and name != "training.strategy.parameters":
                walk(value, f"{name}.")
            elif isinstance(value, str | int | float) and not isinstance(value, bool):
                values[name] = str(value)

    walk(spec, "")
    training, data = spec.get("training") or {}, spec.get("data") or {}
    values["mode"] = "hierarchical" if training.get("mode") == "hierarchical" else "classic"
    values["data"] = "mock" if data.get("mock") else "tags"
    values["data.tags"] = ", ".join(data.get("tags") or [])
    parameters = (training.get("strategy") or {}).get("parameters") or {}
    values["training.strategy.parameters"] = "\n".join(f"{key}={value}" for key, value in parameters.items())
    for step in spec.get("post_training_steps") or []:
        values[str(step)] = "on"
    return values


def _text_of(spec: Mapping[str, Any]) -> str:
    bare = {key: value for key, value in spec.items() if value not in (None, {}, [])}
    return yaml.safe_dump(_without_empty(bare), sort_keys=False, allow_unicode=True, width=88)


def _without_empty(value: Any) -> Any:
    if isinstance(value, Mapping):
        inner = {key: _without_empty(part) for key, part in value.items()}
        return {key: part for key, part in inner.items() if part is not None and part != {} and part != []}
    return value
