"""One running node: says what is there, hears what is wanted, makes it so; goes on without its manager."""

import json
import logging
import os
import random
import threading
import time
from contextlib import suppress
from typing import Any

from flops.core.consent import Consent
from flops.core.errors import FlopsError, InvalidInputError, TooManyRequestsError, UnauthorizedError
from flops.images.locks import write_atomically
from flops.node.data import NodeData
from flops.node.home import Membership, NodeHome
from flops.node.learners import Learners
from flops.node.link import WAIT_S, Manager
from flops.orchestration import Orchestrator

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_NEWS_PAUSE_S = 0.2
_USAGE_S = 5.0
"""What learners use is news so often."""
_REFUSALS = 3
"""So often in a row the manager must not know this node before that is believed."""


class Program:
    """Runs until `end`, or until the manager does not know this node any more.

    Args:
        wait_s: how long an answer of the manager may wait for news.
        data_ready_s: how long the data server may take before the manager is told what there is.
    """

    def __init__(
        self,
        home: NodeHome,
        membership: Membership,
        orchestrator: Orchestrator,
        manager: Manager,
        *,
        wait_s: float = WAIT_S,
        data_ready_s: float = 20.0,
    ) -> None:
        self._home = home
        self._membership = membership
        self._manager = manager
        self._wait_s, self._data_ready_s = wait_s, data_ready_s
        self._consent = home.consent()
        self._over = threading.Event()
        self._news = threading.Event()
        self._known = -1
        self._logs_wanted: list[str] = []
        self._saying = threading.Lock()
        self._said: dict[str, Any] = {"connected": False, "last_sync": None, "error": "", "ejected": None}
        self._data = NodeData(home, orchestrator)
        self._data.ensure()
        self._learners = Learners(
            home,
            membership,
            orchestrator,
            manager,
            self._data,
            consent=lambda: self._consent,
            changed=self._news.set,
        )

    def run(self) -> str | None:
        """Take part; returns why the manager does not know this node any more, or None after `end`."""
        teller = threading.Thread(target=self._tell, name="tell", daemon=True)
        teller.start()
        self._keep_status()
        try:
            self._data.wait_until_ready(self._over, self._data_ready_s)
            return self._listen()
        finally:
            self._over.set()
            self._news.set()
            teller.join()

    def end(self) -> None:
        """Let `run` return soon; callable from a signal handler."""
        self._over.set()
        self._news.set()

    def look_again(self) -> None:
        """The owner changed what is allowed, or the data: act on it, and tell the manager.

        From any thread; from a signal handler only through one.
        """
        try:
            self._consent = self._home.consent()
        except InvalidInputError as error:
            log.error("what is allowed stays as it was: %s", error)
        self._learners.reconsider()
        self._news.set()

    def stop_learners(self, reason: str) -> None:
        """Nothing of any project runs here any more."""
        self._learners.end_all(reason)

    def close(self) -> None:
        self._learners.close()
        self._data.close()
        with suppress(OSError):
            self._home.status_file.unlink(missing_ok=True)

    # the two conversations

    def _listen(self) -> str | None:
        """Ask for what is wanted, again and again; each answer waits at the manager until it is news."""
        pause_s, refusals = _FIRST_PAUSE_S, 0
        while not self._over.is_set():
            try:
                answer = self._sync(self._wait_s if self._said["connected"] else 0.0)
                self._apply(answer)
                pause_s, refusals = _FIRST_PAUSE_S, 0
                continue
            except UnauthorizedError as error:
                refusals += 1
                self._set(connected=False, error=str(error))
                if refusals >= _REFUSALS:
                    return self._ejected(str(error))
            except FlopsError as error:
                if self._said["connected"] or not self._said["error"]:
                    log.warning("the manager is away, trying again: %s", error)
                self._set(connected=False, error=str(error))
                if isinstance(error, TooManyRequestsError):
                    pause_s = max(pause_s, error.retry_after_s)
            except Exception as error:
                log.exception("an answer of the manager could not be acted on")
                self._set(connected=False, error=f"{type(error).__name__}: {error}")
            # Jitter, so that many nodes do not come back in one instant.
            self._over.wait(pause_s * random.uniform(0.5, 1.5))  # noqa: S311
            if refusals == 0:
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return None

    def _tell(self) -> None:
        """Say at once what changed here, beside the long wait for what is wanted."""
        while not self._over.is_set():
            self._news.wait(_USAGE_S if self._learners.any_running() else None)
            if self._over.wait(_NEWS_PAUSE_S):  # what changes together is said together
                return
            self._news.clear()
            self._keep_status()
            if not self._said["connected"]:
                continue  # the other conversation says it with its next word
            try:
                self._sync(0.0)
            except FlopsError as error:
                log.info("news were not told, they will be with the next report: %s", error)

    def _sync(self, wait_s: float) -> dict[str, Any]:
        consent = self._consent
        with self._saying:  # what is known and what is reported belong together
            known, services = self._known, self._learners.reports()
            logs = self._learners.logs(self._logs_wanted)
        report = {
            "known": known,
            "wait_s": wait_s,
            "policy": consent.to_json(),
            "holdings": self._data.holdings(consent),
            "services": services,
            "logs": logs,
        }
        return self._manager.sync(report)

    def _apply(self, answer: dict[str, Any]) -> None:
        number, wanted, logs = answer.get("number"), answer.get("wanted"), answer.get("logs", [])
        if not isinstance(number, int) or not isinstance(wanted, list) or not isinstance(logs, list):
            raise InvalidInputError("the manager's answer cannot be understood - are both of one version?")
        if not self._said["connected"]:
            log.info("connected with %s as node %s", self._membership.url, self._membership.node)
        self._set(connected=True, error="", last_sync=time.time())
        if number != self._known:
            self._learners.want(wanted)
            with self._saying:
                self._known = number
        self._logs_wanted = [name for name in logs[:64] if isinstance(name, str)]
        if self._logs_wanted:
            self._news.set()

    def _ejected(self, why: str) -> str:
        log.error("the manager does not know this node any more: %s", why)
        self._learners.end_all("the manager does not know this node any more")
        gone = Membership(**{**vars(self._membership), "ejected": why, "credential": ""})
        self._home.keep_membership(gone)
        return why

    # what the owner sees

    def _set(self, **said: Any) -> None:
        news = any(self._said[key] != value for key, value in said.items() if key != "last_sync")
        self._said |= said
        if news or "last_sync" in said:
            self._keep_status()

    def _keep_status(self) -> None:
        if self._over.is_set():
            return
        status = {
            "pid": os.getpid(),
            "node": self._membership.node,
            "url": self._membership.url,
            **self._said,
            "learners": self._learners.running(),
        }
        try:
            write_atomically(self._home.status_file, json.dumps(status) + "\n")
        except OSError as error:
            log.error("the status was not written: %s", error)


def allowed(consent: Consent) -> str:
    """What is allowed, in one line for the owner."""
    parts = [
        f"{what}: {', '.join(entries)}"
        for what, entries in (
            ("data tags", consent.tags),
            ("projects of", (*consent.owners, *(f"team {team}" for team in consent.teams))),
            ("code from", consent.repositories),
        )
        if entries
    ]
    return "; ".join(parts) or "everything: no limits are set"
