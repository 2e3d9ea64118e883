"""From the text of a spec file to a mapping: YAML, or JSON that may carry comments.

Stricter than the libraries' defaults where a user would be surprised: a key given twice is an error,
``1e-3`` is a number in YAML too, and YAML aliases (which can blow up a small file) are refused.
"""

import json
import re
from collections.abc import Hashable
from typing import Any

import yaml

from flops.core.errors import InvalidInputError

_MOST_CHARACTERS = 1_000_000
_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|(?P<comment>//[^\n]*|/\*.*?\*/)', re.DOTALL)


def strip_comments(text: str) -> str:
    """JSON without its ``//`` and ``/* */`` comments; every other character keeps its line and column."""

    def blank(match: re.Match[str]) -> str:
        if match["comment"] is None:
            return match[0]
        return re.sub(r"[^\n]", " ", match[0])

    return _STRING_OR_COMMENT.sub(blank, text)


def read_mapping(text: str, *, prefix: str) -> dict[str, Any]:
    """Parse a spec's text.

    Raises:
        InvalidInputError: it is neither YAML nor JSON, too large, or no mapping; starts with ``prefix``.
    """
    if len(text) > _MOST_CHARACTERS:
        raise InvalidInputError(f"{prefix} is larger than {_MOST_CHARACTERS:,} characters")
    try:
        value = _read(text.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise InvalidInputError(
            f"{prefix} is not valid JSON: {error.msg.lower()} in line {error.lineno}, column {error.colno}"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InvalidInputError(f"{prefix} is not valid YAML: {error.problem}{where}") from error
    except yaml.YAMLError as error:
        raise InvalidInputError(f"{prefix} is not valid YAML: {str(error).splitlines()[0]}") from error
    except _RepeatedKeyError as error:
        raise InvalidInputError(f"{prefix}: {error.args[0]} is given twice") from error
    except RecursionError as error:
        raise InvalidInputError(f"{prefix} is nested too deeply") from error
    except ValueError as error:  # such as 2023-99-99, which YAML takes for a date
        raise InvalidInputError(f"{prefix} holds a value that cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InvalidInputError(f"{prefix} must be a mapping of names to values")
    return value


def _read(text: str) -> object:
    bare = strip_comments(text)
    if bare.lstrip().startswith("{"):
        try:
            return json.loads(bare, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        except json.JSONDecodeError:
            try:
                return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader; YAML in its flow style
            except yaml.YAMLError:
                pass
            raise
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


class _RepeatedKeyError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise _RepeatedKeyError(key)
        mapping[key] = value
    return mapping


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not allowed - write the value out",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise _RepeatedKeyError(key.value)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where 1e-3 is text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+\Z"),
    list("-+0123456789"),
)
