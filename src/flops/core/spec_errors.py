"""What is wrong with a spec, in a user's words: pydantic's findings told as short sentences."""

import difflib
import json
import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from flops.core.errors import InvalidInputError

_SENTENCES = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "literal_error": "must be {expected}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_long": "must have at most {max_length} characters",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} entry",
}
_NAME_RULE = "must be made of letters, digits, '.', '_' and '-', 63 at most, the first a letter or digit"
_PYTHON_NAME_RULE = "must be made of letters, digits and '_', 64 at most, the first no digit"


class InvalidSpecError(InvalidInputError):
    """A spec is wrong; ``problems`` are single sentences, each starting with its dotted place."""

    def __init__(self, prefix: str, problems: Sequence[str]) -> None:
        super().__init__(f"{prefix}: {'; '.join(problems)}")
        self.problems = tuple(problems)


def describe(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Every problem of a refused spec, each starting with its dotted place."""
    problems: list[str] = []
    for detail in error.errors(include_url=False):
        problem = _sentence(detail, model)
        if problem not in problems:
            problems.append(problem)
    return problems


def unknown_key(section: str, key: str, known: Sequence[str]) -> str:
    """Refuse a key that does not exist, with the nearest that does."""
    place = f"{section}.{key}" if section else key
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    advice = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(known))}"
    return f"{place} is unknown - {advice}"


def quote(value: object) -> str:
    """A value as it may be shown in a message: as JSON, and short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _sentence(detail: ErrorDetails, model: type[BaseModel]) -> str:
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "cross_field":  # names its places itself
        return detail["msg"]
    *section, key = detail["loc"] or ("spec",)
    if kind == "extra_forbidden":
        return unknown_key(_dotted(section), str(key), _fields_at(model, section))
    place = _dotted([part for part in detail["loc"] if part != "[key]"])
    if kind == "missing":
        return f"{place} is missing"
    if kind == "string_pattern_mismatch":
        rule = _NAME_RULE if "._-" in context.get("pattern", "") else _PYTHON_NAME_RULE
    elif kind in _SENTENCES:
        rule = _SENTENCES[kind].format(**context)
    else:
        rule = detail["msg"][:1].lower() + detail["msg"][1:]
    if place == "repo":  # may hold credentials
        return f"{place} {rule}"
    return f"{place} {rule} (is {quote(value)})"


def _dotted(location: Sequence[int | str]) -> str:
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def _fields_at(model: type[BaseModel], section: Sequence[int | str]) -> list[str]:
    for part in section:
        inner = _model_in(model.model_fields[str(part)].annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        for choice in get_args(annotation):
            if (inner := _model_in(choice)) is not None:
                return inner
    return None
