"""Where a node keeps its things, and who it is to its manager."""

import fcntl
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flops.core.consent import Consent
from flops.core.errors import ConflictError, InvalidInputError, NotFoundError
from flops.core.settings import Settings
from flops.images.locks import write_atomically


@dataclass(frozen=True)
class Membership:
    """What a machine has been given by the manager that it joined."""

    url: str
    node: str
    owner: str
    credential: str
    ca: str | None = None
    """PEM text of the only authority that the manager is believed under; None: this machine's own."""
    ejected: str | None = None
    """Why the manager does not know this node any more; None: it does."""

    @property
    def host(self) -> str:
        """By which this machine calls the manager, as it stands in an address."""
        name = urlsplit(self.url).hostname or ""
        return f"[{name}]" if ":" in name else name


class NodeHome:
    """The folder ``node`` of a FLOPS_HOME; all files in it are private.

    Args:
        home: FLOPS_HOME. A manager of its own may use the same one; they share nothing.
    """

    def __init__(self, home: Path) -> None:
        self.folder = home.absolute() / "node"
        self.settings = Settings(home=self.folder)
        """Where data, environments, services, sockets and logs of the node are."""

    @property
    def membership_file(self) -> Path:
        return self.folder / "membership.json"

    @property
    def consent_file(self) -> Path:
        return self.folder / "consent.json"

    @property
    def status_file(self) -> Path:
        """What the running program says of itself."""
        return self.folder / "status.json"

    @property
    def journal_file(self) -> Path:
        return self.folder / "journal.jsonl"

    @property
    def lock_file(self) -> Path:
        """Held by the running program, and its process id."""
        return self.folder / "node.lock"

    @property
    def records_dir(self) -> Path:
        """One file for each learner that is wanted here."""
        return self.folder / "learners"

    @property
    def log_file(self) -> Path:
        return self.settings.logs_dir / "node.log"

    @property
    def data_token_file(self) -> Path:
        return self.folder / "data.token"

    @property
    def data_ready_file(self) -> Path:
        return self.settings.run_dir / "data.ready"

    def make(self) -> None:
        """Raises InvalidInputError: the folder cannot be made."""
        try:
            for folder in (self.folder, self.settings.run_dir, self.records_dir, self.settings.logs_dir):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                folder.chmod(0o700)
        except OSError as error:
            raise InvalidInputError(
                f"{self.folder} cannot be used: {error} - choose another FLOPS_HOME"
            ) from error

    def membership(self) -> Membership | None:
        """Raises InvalidInputError: what is kept cannot be read."""
        content = _read(self.membership_file)
        try:
            return None if content is None else Membership(**content)
        except TypeError as error:
            raise InvalidInputError(
                f"{self.membership_file} cannot be used: {error} - leave and join again"
            ) from error

    def keep_membership(self, membership: Membership) -> None:
        write_atomically(self.membership_file, json.dumps(asdict(membership), indent=1) + "\n")

    def required_membership(self) -> Membership:
        """Raises NotFoundError: this machine has joined no manager."""
        found = self.membership()
        if found is None:
            raise NotFoundError("this machine has joined no manager - join one with 'flops node join'")
        return found

    def consent(self) -> Consent:
        """Raises InvalidInputError: what is kept cannot be read; nothing is allowed then."""
        return Consent.from_json(_read(self.consent_file) or {})

    def keep_consent(self, consent: Consent) -> None:
        write_atomically(self.consent_file, json.dumps(consent.to_json(), indent=1) + "\n")

    def claim(self) -> int:
        """Take the lock, for as long as this process lives; returns its descriptor.

        Raises:
            ConflictError: another program has it.
        """
        fd = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise ConflictError(
                f"the node of {self.folder} runs already (pid {self.running_pid()}) - see 'flops node status'"
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return fd

    def running_pid(self) -> int | None:
        """Of the program that has the lock; None: it does not run."""
        try:
            fd = os.open(self.lock_file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            text = os.pread(fd, 32, 0).decode(errors="replace").strip()
            return int(text) if text.isdecimal() else None
        finally:
            os.close(fd)

    def status(self) -> dict[str, Any]:
        """What the program said last; empty where it never did."""
        with suppress(InvalidInputError):
            return _read(self.status_file) or {}
        return {}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be read: {error} - mend it, or remove it") from error
    if not isinstance(content, dict):
        raise InvalidInputError(f"{path} cannot be read: it is no JSON object - mend it, or remove it")
    return content
