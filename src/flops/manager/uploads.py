"""Trained models that arrive from aggregators on other machines."""

import hashlib
import os
import re
import secrets
from pathlib import Path
from types import TracebackType
from typing import Self

from flops.core.errors import InvalidInputError

_SHA256 = re.compile(r"[0-9a-f]{64}")


def upload_path(folder: Path, sha256: str) -> Path:
    """Where a model with that digest is kept.

    Raises:
        InvalidInputError: it is no digest.
    """
    if not _SHA256.fullmatch(sha256):
        raise InvalidInputError("the model's SHA-256 is not 64 hexadecimal digits - send it with the model")
    return folder / f"{sha256}.safetensors"


class Upload:
    """One model on its way in: there whole, with the announced digest, or not at all."""

    def __init__(self, folder: Path, sha256: str) -> None:
        self.path = upload_path(folder, sha256)
        self._sha256 = sha256
        self._digest = hashlib.sha256()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._aside = folder / f".{secrets.token_hex(8)}"
        self._file = self._aside.open("xb")

    def write(self, part: bytes) -> None:
        self._digest.update(part)
        self._file.write(part)

    def commit(self) -> None:
        """Raises: InvalidInputError: what arrived is not what was announced."""
        if self._digest.hexdigest() != self._sha256:
            raise InvalidInputError(
                "the model that arrived does not have the announced SHA-256 - send it again"
            )
        self._file.flush()
        os.fsync(self._file.fileno())
        for earlier in self.path.parent.glob("*.safetensors"):  # of an attempt, or of fewer rounds
            if earlier != self.path:
                earlier.unlink(missing_ok=True)
        self._aside.replace(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._aside.unlink(missing_ok=True)
