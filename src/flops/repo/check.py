"""The one run of user code before anything is deployed: it must give its initial parameters, without data."""

import os
from dataclasses import dataclass
from pathlib import Path

from flops.core.errors import FailedError, InvalidInputError
from flops.guest import Guest, GuestDied, GuestError, Room
from flops_worker.tensors import Layout

_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class InitialModel:
    """The initial parameters as a safetensors file, and what they are."""

    path: Path
    layout: Layout
    flavor: str | None


def check(room: Room, destination: Path, timeout_s: float, log: Path | None = None) -> InitialModel:
    """Run the user's code once in its own environment, and keep its initial parameters.

    Args:
        room: the user's interpreter and checkout.
        destination: where the parameters go; appears whole or not at all.
        timeout_s: for loading, and again for the parameters.
        log: file for whatever the code prints.
    Raises:
        InvalidInputError: the code does not load, touches data, or gives no usable parameters.
        FailedError: its process died or was too slow.
    """
    with Guest.start(room, log=log) as guest:
        try:
            loaded = guest.load(timeout_s)
            layout, fd = guest.describe(timeout_s)
        except GuestDied:
            raise
        except GuestError as error:
            raise InvalidInputError(str(error)) from error
        try:
            _keep(fd, destination)
        finally:
            os.close(fd)
    if not layout.tensors:
        raise InvalidInputError(
            "get_model_parameters() gives no arrays - return the model's parameters as a list of numpy arrays"
        )
    return InitialModel(destination, layout, loaded.flavor)


def _keep(fd: int, destination: Path) -> None:
    part = destination.with_name(destination.name + ".part")
    size = os.fstat(fd).st_size
    with part.open("wb") as file:
        for offset in range(0, size, _COPY_BYTES):
            piece = os.pread(fd, _COPY_BYTES, offset)
            if not piece:
                raise FailedError(
                    f"the initial parameters end at byte {offset} of {size} - run the project again"
                )
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    part.rename(destination)
