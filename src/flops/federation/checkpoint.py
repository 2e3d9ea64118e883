"""Checkpoints: a round counts when it stands in ``state.json``, and not before.

The folder holds the current global model, the best one, the server optimiser's state, and ``state.json``,
which names them and is replaced atomically. A killed aggregator starts again from the last committed round.
`BEST` is a second name of the best committed model, put right after each commit and at each start.
The files survive the death of every process; a power cut may cost the rounds that the kernel had not
written out yet.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flops.core.errors import FailedError
from flops.federation.model_file import ModelFile, write_arrays
from flops_worker.tensors import Layout, views

BEST = "model.safetensors"


@dataclass
class Committed:
    """The last committed round, and what has to be known to go on after it."""

    round: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    best_round: int = 0
    """0: none is chosen here."""
    best_metrics: dict[str, float] = field(default_factory=dict)
    slowest_s: float | None = None
    """The longest that an accepted learner took for an answer, so far; deadlines derive from it."""
    history: dict[str, Any] = field(default_factory=dict)
    """What is remembered of each member; see `cohorts.History`."""
    ejected: dict[str, str] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    """What is reported of the round, should the aggregator be killed between its commit and its report."""
    cycle: int = 0
    """Of a cluster: the cycle that the round belongs to."""
    model_of: int = 0
    """Of a cluster: the version of its parent's model that the cycle started from."""
    update: dict[str, Any] = field(default_factory=dict)
    """Of a cluster: what it passes on beside the sum of this round."""


class Checkpoint:
    """The state folder of one aggregator."""

    def __init__(self, folder: Path, initial_model: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder = folder
        self._initial = initial_model
        for part in folder.glob("*.part"):
            part.unlink()
        self.committed = self._read()
        self._name_best()

    def model(self) -> ModelFile:
        """The global model after the last committed round.

        Raises:
            FailedError: the file is missing or damaged.
        """
        try:
            return ModelFile.open(self._model_path(self.committed.round))
        except OSError as error:
            raise FailedError(
                f"the model of round {self.committed.round} cannot be opened: {error} - "
                "start the project again"
            ) from error

    def model_path(self, round_number: int) -> Path:
        """Where the global model of a round is written before its commit."""
        return self._model_path(round_number)

    def best_model(self) -> Path:
        return self.folder / BEST

    def commit(
        self,
        state: Committed,
        strategy_state: Mapping[str, np.ndarray[Any, Any]],
        is_best: bool,
        keep: Path | None = None,
    ) -> None:
        """Make a round count; its model file is in place already.

        Args:
            keep: another file of the folder that belongs to this state; those of earlier ones go.
        """
        if strategy_state:
            layout = _keyed(Layout.of(list(strategy_state.values())), list(strategy_state))
            write_arrays(
                layout, list(strategy_state.values()), self._strategy_path(state.round), durable=False
            ).close()
        if is_best:
            best = self._best_path(state.round)
            best.unlink(missing_ok=True)
            os.link(self._model_path(state.round), best)
        temporary = self.folder / "state.json.part"
        temporary.write_text(json.dumps(vars(state)))
        temporary.rename(self.folder / "state.json")
        self.committed = state
        self._name_best()
        kept = {
            self._model_path(state.round),
            self._strategy_path(state.round),
            self._best_path(state.best_round),
            keep,
        }
        for path in self.folder.glob("*-*.safetensors"):
            if path not in kept:
                path.unlink()

    def strategy_state(self) -> dict[str, np.ndarray[Any, Any]]:
        path = self._strategy_path(self.committed.round)
        if not path.exists():
            return {}
        file = ModelFile.open(path)
        try:
            arrays = views(file.layout, file.body)
            return {
                tensor.key: array.copy() for tensor, array in zip(file.layout.tensors, arrays, strict=True)
            }
        finally:
            file.close()

    def _model_path(self, round_number: int) -> Path:
        return self._initial if round_number == 0 else self.folder / f"global-{round_number}.safetensors"

    def _best_path(self, round_number: int) -> Path:
        return self.folder / f"best-{round_number}.safetensors"

    def _name_best(self) -> None:
        """Let `BEST` be the best model of the committed rounds, whatever a killed life left there.

        Raises:
            FailedError: that model is missing.
        """
        best = self._best_path(self.committed.best_round)
        if self.committed.best_round == 0 or (
            self.best_model().exists() and best.exists() and best.samefile(self.best_model())
        ):
            return
        link = self.folder / "best.part"
        link.unlink(missing_ok=True)
        try:
            os.link(best, link)
        except OSError as error:
            raise FailedError(
                f"the best model, of round {self.committed.best_round}, cannot be opened: {error} - "
                "start the project again"
            ) from error
        link.rename(self.best_model())

    def _strategy_path(self, round_number: int) -> Path:
        return self.folder / f"strategy-{round_number}.safetensors"

    def _read(self) -> Committed:
        path = self.folder / "state.json"
        if not path.exists():
            return Committed()
        try:
            return Committed(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise FailedError(
                f"the checkpoint '{path}' is damaged: {error} - start the project again"
            ) from error


def _keyed(layout: Layout, keys: list[str]) -> Layout:
    from dataclasses import replace

    return Layout(tuple(replace(tensor, key=key) for tensor, key in zip(layout.tensors, keys, strict=True)))
