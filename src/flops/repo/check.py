"""The one run of user code before anything is deployed: without data, in its own room.

It gives the initial model, and finds at once what would else fail on every learner.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from flops.core.errors import InvalidInputError
from flops.guest import Guest, Room
from flops_worker.tensors import Layout

_BLOCK = 8 << 20


@dataclass(frozen=True)
class InitialModel:
    """The model before its first round."""

    path: Path
    layout: Layout
    flavor: str | None
    """What the worker recognised the model as; None: nothing it knows."""


def check(
    room: Room,
    destination: Path,
    timeout_s: float = 120.0,
    *,
    log: Path | None = None,
    seed: int = 0,
    threads: int | None = None,
    memory_mb: int | None = None,
) -> InitialModel:
    """Import the repository, construct its ModelManager, and write its parameters to ``destination``.

    Args:
        timeout_s: for each of the two steps.
        log: file that everything the code prints is appended to.
    Raises:
        GuestError: user code raised, ended its process, or took too long.
        InvalidInputError: the model has no parameters.
    """
    with Guest.start(room, log=log, seed=seed, threads=threads, memory_mb=memory_mb) as guest:
        loaded = guest.load(timeout_s)
        layout, fd = guest.describe(timeout_s)
        try:
            if not layout.nbytes:
                raise InvalidInputError(
                    "get_model_parameters of the repository returned no numbers - "
                    "it must return the model's arrays already before training"
                )
            _write(fd, destination)
        finally:
            os.close(fd)
    return InitialModel(destination, layout, loaded.flavor)


def _write(fd: int, destination: Path) -> None:
    """Copy an open model file into place: whole or not at all, also after a crash."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    target, name = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name}.")
    try:
        with os.fdopen(target, "wb") as file:
            offset = 0
            while part := os.pread(fd, _BLOCK, offset):
                file.write(part)
                offset += len(part)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(destination)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
