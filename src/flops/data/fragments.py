"""Fragments: one table of one site's data, what it is called and how it is found.

Tags and sites are words of the user (any Unicode text); they are metadata and never become part of a path.
Only a fragment's id does, and it is matched against one narrow pattern first.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NewType

from flops.core.errors import InvalidInputError

FragmentId = NewType("FragmentId", str)

DEFAULT_SITE = "local"
MAX_TAGS = 100
MAX_TAG_LENGTH = 256
MAX_SITE_LENGTH = 100
MAX_LABELS = 20
MAX_LABEL_LENGTH = 200

_FRAGMENT_ID = re.compile(r"f-[0-9a-f]{32}")
_LABEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_SHOWN_TAGS = 5


@dataclass(frozen=True)
class Fragment:
    """One stored table and what is known about it without reading it.

    ``columns`` maps column names to Arrow types in words. ``size_bytes`` is the size on disk.
    ``allow_metrics``: the data owner allows that metrics of its learner are tracked and shown, and that
    noised histograms of its labels are given out. ``labels``: what is known of the place, ``region: north``;
    a site has those of its fragments.
    """

    id: FragmentId
    site: str
    tags: frozenset[str]
    num_examples: int
    size_bytes: int
    columns: Mapping[str, str] = field(hash=False)
    allow_metrics: bool
    created: float
    content_hash: str
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)

    def carries(self, tags: Iterable[str], site: str | None) -> bool:
        """Whether it lies at ``site`` (None: any) and has at least one of ``tags`` (none given: any)."""
        wanted = frozenset(tags)
        return (site is None or site == self.site) and (not wanted or bool(wanted & self.tags))

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "site": self.site,
            "tags": sorted(self.tags),
            "num_examples": self.num_examples,
            "size_bytes": self.size_bytes,
            "columns": dict(self.columns),
            "allow_metrics": self.allow_metrics,
            "created": self.created,
            "content_hash": self.content_hash,
            "labels": dict(self.labels),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Fragment":
        """The opposite of `to_json`.

        Raises:
            InvalidInputError: something else than a fragment.
        """
        try:
            return cls(
                id=fragment_id(value["id"]),
                site=check_site(value["site"]),
                tags=check_tags(value["tags"]),
                num_examples=int(value["num_examples"]),
                size_bytes=int(value["size_bytes"]),
                columns={str(name): str(kind) for name, kind in value["columns"].items()},
                allow_metrics=bool(value["allow_metrics"]),
                created=float(value["created"]),
                content_hash=str(value["content_hash"]),
                labels=check_labels(value.get("labels", {})),  # fragments put before 2026-11 have none
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInputError(
                f"a fragment's description lacks or garbles {error} - "
                "use the same FLOps version on both sides"
            ) from error


def fragment_id(text: object) -> FragmentId:
    """Check an id that came from outside, before it touches the file system.

    Raises:
        InvalidInputError: it is no fragment id.
    """
    if not isinstance(text, str) or not _FRAGMENT_ID.fullmatch(text):
        raise InvalidInputError(
            f"{quoted([str(text)])} is not a fragment id - "
            "ids are 'f-' and 32 hexadecimal digits, see 'flops data ls'"
        )
    return FragmentId(text)


def derived_id(content_hash: str, tags: Iterable[str], site: str) -> FragmentId:
    """The id of some content under these tags at this site: equal puts get equal ids."""
    label = json.dumps([content_hash, sorted(tags), site]).encode()
    return FragmentId("f-" + hashlib.sha256(label).hexdigest()[:32])


def check_tags(tags: object, *, required: bool = True) -> frozenset[str]:
    """Check data tags: at most 100, each any Unicode text of 1 to 256 characters.

    Raises:
        InvalidInputError: anything else, or none where one is ``required``.
    """
    if isinstance(tags, str | bytes) or not isinstance(tags, Iterable):
        raise InvalidInputError("tags are a list of texts - give a list, even for one tag")
    listed = list(tags)
    if required and not listed:
        raise InvalidInputError("no data tag was given - name at least one, as in '--tag mnist'")
    if len(listed) > MAX_TAGS:
        raise InvalidInputError(f"{len(listed)} data tags were given - use at most {MAX_TAGS}")
    return frozenset(_text(tag, "data tag", MAX_TAG_LENGTH) for tag in listed)


def check_labels(labels: object) -> dict[str, str]:
    """Check the labels of a fragment: at most 20, names as ``region`` or ``net.speed``, values any text.

    Raises:
        InvalidInputError: anything else.
    """
    if not isinstance(labels, Mapping):
        raise InvalidInputError("labels are names and values - give them as in '--label region=north'")
    if len(labels) > MAX_LABELS:
        raise InvalidInputError(f"{len(labels)} labels were given - use at most {MAX_LABELS}")
    for name in labels:
        if not isinstance(name, str) or not _LABEL_NAME.fullmatch(name):
            raise InvalidInputError(
                f"{quoted([str(name)])} cannot be the name of a label - use 1 to 63 letters, digits, "
                "'.', '_' and '-', a letter or digit first"
            )
    return {
        name: _text(value, f"value of label {name}", MAX_LABEL_LENGTH)
        for name, value in sorted(labels.items())
    }


def check_site(site: object) -> str:
    """Check the name of a site: any Unicode text of 1 to 100 characters.

    Raises:
        InvalidInputError: anything else.
    """
    return _text(site, "site", MAX_SITE_LENGTH)


def no_match(tags: Iterable[str], site: str) -> str:
    """The message for a site that holds nothing under any of the tags."""
    listed = sorted(tags)
    return (
        f"no fragment at site {quoted([site])} carries any of the tags {quoted(listed)} - "
        f"see 'flops data ls', or put data with 'flops data put FILE --tag {_printable(listed[0])}'"
    )


def quoted(texts: Iterable[str]) -> str:
    """Texts from outside, fit for one line of an error message: quoted, shortened, printable."""
    listed = list(texts)
    shown = ", ".join(f"'{_printable(text)}'" for text in listed[:_SHOWN_TAGS])
    rest = len(listed) - _SHOWN_TAGS
    return f"{shown} and {rest} more" if rest > 0 else shown


def _printable(text: str) -> str:
    short = text if len(text) <= 60 else text[:59] + "…"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in short
    )


def _text(value: object, what: str, longest: int) -> str:
    if not isinstance(value, str):
        raise InvalidInputError(f"a {what} is a {type(value).__name__} - it must be text")
    if not 0 < len(value) <= longest:
        raise InvalidInputError(
            f"the {what} {quoted([value])} has {len(value)} characters - use 1 to {longest}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"the {what} {quoted([value])} holds half a surrogate pair - use valid Unicode"
        ) from error
    return value
