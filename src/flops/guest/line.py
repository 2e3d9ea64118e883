"""The line to a worker process: one request at a time, from any thread, and what comes back of it."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from flops.guest import results
from flops.guest.errors import GuestClosed, GuestDied, GuestError, GuestTimeout
from flops_worker import channel
from flops_worker.models import LayoutReader
from flops_worker.tensors import Layout, LayoutError

Result = TypeVar("Result")
Dataset = Callable[[], Sequence[int]]

_STEPS = {
    "load": "model_manager.py",
    "describe": "get_model_parameters",
    "load_data": "set_model_data",
    "fit": "fit_model",
    "evaluate": "evaluate_model",
    "export": "export",
    "leave": "leave",
}
_DEATH_DEADLINE_S = 5.0


class Peer(Protocol):
    """The process at the other end, as far as a line needs it: one of ours (`flops.guest.process`), or one in
    a container of its own (`flops.guest.attached`).
    """

    channel: socket.socket

    @property
    def exit_code(self) -> int | None: ...

    @property
    def signal(self) -> str | None: ...

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """Its next message; raises as `channel.receive` does."""
        ...

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end by itself, or for news of it."""
        ...

    def end(self) -> None:
        """See to it that it is gone."""
        ...

    def last_lines(self) -> list[str]:
        """The last lines it printed."""
        ...


class Line:
    """Requests and answers; they take turns. `shut` and `free` may be called while one is under way."""

    def __init__(self, process: Peer) -> None:
        self.process = process
        self._asking = threading.Lock()
        self._closed = False
        self._dataset_error: BaseException | None = None
        self._reader = LayoutReader()
        self._reading = threading.Lock()

    def ask(
        self,
        operation: str,
        request: Mapping[str, Any],
        files: Sequence[int],
        timeout_s: float | None,
        dataset: Dataset | None,
    ) -> dict[str, Any]:
        """Send one request and return its answer; user code's own failures are raised.

        Args:
            dataset: answers user code that loads data meanwhile.
        """
        where = _STEPS[operation]
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        sock = self.process.channel
        with self._asking:
            if self._closed:
                raise GuestClosed(where=where)
            self._dataset_error = None
            try:
                sock.settimeout(timeout_s)
                channel.send(sock, {"op": operation, **request}, files)
                answer = self._receive(deadline)
                while "ask" in answer:
                    self._give(dataset)
                    answer = self._receive(deadline)
            except TimeoutError:
                self.shut()
                self.process.end()
                raise GuestTimeout(where=where, timeout_s=timeout_s or 0.0) from None
            except channel.ChannelClosed as error:
                raise self._end_of(where) from error
            dataset_error = self._dataset_error
        if answer.get("ok") is True:
            return answer
        if dataset_error is not None:
            raise dataset_error
        raise checked(operation, lambda: _failure(answer))

    def layout(self, fd: int) -> Layout:
        """Layout of a model file that user code wrote; one that repeats is not parsed again."""
        with self._reading:
            return self._reader.read(fd)[0]

    def shut(self, *, dismiss: bool = False) -> None:
        """Close the channel under whoever waits on it; an idle worker sees it and exits.

        Args:
            dismiss: tell the worker that there is nothing more to do, so that nobody starts it again.
        """
        self._closed = True
        if dismiss:
            for _ in ("the worker", "its keeper, which may kill it before it has read on"):
                channel.offer(self.process.channel, {"op": "end"})
        with contextlib.suppress(OSError):
            self.process.channel.shutdown(socket.SHUT_RDWR)

    def free(self) -> None:
        """End the process, and free what belongs to it."""
        self.process.end()
        with self._asking:  # a request that was blocked is out by now, or in `dataset`
            self.process.channel.close()

    def _receive(self, deadline: float | None) -> dict[str, Any]:
        sock = self.process.channel
        if deadline is not None:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
        answer, files = self.process.receive()
        channel.close_all(files)  # the worker never sends any
        return answer

    def _give(self, dataset: Dataset | None) -> None:
        """Answer the worker's question for its data; an error goes to user code, and is kept for ours."""
        sock = self.process.channel
        files: list[int] = []
        try:
            if dataset is None:
                raise LookupError("no data were given to this guest")
            files = list(dataset())
        except Exception as error:  # noqa: BLE001 - not swallowed: raised when user code fails of it
            self._dataset_error = error
            channel.send(sock, {"error": str(error)})
            return
        try:
            for start in range(0, max(1, len(files)), channel.MAX_FILES):
                part = files[start : start + channel.MAX_FILES]
                channel.send(sock, {"more": start + len(part) < len(files)}, part)
        finally:
            channel.close_all(files)

    def _end_of(self, where: str) -> GuestError:
        """The channel is closed: by us, or because the process ended."""
        if self._closed:
            return GuestClosed(where=where)
        self.shut()
        self.process.wait(_DEATH_DEADLINE_S)
        self.process.end()
        return GuestDied(
            where=where,
            exit_code=self.process.exit_code,
            signal=self.process.signal,
            log=self.process.last_lines(),
        )


def checked(operation: str, read: Callable[[], Result]) -> Result:
    """Read an answer that may be anything.

    Raises:
        GuestError: it cannot be read.
    """
    try:
        return read()
    except (LayoutError, KeyError, TypeError, ValueError, OSError) as error:
        where = _STEPS[operation]
        raise GuestError(
            f"{where} of the repository left an answer that cannot be read ({error})"
            " - mend the repository's code",
            where=where,
            type="ContractError",
            message=str(error),
        ) from error


def _failure(answer: Mapping[str, Any]) -> GuestError:
    """The worker's report of an exception, as an error."""
    where, kind = results.text(answer, "where"), results.text(answer, "type")
    message = results.text(answer, "message")
    location = results.optional_text(answer, "location")
    if answer.get("contract") is True:
        text = message
    else:
        advice = (
            "add the package to conda.yaml or requirements.txt"
            if kind == "ModuleNotFoundError"
            else "mend the repository's code"
        )
        place = f" ({location})" if location else ""
        text = f"{where} raised {kind}: {message[:500]}{place} - {advice}"
    return GuestError(
        text, where=where, type=kind, message=message, traceback=results.texts(answer, "traceback")
    )
