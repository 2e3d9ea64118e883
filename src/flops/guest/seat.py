"""A learner's seat in a worker process: one method for each thing user code is asked to do.

The hot path is one message there and one back on a Unix socket, without threads: parameters lie in files that
both sides map, and headers that repeat are not parsed again.
"""

import contextlib
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flops.guest import results
from flops.guest.errors import GuestClosed, GuestDied
from flops.guest.line import Dataset, Line, checked
from flops.guest.results import EvaluateResult, ExportResult, FitResult, Loaded
from flops_worker.models import LayoutReader
from flops_worker.tensors import Layout

Config = Mapping[str, bool | int | float | str]


class Seat:
    """One learner's ModelManager, with its own data, state and random numbers.

    Requests block; those of all seats of a process take turns. Each takes ``timeout_s`` (None: no limit) and
    raises

    - `GuestError`: user code raised; the guest lives and can be asked again
    - `GuestDied`: its process ended; `GuestTimeout`: it was too slow and was killed; `GuestClosed`: by us.
      All seats of the process have ended with it.

    Model files (``model_fd``) are open files in the safetensors format. User code may keep the arrays of any
    round, so a file must not change once it was given: take a fresh one for each round.
    """

    def __init__(self, line: Line, key: int, seed: int, dataset: Dataset | None) -> None:
        self._line = line
        self._key = key
        self._seed = seed
        self._dataset = dataset
        self._update_fd = -1
        self._changing = threading.Lock()

    def load(self, timeout_s: float | None = None) -> Loaded:
        """Import the repository, once in a process, and construct this learner's ModelManager."""
        answer = self._ask("load", [], timeout_s)
        return checked(
            "load",
            lambda: Loaded(results.optional_text(answer, "flavor"), results.text(answer, "python_version")),
        )

    def describe(self, timeout_s: float | None = None) -> tuple[Layout, int]:
        """The initial parameters, as an open model file that the caller closes; no data are needed."""
        fd = open_model_file("initial")
        try:
            self._ask("describe", [fd], timeout_s)
            return checked("describe", lambda: LayoutReader().read(fd)[0]), fd
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
            seed: for this round; default: the seat's own.
            config: handed to ``ModelManager.configure_round`` where there is one.
        """
        update_fd = self._update_file()
        answer = self._ask(
            "fit", [model_fd, update_fd], timeout_s, round_number, seed=seed, config=dict(config or {})
        )
        return checked(
            "fit",
            lambda: FitResult(
                num_examples=results.count(answer, "num_examples"),
                metrics=results.metrics(answer),
                layout=self._line.layout(update_fd),
                update_fd=update_fd,
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
        return checked(
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
        return checked(
            "export",
            lambda: ExportResult(
                flavor=results.optional_text(answer, "flavor"),
                signature=results.optional_text(answer, "signature"),
                input_example=bool(answer.get("input_example")),
                mlflow_version=results.optional_text(answer, "mlflow_version"),
                warnings=results.texts(answer, "warnings"),
            ),
        )

    def drop_update(self) -> None:
        """Free the last fit's update (its ``update_fd`` is closed); the next fit makes a new file."""
        with self._changing:
            if self._update_fd >= 0:
                os.close(self._update_fd)
                self._update_fd = -1

    def leave(self, timeout_s: float | None = None) -> None:
        """Give the seat back: the process forgets this learner's ModelManager."""
        self.drop_update()
        with contextlib.suppress(GuestClosed, GuestDied):  # and so it has
            self._ask("leave", [], timeout_s)

    def _update_file(self) -> int:
        with self._changing:
            if self._update_fd < 0:
                self._update_fd = open_model_file("update")
            return self._update_fd

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
        request |= {
            "learner": self._key,
            "round": round_number,
            "seed": self._seed if seed is None else seed,
        }
        return self._line.ask(operation, request, files, timeout_s, self._dataset)


def open_model_file(name: str) -> int:
    """An empty anonymous file for a model: in memory where the platform has memfd, else unlinked on disk."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(f"flops-{name}", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
