"""An image registry, spoken to in the OCI distribution API: blobs and manifests, up and down.

Promises: what is read is bounded, and checked against its digest; a transfer that breaks goes on where it
was, and is given up when it gets no further through all pauses. Safe for several threads.

Source:
    OCI distribution specification 1.1.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import httpx

from flops.core.errors import FailedError, InvalidInputError, NotFoundError, UnauthorizedError
from flops.images.blob_upload import CHUNK_BYTES, COMMIT_S, Told, Upload, ignore
from flops.images.credentials import Credentials, find_authority, find_credentials
from flops.images.descriptor import INDEXES, MANIFESTS, MAX_DOCUMENT_BYTES, Descriptor, check_digest
from flops.images.references import Reference, check_repository
from flops.images.registry_access import pulling, pushing
from flops.images.registry_connection import (
    PAUSES_S,
    SILENCE_S,
    Connection,
    Question,
    Sleep,
    TryAgainError,
    pieces,
)

_TYPES = tuple(sorted(MANIFESTS | INDEXES))
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,15})-[0-9]+/(?:[0-9]+|\*)")
_BEYOND_ITS_END = 416


class Registry:
    """One registry, as one user. ``with Registry(...) as registry: ...``"""

    def __init__(
        self,
        host: str,
        credentials: Credentials | None = None,
        *,
        ca: Path | None = None,
        insecure: bool | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        silence_s: float = SILENCE_S,
        pauses_s: Sequence[float] = PAUSES_S,
        sleep: Sleep = time.sleep,
    ) -> None:
        """Nothing is sent yet.

        Args:
            host: such as ``registry.example:5000``, or ``docker.io``.
            credentials: None: ask without any.
            ca: a PEM file with the authority of the registry's certificate, beside those of this machine.
            insecure: plain HTTP; None: only to this very machine, and only without ``ca``.
            chunk_bytes: what is sent in one request.
            silence_s: how long it may say nothing.
            pauses_s: see `PAUSES_S`.
            sleep: how to pause.
        Raises:
            InvalidInputError: the host or the file of the authority is broken.
        """
        self.host = host
        self._connection = Connection(
            host, credentials, ca=ca, insecure=insecure, silence_s=silence_s, pauses_s=pauses_s, sleep=sleep
        )
        self._chunk_bytes = chunk_bytes

    @classmethod
    def of_user(
        cls,
        host: str,
        environment: Mapping[str, str] = os.environ,
        *,
        ca: Path | None = None,
        insecure: bool | None = None,
    ) -> "Registry":
        """With the user's own credentials, and the authority that the user's engines trust for it.

        Raises:
            InvalidInputError, FailedError: see `find_credentials` and the constructor.
        """
        found = find_credentials(host, environment)
        return cls(host, found, ca=ca or find_authority(host, environment), insecure=insecure)

    def close(self) -> None:
        """Close all connections."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ping(self) -> None:
        """See whether it is there and lets us in.

        Raises:
            UnavailableError: it is not there.
            UnauthorizedError: it refuses us.
            FailedError: what is there is no image registry.
        """
        try:
            self._connection.request(Question("GET", self._connection.url(""), "a greeting"))
        except NotFoundError as error:
            raise FailedError(
                f"what answers at {self.host} is not an image registry - check the address"
            ) from error

    # -- blobs

    def has_blob(self, repository: str, digest: str) -> bool:
        """Whether a repository has a blob.

        Raises:
            UnavailableError, UnauthorizedError, FailedError: the registry cannot say.
        """
        question = Question(
            "HEAD",
            self._blob_url(repository, digest),
            f"blob {digest} of {repository}",
            pulling(repository),
            accepted=frozenset({404}),
        )
        return self._connection.request(question).status != 404

    def source_of(self, digest: str, repositories: Sequence[str]) -> str | None:
        """The first of these repositories that has a blob and lets us see it."""
        for repository in repositories:
            with suppress(UnauthorizedError):
                if self.has_blob(repository, digest):
                    return repository
        return None

    def send_blob(
        self,
        repository: str,
        blob: Descriptor,
        file: Path,
        *,
        mount_from: str | None = None,
        told: Told = ignore,
    ) -> Literal["sent", "mounted"]:
        """Bring a blob into a repository.

        Args:
            file: its content; not changed meanwhile.
            mount_from: another repository of this registry that has it, so that nothing need be sent.
            told: see `Told`.
        Raises:
            DiskFullError: the registry has no space.
            UnavailableError: the registry is away, or too often.
            UnauthorizedError: we may not.
            FailedError: the content is not what the digest says, or the registry refuses.
        """
        return Upload(self._connection, repository, blob, file, self._chunk_bytes, told).run(mount_from)

    def fetch_blob(
        self, repository: str, blob: Descriptor, write: Callable[[bytes], object], told: Told = ignore
    ) -> None:
        """Stream a blob; its digest is the caller's to check, its size is checked here.

        Raises:
            NotFoundError: the repository lacks it.
            FailedError: it has another size.
            UnavailableError, UnauthorizedError: see `send_blob`.
        """
        subject = f"blob {blob.digest} of {repository}"
        patience, offset = self._connection.patience(), 0
        while True:
            before = offset
            headers = {"Range": f"bytes={offset}-"} if offset else None
            question = Question(
                "GET",
                self._blob_url(repository, blob.digest),
                subject,
                pulling(repository),
                headers,
                accepted=frozenset({_BEYOND_ITS_END}),
            )
            try:
                with self._connection.stream(question) as response:
                    skipped = self._skipped(response, offset, blob, subject)
                    for piece in pieces(response, blob.size - offset + skipped, subject):
                        fresh = piece[skipped:]
                        skipped -= len(piece) - len(fresh)
                        if fresh:
                            write(fresh)
                            offset += len(fresh)
                            told(offset)
                if offset == blob.size:
                    return
                raise TryAgainError(f"{subject} ended after {offset} of {blob.size} bytes - try again")
            except TryAgainError as error:
                if offset > before:
                    patience.progressed()
                patience.wait(error)

    def _skipped(self, response: httpx.Response, offset: int, blob: Descriptor, subject: str) -> int:
        """How many of the coming bytes are here already."""
        if response.status_code == _BEYOND_ITS_END:
            raise FailedError(
                f"{subject} is damaged in {self._connection.words}: it has {offset} of {blob.size} bytes - "
                "push its image again"
            )
        if response.status_code != 206:
            return offset
        match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        if match is None or int(match[1]) != offset:
            raise FailedError(
                f"{self._connection.words} sends another part of {subject} than it was asked for"
            )
        return 0

    # -- manifests

    def digest_of(self, repository: str, target: str) -> str | None:
        """The digest of the manifest or index that a tag or digest names; None: there is none.

        Raises:
            UnavailableError, UnauthorizedError, FailedError: the registry cannot say.
        """
        question = Question(
            "HEAD",
            self._manifest_url(repository, target),
            f"image {repository}:{target}",
            pulling(repository),
            {"Accept": ", ".join(_TYPES)},
            accepted=frozenset({404}),
        )
        answer = self._connection.request(question)
        if answer.status == 404:
            return None
        found = answer.headers.get("docker-content-digest")
        if found is None:  # the header is only recommended
            return self.manifest(repository, target)[0].digest
        return check_digest(found)

    def manifest(self, repository: str, target: str) -> tuple[Descriptor, bytes]:
        """A manifest or index, and what describes it.

        Args:
            target: its tag or digest.
        Raises:
            NotFoundError: there is none.
            InvalidInputError: it is in a format that is not supported.
            FailedError: it is too large, or not what its digest says.
            UnavailableError, UnauthorizedError: see `send_blob`.
        """
        subject = f"image {self.host}/{repository}{'@' if ':' in target else ':'}{target}"
        question = Question(
            "GET",
            self._manifest_url(repository, target),
            subject,
            pulling(repository),
            {"Accept": ", ".join(_TYPES)},
        )
        answer = self._connection.request(question, MAX_DOCUMENT_BYTES)
        digest = f"sha256:{hashlib.sha256(answer.content).hexdigest()}"
        expected = target if ":" in target else answer.headers.get("docker-content-digest", digest)
        if digest != expected:
            raise FailedError(
                f"{subject} came with the digest {digest} instead of {expected[:80]}: it was damaged or "
                "changed - push it again"
            )
        said = answer.headers.get("content-type", "").partition(";")[0].strip()
        try:
            document = json.loads(answer.content)
            inside = document.get("mediaType", said)
        except (ValueError, AttributeError, RecursionError) as error:
            raise FailedError(f"{subject} is not the JSON that it should be - push it again") from error
        if said not in _TYPES or inside != said:
            raise InvalidInputError(
                f"{subject} is a '{str(inside)[:100]}', which is not supported - push it again "
                "with a newer program"
            )
        return Descriptor(said, digest, len(answer.content)), answer.content

    def send_manifest(self, repository: str, target: str, manifest: Descriptor, content: bytes) -> bool:
        """Bring a manifest or index into a repository, under a tag or its digest.

        Returns:
            whether the registry lists it among the referrers of its subject.
        Raises:
            FailedError: the registry lacks something that it refers to, or refuses it otherwise.
            DiskFullError, UnavailableError, UnauthorizedError: see `send_blob`.
        """
        subject = f"image {repository}{'@' if ':' in target else ':'}{target}"
        question = Question(
            "PUT",
            self._manifest_url(repository, target),
            subject,
            pushing(repository),
            {"Content-Type": manifest.media_type},
            lambda: (content,),
            len(content),
            silence_s=COMMIT_S,
        )
        answer = self._connection.request(question)
        if answer.headers.get("docker-content-digest", manifest.digest) != manifest.digest:
            raise FailedError(f"{self._connection.words} took {subject} for another one - look at its log")
        return "oci-subject" in answer.headers

    def lists_referrers(self, repository: str, digest: str) -> bool:
        """Whether the registry itself keeps account of what refers to a manifest (since OCI 1.1)."""
        url = self._connection.url(f"{check_repository(repository)}/referrers/{check_digest(digest)}")
        question = Question(
            "GET",
            url,
            f"the referrers of {repository}@{digest}",
            pulling(repository),
            accepted=frozenset({404}),
        )
        return self._connection.request(question, MAX_DOCUMENT_BYTES).status != 404

    def delete_manifest(self, repository: str, digest: str) -> None:
        """Delete a manifest or index with all its tags; what is not there is no error.

        Raises:
            FailedError: the registry does not allow it.
            UnavailableError, UnauthorizedError: see `send_blob`.
        """
        question = Question(
            "DELETE",
            self._manifest_url(repository, check_digest(digest)),
            f"the deletion of {repository}@{digest}",
            (f"repository:{repository}:delete,pull",),
            accepted=frozenset({404}),
        )
        self._connection.request(question)

    def _blob_url(self, repository: str, digest: str) -> httpx.URL:
        return self._connection.url(f"{check_repository(repository)}/blobs/{check_digest(digest)}")

    def _manifest_url(self, repository: str, target: str) -> httpx.URL:
        checked = Reference(self.host, repository, *((None, target) if ":" in target else (target, None)))
        return self._connection.url(f"{checked.repository}/manifests/{checked.target}")
