"""Values as people read them: durations, sizes, times, numbers; and hostile text made harmless."""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
# Controls, and the marks that turn the direction of text around (they can make it read as something else).
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
NOTHING = "–"


def harmless(value: Any) -> Any:
    """Text without commands to terminals and without marks that turn its direction; all else as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", _ESCAPES.sub("", value.replace("\r\n", "\n")))


def clean(value: object, most: int = 400) -> str:
    """Text from users, learners or repositories, `harmless` and not longer than ``most``."""
    text = str(harmless(str(value)))
    return text if len(text) <= most else text[: most - 1] + "…"


def duration(seconds: float | None) -> str:
    """``85 ms``, ``1.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds is None:
        return NOTHING
    if seconds < 0.9995:
        return f"{max(seconds, 0) * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def size(count: float | None) -> str:
    """Bytes in decimal units: ``420 B``, ``2.4 MB``."""
    if count is None:
        return NOTHING
    value = float(count)
    for unit in _UNITS:
        if value < 999.5 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError


def number(value: float | None) -> str:
    """Four decimals where that says something, so that columns of losses line up; else four digits."""
    if not isinstance(value, int | float):
        return NOTHING
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u2009")
    if value == 0 or 1e-3 <= abs(value) < 10:
        return f"{value:.4f}"
    if 10 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.2e}"


def percent(value: float | None) -> str:
    if not isinstance(value, int | float):
        return NOTHING
    return f"{100 * value:.1f} %"


def metric(value: float | None, name: str) -> str:
    """Shares as percent, everything else as a number."""
    return percent(value) if name in ("accuracy", "f1", "auc", "precision", "recall") else number(value)


def absolute(moment: float | None) -> str:
    if moment is None:
        return ""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def machine_time(moment: float) -> str:
    """For ``<time datetime>``."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def clock(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%H:%M:%S")


def ago(moment: float | None, now: float) -> str:
    """``just now``, ``40 s ago``, ``3 h ago``, ``12 d ago``."""
    if moment is None:
        return NOTHING
    passed = now - moment
    if passed < 5:
        return "just now"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed >= length:
            return f"{int(passed // length)} {unit} ago"
    return f"{int(passed)} s ago"


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{number(count)} {one if count == 1 else many or one + 's'}"


def flat(value: object, prefix: str = "") -> dict[str, object]:
    """A nested mapping as dotted names; empty sections and lists stay whole."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    found: dict[str, object] = {}
    for key, inner in value.items():
        found.update(flat(inner, f"{prefix}.{key}" if prefix else str(key)))
    return found


def plain(value: Any) -> str:
    """A value of a spec as one would write it."""
    if value is None or value == {} or value == []:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return clean(value)
    return clean(json.dumps(value, ensure_ascii=False))


def how_many(value: Any) -> int:
    """Events name things one by one or count them; both are fine here."""
    if isinstance(value, int):
        return value
    return len(value) if isinstance(value, list | dict) else 0
