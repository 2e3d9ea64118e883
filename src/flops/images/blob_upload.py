"""One blob on its way into a registry: mounted from another repository, or sent in chunks.

After a failure the registry is asked how much of the blob it has, and the rest is sent; where it has lost the
upload, the blob is sent from its start. (docker-registry 2.8 keeps an upload over its own restart, and loses
it when a chunk broke off in the middle.)
"""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import httpx

from flops.core.errors import FailedError, FlopsError
from flops.images.descriptor import Descriptor
from flops.images.references import check_repository
from flops.images.registry_access import pulling, pushing
from flops.images.registry_connection import Answer, Connection, Question, TryAgainError

Told = Callable[[int], None]
"""Told how many bytes of a blob are there by now (fewer than before, when it has to begin again); what it
raises ends the transfer."""

CHUNK_BYTES = 16 << 20
"""What is sent in one request; a proxy's limit and a broken connection hurt no more than that."""
COMMIT_S = 300.0
"""How long a registry may think about a whole blob or manifest."""

_PIECE_BYTES = 256 << 10
_OCTETS = "application/octet-stream"
_RANGE = re.compile(r"(?:bytes=)?0-([0-9]{1,15})")
_LOST = frozenset({404, 416})
_NOT_SO = frozenset({400, 405})


def ignore(_: int) -> None:
    """For callers who want no progress."""


@dataclass(frozen=True)
class _Session:
    """An upload that the registry has begun, and how much of it is there."""

    url: httpx.URL
    offset: int
    chunk_bytes: int


class Upload:
    """One blob on its way; `run` it once."""

    def __init__(
        self,
        connection: Connection,
        repository: str,
        blob: Descriptor,
        file: Path,
        chunk_bytes: int,
        told: Told,
    ) -> None:
        self._connection = connection
        self._repository = check_repository(repository)
        self._blob = blob
        self._file = file
        self._chunk_bytes = chunk_bytes
        self._told = told
        self._subject = f"blob {blob.digest} of {repository}"
        self._scopes = pushing(repository)
        self._times_refused = 0

    def run(self, mount_from: str | None) -> Literal["sent", "mounted"]:
        """Bring the blob in; see `Registry.send_blob`."""
        done: Literal["sent", "mounted"] | None = None
        session: _Session | None = None
        unsure, furthest, patience = False, 0, self._connection.patience()
        try:
            while done is None:
                try:
                    if session is None:
                        session = self._begin(mount_from)
                        done = "mounted" if session is None else None
                    elif unsure:
                        session = self._found_again(session)
                        done = "sent" if session is None and self._is_there() else None
                    else:
                        session = self._step(session)
                        done = "sent" if session is None else None
                    unsure = False
                except TryAgainError as error:
                    patience.wait(error)
                    unsure = True
                if session is not None and session.offset > furthest:
                    furthest = session.offset
                    patience.progressed()
        except BaseException as error:
            # Who cannot be reached cannot forget either.
            if session is not None and not isinstance(error, TryAgainError):
                self._abandon(session)
            raise
        self._told(self._blob.size)
        return done

    def _begin(self, mount_from: str | None = None) -> _Session | None:
        """Begin an upload; None: the blob was mounted instead."""
        url = self._connection.url(f"{self._repository}/blobs/uploads/")
        scopes = self._scopes
        if mount_from is not None:
            url = url.copy_merge_params({"mount": self._blob.digest, "from": check_repository(mount_from)})
            scopes += pulling(mount_from)
        answer = self._connection.attempt(Question("POST", url, self._subject, scopes))
        if mount_from is not None and answer.status == 201:
            return None
        least = answer.headers.get("oci-chunk-min-length", "")
        chunk_bytes = max(self._chunk_bytes, int(least[:12]) if least.isdecimal() else 0)
        if self._times_refused:
            chunk_bytes = max(self._blob.size, 1)  # some registries take a blob in one request only
        self._told(0)
        return _Session(self._connection.location(answer, self._subject), 0, chunk_bytes)

    def _found_again(self, session: _Session) -> _Session | None:
        """The session as the registry has it after a failure; None: it has lost it, or ended it."""
        answer = self._connection.attempt(
            Question("GET", session.url, self._subject, self._scopes, accepted=_LOST | _NOT_SO)
        )
        if answer.status in _LOST | _NOT_SO or "range" not in answer.headers:
            return None
        return self._moved(session, answer, self._blob.size)

    def _is_there(self) -> bool:
        url = self._connection.url(f"{self._repository}/blobs/{self._blob.digest}")
        question = Question("HEAD", url, self._subject, pulling(self._repository), accepted=frozenset({404}))
        return self._connection.attempt(question).status != 404

    def _step(self, session: _Session) -> _Session | None:
        """Send the next chunk, or the last and close the upload; None: the blob is there."""
        start, size = session.offset, self._blob.size
        end = min(start + session.chunk_bytes, size)
        # A blob of one chunk needs one request, and so does the end of one that was sent already.
        last = start == size or (start == 0 and end == size)
        headers = {"Content-Type": _OCTETS}
        if not last:
            headers["Content-Range"] = f"{start}-{end - 1}"
        answer = self._connection.attempt(
            Question(
                "PUT" if last else "PATCH",
                session.url.copy_merge_params({"digest": self._blob.digest}) if last else session.url,
                self._subject,
                self._scopes,
                headers,
                (lambda: self._content(start, end)) if end > start else None,
                end - start,
                accepted=_LOST | _NOT_SO,
                silence_s=COMMIT_S if last else None,
            )
        )
        if answer.status in _LOST | _NOT_SO:
            return self._after_refusal(session, answer)
        return None if last else self._moved(session, answer, end)

    def _after_refusal(self, session: _Session, answer: Answer) -> _Session | None:
        """How to go on when the registry did not take a part: ask it, or begin anew in one request."""
        error = self._connection.refusal(answer.status, answer.headers, answer.content, self._subject)
        if answer.status in _LOST:
            raise TryAgainError(str(error)) from error
        if self._times_refused:
            if b"DIGEST_INVALID" in answer.content:
                raise FailedError(
                    f"{self._connection.words} got other content for {self._subject} than its digest says - "
                    f"remove {self._file} and build or pull its image again"
                ) from error
            raise error
        self._times_refused += 1
        self._abandon(session)
        return self._begin()

    def _moved(self, session: _Session, answer: Answer, most: int) -> _Session:
        """The session after an answer; registries may have less than was sent, and change its address."""
        match = _RANGE.fullmatch(answer.headers.get("range", ""))
        # Registries say 0-0 of nothing; that it may be one byte is sorted out by their refusal.
        offset = most if match is None else 0 if match[1] == "0" else int(match[1]) + 1
        if offset > most:
            raise FailedError(
                f"{self._connection.words} claims to have more of {self._subject} than was sent - "
                "look at its log"
            )
        url = session.url
        if "location" in answer.headers:
            url = self._connection.location(answer, self._subject)
        self._told(offset)
        return replace(session, url=url, offset=offset)

    def _content(self, start: int, end: int) -> Iterator[bytes]:
        with self._file.open("rb") as file:
            file.seek(start)
            while start < end:
                piece = file.read(min(_PIECE_BYTES, end - start))
                if not piece:
                    raise FailedError(
                        f"{self._file} is shorter than {self._blob.size} bytes - remove it and build or pull "
                        "its image again"
                    )
                yield piece
                start += len(piece)
                self._told(start)

    def _abandon(self, session: _Session) -> None:
        """Ask the registry to forget an upload that nobody will end; it need not."""
        with suppress(FlopsError):
            self._connection.attempt(Question("DELETE", session.url, self._subject, self._scopes))
