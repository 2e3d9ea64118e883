"""What the owner of a machine does with its node: join, start, stop, look, allow, put data, leave."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

from flops.core.consent import Consent
from flops.core.errors import ConflictError, FailedError, FlopsError, NotFoundError, UnavailableError
from flops.federation.tally import Counts, read_tally
from flops.node.home import Membership, NodeHome
from flops.node.journal import read_journal
from flops.telemetry import last_lines

if TYPE_CHECKING:
    from flops.data import DataClient, Fragment

_READY_S = 60.0
_END_S = 30.0
_LOOK_AGAIN_S = 0.05


def join(home: NodeHome, url: str, ca: str | None, token: str, consent: Consent) -> Membership:
    """Make this machine a node of a manager; what it allows is known before it is one.

    Args:
        ca: PEM text of the manager's authority, compared; None: this machine's own are believed.
    Raises:
        ConflictError: it is a node of some manager.
        FlopsError: the manager does not let it in.
    """
    from flops.node.link import Link

    found = home.membership()
    if found is not None and found.ejected is None:
        raise ConflictError(
            f"this machine is node {found.node} of {found.url} - 'flops node leave' first, or use another "
            "FLOPS_HOME"
        )
    home.make()
    home.keep_consent(consent)
    with Link(url, ca) as link:
        given = link.join(token)
    try:
        membership = Membership(url, str(given["node"]), str(given["owner"]), str(given["credential"]), ca)
    except KeyError as error:
        raise FailedError(f"what answers at {url} lets nobody join - is it a manager?") from error
    home.keep_membership(membership)
    return membership


def start(
    home: NodeHome, command: Sequence[str] = (sys.executable, "-P", "-m", "flops.node")
) -> dict[str, Any]:
    """Run the node in the background; returns its status once it has spoken with its manager, or failed to.

    Raises:
        FailedError: it ended at once; holds the tail of its log.
    """
    home.required_membership()
    if home.running_pid() is not None:
        return home.status()
    home.make()
    with home.log_file.open("ab") as output:
        begun_at = output.tell()
        process = subprocess.Popen(
            [*command, "--home", str(home.folder.parent)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=home.folder,
            start_new_session=True,
        )
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        status = home.status()
        if status.get("pid") == process.pid and (status["connected"] or status["error"]):
            process.returncode = 0  # it outlives us on purpose: no warning when the Popen is dropped
            return status
        if (code := process.poll()) is not None:
            if home.running_pid() is not None:  # somebody else was faster
                return home.status()
            raise FailedError(
                f"the node could not start (exit code {code}) - its log, {home.log_file}, ends with:\n"
                + last_lines(home.log_file, begun_at)
            )
        time.sleep(_LOOK_AGAIN_S)
    process.returncode = 0
    raise UnavailableError(
        f"the node runs (pid {process.pid}) and has said nothing for {_READY_S:g} s - see {home.log_file}"
    )


def stop(home: NodeHome) -> bool:
    """Nothing of the node runs any more; False: nothing did.

    Raises:
        UnavailableError: it does not end.
    """
    pid = home.running_pid()
    if pid is not None:
        with suppress(ProcessLookupError):
            watched = os.pidfd_open(pid)
            try:
                os.kill(pid, signal.SIGTERM)
                poll = select.poll()
                poll.register(watched, select.POLLIN)
                if not poll.poll(_END_S * 1000):
                    raise UnavailableError(
                        f"the node (pid {pid}) has not ended within {_END_S:g} s - see {home.log_file}"
                    )
            finally:
                os.close(watched)
    left = _end_leftovers(home)
    return pid is not None or left


def leave(home: NodeHome, *, purge: bool) -> tuple[Membership, str | None]:
    """Stop everything, tell the manager, forget the credential; data stay, unless they are purged.

    Returns: what it was, and why the manager could not be told; None: it was.
    """
    from flops.node.link import Link

    membership = home.required_membership()
    stop(home)
    untold = membership.ejected
    if untold is None:
        try:
            with Link(membership.url, membership.ca, membership.credential) as link:
                link.leave()
        except FlopsError as error:
            untold = str(error)
    settings = home.settings
    if purge:
        shutil.rmtree(home.folder, ignore_errors=True)
        return membership, untold
    home.membership_file.unlink(missing_ok=True)
    for folder in (settings.projects_dir, settings.environments_dir, settings.services_dir):
        shutil.rmtree(folder, ignore_errors=True)
    return membership, untold


def status(home: NodeHome) -> dict[str, Any]:
    """All that the owner may want to know of the node at once.

    Raises:
        NotFoundError: this machine has joined no manager.
    """
    from flops.node.data import holdings_of

    membership = home.required_membership()
    pid, said = home.running_pid(), home.status()
    consent = home.consent()
    alive = pid is not None and said.get("pid") == pid
    try:
        with data(home) as client:
            holdings = holdings_of(client.list(), consent)
    except FlopsError:
        holdings = None
    return {
        "node": membership.node,
        "owner": membership.owner,
        "url": membership.url,
        "running": pid is not None,
        "pid": pid,
        "connected": bool(alive and said.get("connected")),
        "last_sync": said.get("last_sync") if alive else None,
        "error": said.get("error", "") if alive else "",
        "ejected": membership.ejected,
        "allowed": consent.to_json(),
        "holdings": holdings,
        "learners": _learners(home, said if alive else {}),
    }


def journal(home: NodeHome) -> list[dict[str, Any]]:
    """What ran on the data, the oldest first; of what runs now: what it has sent so far."""
    entries = read_journal(home.journal_file)
    now = {record["entry"]: _counts(home, record) for record in _records(home) if record["entry"]}
    for entry in entries:
        if entry["entry"] in now:
            entry.update(asdict(now[entry["entry"]]), state="running")
    return entries


def allow(home: NodeHome, change: Callable[[Consent], Consent]) -> Consent:
    """Change what is allowed; what runs and is not allowed any more ends."""
    home.required_membership()
    consent = change(home.consent())
    home.keep_consent(consent)
    poke(home)
    return consent


def poke(home: NodeHome) -> None:
    """Let the running node look again at what is allowed, and at the data."""
    pid = home.running_pid()
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGHUP)


@contextmanager
def data(home: NodeHome) -> Iterator["DataClient"]:
    """The node's own data server.

    Raises:
        UnavailableError: the node does not run.
    """
    from flops.data import DataClient
    from flops.data.listening import unix_location
    from flops.node.data import data_token

    home.required_membership()
    if home.running_pid() is None:
        raise UnavailableError("the node does not run - start it with 'flops node start'")
    deadline = time.monotonic() + _READY_S
    while not home.data_ready_file.exists():  # it has just been started
        if time.monotonic() > deadline:
            raise UnavailableError(f"the node's data server is not ready - see {home.settings.logs_dir}")
        time.sleep(_LOOK_AGAIN_S)
    with DataClient(unix_location(home.settings.data_socket), data_token(home)) as client:
        yield client


def put(
    home: NodeHome,
    parquet: BinaryIO,
    tags: Sequence[str],
    site: str,
    *,
    allow_metrics: bool,
    labels: Mapping[str, str],
) -> "Fragment":
    """Store a Parquet file at the node's own data server.

    Raises:
        FlopsError: it cannot be stored.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from flops.core.errors import InvalidInputError

    try:
        file = pq.ParquetFile(parquet)
        reader = pa.RecordBatchReader.from_batches(file.schema_arrow, file.iter_batches())
    except (pa.ArrowException, OSError) as error:
        raise InvalidInputError(f"that is no Parquet file: {error}") from error
    with data(home) as client:
        fragment = client.put(reader, tags, site, allow_metrics=allow_metrics, labels=labels)
    poke(home)
    return fragment


def _learners(home: NodeHome, said: Mapping[str, Any]) -> list[dict[str, Any]]:
    states = {learner["name"]: learner for learner in said.get("learners", [])}
    found = []
    for record in _records(home):
        assignment = record["assignment"] or {}
        known = states.get(record["name"], {"state": record["state"], "reason": record["reason"]})
        found.append(
            {
                "name": record["name"],
                "state": known["state"],
                "reason": known["reason"],
                **{key: assignment.get(key) for key in ("project", "learner", "owner", "team", "repository")},
                **{key: assignment.get(key) for key in ("commit", "tags", "site", "rounds_total")},
                **asdict(_counts(home, record)),
            }
        )
    return found


def _records(home: NodeHome) -> list[dict[str, Any]]:
    records = []
    for path in sorted(home.records_dir.glob("*.json")):
        with suppress(OSError, ValueError):
            records.append(json.loads(path.read_text(encoding="utf-8")))
    return records


def _counts(home: NodeHome, record: Mapping[str, Any]) -> Counts:
    from flops.node.learners import tally_file

    assignment = record["assignment"]
    if not assignment:
        return Counts()
    now = read_tally(tally_file(home, assignment["project"], assignment["learner"]))
    return now.since(Counts(**record["before"]))


def _end_leftovers(home: NodeHome) -> bool:
    """End what a node that was killed has left running."""
    if not home.settings.services_dir.is_dir():
        return False
    from flops.node.data import NodeData
    from flops.node.learners import Learners
    from flops.node.link import Link
    from flops.orchestration import ProcessOrchestrator

    try:
        lock = home.claim()
    except ConflictError:
        return False  # it was started again meanwhile
    orchestrator = ProcessOrchestrator(home.settings.services_dir, home.settings.logs_dir)
    try:
        live = [status.name for status in orchestrator.list() if status.live]
        with suppress(NotFoundError), Link("http://127.0.0.1", None) as link:
            membership = home.required_membership()
            learners = Learners(
                home,
                membership,
                orchestrator,
                link,
                NodeData(home, orchestrator),
                consent=home.consent,
                changed=lambda: None,
            )
            learners.end_all("the node was stopped by its owner")
            learners.close()
        orchestrator.stop_many([status.name for status in orchestrator.list() if status.live], 3.0)
        return bool(live)
    finally:
        orchestrator.close()
        os.close(lock)
