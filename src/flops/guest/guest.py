"""The guest as its caller sees it: one method for each thing user code is asked to do.

The hot path is one message there and one back on a Unix socket, without threads: parameters lie in files that
both sides map, and headers that repeat are not parsed again.
"""

import contextlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from flops.guest import results
from flops.guest.errors import GuestClosed, GuestDied, GuestError, GuestTimeout
from flops.guest.process import Isolation, Process
from flops.guest.results import EvaluateResult, ExportResult, FitResult, Loaded
from flops.guest.room import Room
from flops_worker import channel
from flops_worker.models import LayoutReader
from flops_worker.tensors import Layout, LayoutError

Result = TypeVar("Result")
Config = Mapping[str, bool | int | float | str]

_STEPS = {
    "load": "model_manager.py",
    "describe": "get_model_parameters",
    "load_data": "set_model_data",
    "fit": "fit_model",
    "evaluate": "evaluate_model",
    "export": "export",
}
_DEATH_DEADLINE_S = 5.0


class Guest:
    """User code, alive from `start` to `close`.

    Requests block and are answered one at a time. Each takes ``timeout_s`` (None: no limit) and raises

    - `GuestError`: user code raised; the guest lives and can be asked again
    - `GuestDied`: its process ended; `GuestTimeout`: it was too slow and was killed; `GuestClosed`: by us

    Model files (``model_fd``) are open files in the safetensors format. User code may keep the arrays of any
    round, so a file must not change once it was given: take a fresh one for each round.
    """

    def __init__(self, process: Process, seed: int, dataset: Callable[[], Sequence[int]] | None) -> None:
        self._process = process
        self._seed = seed
        self._dataset = dataset
        self._dataset_error: BaseException | None = None
        self._asking = threading.Lock()
        self._closed = False
        self._update_fd = open_model_file("update")
        self._reader = LayoutReader()

    @classmethod
    def start(
        cls,
        room: Room,
        *,
        log: Path | None = None,
        isolate: bool = True,
        threads: int | None = None,
        seed: int = 0,
        dataset: Callable[[], Sequence[int]] | None = None,
        memory_mb: int | None = None,
    ) -> "Guest":
        """Start the user's interpreter on the user's checkout; imports nothing of it yet.

        Args:
            log: file that everything it prints is appended to.
            isolate: cut its network where the platform allows it, and drop root's privileges.
            threads: how many threads numerical libraries use in it.
            seed: of all random numbers, together with the round.
            dataset: called (in the thread of the request) when user code loads data; returns open Arrow IPC
                files, which are closed here. What it raises is raised by the request.
            memory_mb: limit of its private memory (RLIMIT_DATA).
        Raises:
            NotFoundError: interpreter or checkout are not there.
        """
        return cls(
            Process(room, log=log, isolate=isolate, threads=threads, memory_mb=memory_mb), seed, dataset
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def isolation(self) -> Isolation:
        return self._process.isolation

    def load(self, timeout_s: float | None = None) -> Loaded:
        """Import the repository and construct its ModelManager."""
        answer = self._ask("load", [self._update_fd], timeout_s)
        return self._checked(
            "load",
            lambda: Loaded(results.optional_text(answer, "flavor"), results.text(answer, "python_version")),
        )

    def describe(self, timeout_s: float | None = None) -> tuple[Layout, int]:
        """The initial parameters, as an open model file that the caller closes; no data are needed."""
        fd = open_model_file("initial")
        try:
            self._ask("describe", [fd], timeout_s)
            return self._checked("describe", lambda: LayoutReader().read(fd)[0]), fd
        except BaseException:
            os.close(fd)
            raise

    def load_data(self, timeout_s: float | None = None) -> None:
        """Let user code load the learner's data; from now on it may ask for them."""
        self._ask("load_data", [], timeout_s)

    def fit(
        self,
        model_fd: int,
        round_number: int,
        seed: int | None = None,
        config: Config | None = None,
        timeout_s: float | None = None,
    ) -> FitResult:
        """Train the model on the learner's data.

        Args:
            seed: for this round; default: the guest's own.
            config: handed to ``ModelManager.configure_round`` where there is one.
        """
        answer = self._ask("fit", [model_fd], timeout_s, round_number, seed=seed, config=dict(config or {}))
        return self._checked(
            "fit",
            lambda: FitResult(
                num_examples=results.count(answer, "num_examples"),
                metrics=results.metrics(answer),
                layout=self._reader.read(self._update_fd)[0],
                update_fd=self._update_fd,
                fit_s=results.duration(answer, "fit_s"),
            ),
        )

    def evaluate(
        self,
        model_fd: int,
        round_number: int,
        config: Config | None = None,
        timeout_s: float | None = None,
    ) -> EvaluateResult:
        """Judge the model on the learner's data."""
        answer = self._ask("evaluate", [model_fd], timeout_s, round_number, config=dict(config or {}))
        return self._checked(
            "evaluate",
            lambda: EvaluateResult(
                loss=results.number(answer, "loss"),
                accuracy=results.number(answer, "accuracy"),
                num_examples=results.count(answer, "num_examples"),
                metrics=results.metrics(answer),
            ),
        )

    def export(
        self,
        model_fd: int,
        directory: Path,
        flavor: str | None = None,
        name: str | None = None,
        requirements: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> ExportResult:
        """Save the model in its MLflow flavor (None: detected); the environment must hold mlflow.

        Args:
            directory: the MLflow model folder to make.
            name: kept in the model's metadata.
            requirements: PEP 508, kept as what the model needs.
        """
        answer = self._ask(
            "export",
            [model_fd],
            timeout_s,
            directory=str(directory.absolute()),
            flavor=flavor,
            name=name,
            requirements=list(requirements),
        )
        return self._checked(
            "export",
            lambda: ExportResult(
                flavor=results.optional_text(answer, "flavor"),
                signature=results.optional_text(answer, "signature"),
                input_example=bool(answer.get("input_example")),
                mlflow_version=results.optional_text(answer, "mlflow_version"),
                warnings=results.texts(answer, "warnings"),
            ),
        )

    def close(self, grace_s: float = 2.0) -> None:
        """End the guest: at once when it is idle, else `grace_s` later; requests under way end too."""
        self._shut()
        self._process.wait(grace_s)
        self._free()

    def kill(self) -> None:
        """End the guest now."""
        self._shut()
        self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(
        self,
        operation: str,
        files: Sequence[int],
        timeout_s: float | None,
        round_number: int = 0,
        *,
        seed: int | None = None,
        **request: Any,
    ) -> dict[str, Any]:
        """Send one request and return its answer; user code's own failures are raised."""
        where = _STEPS[operation]
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        request |= {"op": operation, "round": round_number, "seed": self._seed if seed is None else seed}
        sock = self._process.channel
        with self._asking:
            if self._closed:
                raise GuestClosed(where=where)
            self._dataset_error = None
            try:
                sock.settimeout(timeout_s)
                channel.send(sock, request, files)
                answer = self._receive(deadline)
                while "ask" in answer:
                    self._give_dataset()
                    answer = self._receive(deadline)
            except TimeoutError:
                self._shut()
                self._process.end()
                raise GuestTimeout(where=where, timeout_s=timeout_s or 0.0) from None
            except channel.ChannelClosed as error:
                raise self._end_of(where) from error
        if answer.get("ok") is True:
            return answer
        if self._dataset_error is not None:
            raise self._dataset_error
        raise self._checked(operation, lambda: _failure(answer))

    def _receive(self, deadline: float | None) -> dict[str, Any]:
        sock = self._process.channel
        if deadline is not None:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
        answer, files = channel.receive(sock)
        channel.close_all(files)  # the worker never sends any
        return answer

    def _give_dataset(self) -> None:
        """Answer the worker's question for its data; an error goes to user code, and is kept for ours."""
        sock = self._process.channel
        files: list[int] = []
        try:
            if self._dataset is None:
                raise LookupError("no data were given to this guest")
            files = list(self._dataset())
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

    def _checked(self, operation: str, read: Callable[[], Result]) -> Result:
        """Read an answer that may be anything."""
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

    def _end_of(self, where: str) -> GuestError:
        """The channel is closed: by us, or because the process ended."""
        if self._closed:
            return GuestClosed(where=where)
        self._shut()
        self._process.wait(_DEATH_DEADLINE_S)
        self._process.end()
        return GuestDied(
            where=where,
            exit_code=self._process.exit_code,
            signal=self._process.signal,
            log=self._process.last_lines(),
        )

    def _shut(self) -> None:
        """Close the channel under whoever waits on it; an idle worker sees it and exits."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._process.channel.shutdown(socket.SHUT_RDWR)

    def _free(self) -> None:
        self._process.end()
        with self._asking:  # a request that was blocked is out by now, or in `dataset`
            self._process.channel.close()
            if self._update_fd >= 0:
                os.close(self._update_fd)
                self._update_fd = -1


def open_model_file(name: str) -> int:
    """An empty anonymous file for a model: in memory where the platform has memfd, else unlinked on disk."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(f"flops-{name}", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


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
