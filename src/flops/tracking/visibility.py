"""Who sees what in MLflow's GUI: the function that MLflow's own access control asks about each request.

Whoever asks was identified by the manager before; the header `AUDIENCES_HEADER` says what they are part of.
An experiment or registered model belongs to one audience, which is a tag of its (`naming.AUDIENCE_TAG`). For
each set of audiences MLflow knows one user, which may read what is theirs and nothing else; what is of no
audience is for those who see everything. MLflow's permissions are worked out anew from the tags and kept
nowhere else.

Imported by MLflow's server alone, which names `authenticate` in its configuration.
"""

import hashlib
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flask import Response, request
from werkzeug.datastructures import Authorization

from flops.tracking.commands import AUDIENCES_HEADER, CHANGES, EVERYTHING
from flops.tracking.naming import AUDIENCE_TAG

ADMIN = "flops"
"""MLflow's own administrator."""

_AUDIENCE = re.compile(r"(user|team):[a-z0-9._@+-]{1,60}")
_MOST = 60
_LOOK_AGAIN_S = 1.0
_A_PAGE = 1000

_Resource = tuple[str, str]
"""Its type and its name, as MLflow's permissions know them."""


@dataclass
class _Known:
    """What MLflow's user of some audiences may read, and when that was looked up."""

    granted: set[_Resource] = field(default_factory=set)
    looked: float = float("-inf")


class Permissions:
    """MLflow's users and their permissions, made on demand. Safe from any thread.

    Args:
        users: MLflow's store of users.
        experiments, models: MLflow's stores that are searched, opened on demand.
    """

    def __init__(self, users: Any, experiments: Callable[[], Any], models: Callable[[], Any]) -> None:
        self._users = users
        self._experiments = experiments
        self._models = models
        self._known: dict[str, _Known] = {}
        self._lock = threading.Lock()

    def user_of(self, audiences: tuple[str, ...]) -> str:
        """The name of the user whose permissions are those of the audiences, up to date by a second."""
        digest = hashlib.sha256("\n".join(audiences).encode()).hexdigest()[:32]
        name = f"audience-{digest}"
        with self._lock:
            if (known := self._known.get(name)) is None:
                if not self._users.has_user(name):
                    self._users.create_user(name, secrets.token_urlsafe(32))
                known = self._known[name] = _Known()
            now = time.monotonic()
            if now - known.looked >= _LOOK_AGAIN_S:
                self._renew(name, known, set(self._readable(audiences)))
                known.looked = now
        return name

    def _renew(self, name: str, known: _Known, wanted: set[_Resource]) -> None:
        for resource in known.granted - wanted:
            self._users.revoke_user_resource_permission(name, *resource)
            known.granted.discard(resource)
        for resource in wanted - known.granted:
            self._users.grant_user_resource_permission(name, *resource, "READ")
            known.granted.add(resource)

    def _readable(self, audiences: tuple[str, ...]) -> Iterator[_Resource]:
        if audiences == (EVERYTHING,):
            yield "experiment", EVERYTHING
            yield "registered_model", EVERYTHING
            return
        from mlflow.entities import ViewType

        for audience in audiences:
            wanted = f"tags.`{AUDIENCE_TAG}` = '{audience}'"
            for found in _all(
                self._experiments().search_experiments, view_type=ViewType.ALL, filter_string=wanted
            ):
                yield "experiment", str(found.experiment_id)
            for found in _all(self._models().search_registered_models, filter_string=wanted):
                yield "registered_model", str(found.name)


def audiences_of(text: str) -> tuple[str, ...] | None:
    """What a header says, in order; None: it is none of ours."""
    if text in (EVERYTHING, CHANGES):
        return (text,)
    found = tuple(sorted(set(text.split(","))))
    if len(found) > _MOST or not all(_AUDIENCE.fullmatch(audience) for audience in found):
        return None
    return found


_permissions: Permissions | None = None
_making = threading.Lock()


def authenticate() -> Authorization | Response:
    """MLflow's ``authorization_function``: the user as whom a request is answered."""
    audiences = audiences_of(request.headers.get(AUDIENCES_HEADER, ""))
    if audiences is None:
        return Response("The request does not say who it is for.", status=401)
    name = ADMIN if audiences == (CHANGES,) else _ready().user_of(audiences)
    return Authorization("basic", {"username": name, "password": ""})


def _ready() -> Permissions:
    global _permissions
    with _making:
        if _permissions is None:
            from mlflow.server import auth, handlers

            _permissions = Permissions(
                auth.store, handlers._get_tracking_store, handlers._get_model_registry_store
            )
        return _permissions


def _all(search: Callable[..., Any], **wanted: Any) -> Iterator[Any]:
    page: str | None = None
    while True:
        some = search(**wanted, max_results=_A_PAGE, page_token=page)
        yield from some
        page = some.token
        if not page:
            return
