"""The SLA of the FLOps thesis, as another spelling of our own spec: one table, read in both directions."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flops.core.spec import ProjectSpec

THESIS_KEYS: Mapping[str, str] = {
    "customerID": "customer_id",
    "ml_repo_url": "repo",
    "ml_model_flavor": "model.flavor",
    "verbose": "verbose",
    "use_devel_base_images": "use_devel_base_images",
    "supported_platforms": "platforms",
    "training_configuration.mode": "training.mode",
    "training_configuration.data_tags": "data.tags",
    "training_configuration.training_cycles": "training.cycles",
    "training_configuration.training_rounds": "training.rounds",
    "training_configuration.min_available_clients": "training.min_available_learners",
    "training_configuration.min_fit_clients": "training.min_fit_learners",
    "training_configuration.min_evaluate_clients": "training.min_evaluate_learners",
    "post_training_steps": "post_training_steps",
    "resource_constraints.memory": "resources.memory_mb",
    "resource_constraints.vcpus": "resources.vcpus",
    "resource_constraints.storage": "resources.storage_mb",
}
"""Every key of the SLA, dotted, and the place of its value in a `ProjectSpec`."""

_OWN_TO_THESIS = {own: thesis for thesis, own in THESIS_KEYS.items()}
_TOP = frozenset(key.partition(".")[0] for key in THESIS_KEYS)
_SECTIONS = frozenset(key.partition(".")[0] for key in THESIS_KEYS if "." in key)
_ONLY_THESIS = frozenset(
    key for key in _TOP if key not in {"verbose", "use_devel_base_images", "post_training_steps"}
)
_OWN_NAMES = re.compile(r"(?<![\w.])(" + "|".join(re.escape(own) for own in _OWN_TO_THESIS) + r")(?![\w])")


def is_thesis_sla(mapping: Mapping[str, Any]) -> bool:
    """Whether the mapping is written in the thesis' keys (one that we do not have is enough)."""
    return not _ONLY_THESIS.isdisjoint(mapping)


def known_keys(section: str = "") -> list[str]:
    """The keys that the SLA has at its top, or in one of its two sections."""
    if not section:
        return sorted(_TOP)
    return sorted(key.partition(".")[2] for key in THESIS_KEYS if key.partition(".")[0] == section)


def from_thesis(
    mapping: Mapping[str, Any],
) -> tuple[dict[str, Any], list[tuple[str, str]], list[str]]:
    """Rewrite an SLA in our own keys.

    Returns:
        The own mapping (nested); every unknown key as (section, key); every section that is no mapping.
    """
    own: dict[str, Any] = {}
    unknown: list[tuple[str, str]] = []
    not_sections: list[str] = []

    def take(section: str, key: str, value: object) -> None:
        place = THESIS_KEYS.get(f"{section}.{key}" if section else key)
        if place is None:
            unknown.append((section, key))
            return
        head, _, tail = place.partition(".")
        if tail:
            own.setdefault(head, {})[tail] = value
        else:
            own[head] = value

    for key, value in mapping.items():
        if key not in _SECTIONS:
            take("", key, value)
        elif isinstance(value, Mapping):
            for inner, inner_value in value.items():
                take(key, inner, inner_value)
        elif value is not None:
            not_sections.append(key)
    return own, unknown, not_sections


def in_thesis_words(text: str) -> str:
    """A message about our own keys, told in the SLA's: its author never saw the others."""
    return _OWN_NAMES.sub(lambda match: _OWN_TO_THESIS[match[1]], text)


def to_thesis_sla(spec: "ProjectSpec") -> dict[str, Any]:
    """The part of a spec that the SLA can say, in its keys; unset values are left out."""
    own = spec.to_json()
    sla: dict[str, Any] = {}
    for thesis, place in THESIS_KEYS.items():
        value: Any = own
        for part in place.split("."):
            value = value[part]
        if value is None:
            continue
        section, _, key = thesis.rpartition(".")
        (sla.setdefault(section, {}) if section else sla)[key] = value
    return sla
