"""The door to the data: how ``load_dataset()`` in user code reaches the learner's fragments.

Every learner has its own. It is shut until the learner's data are asked for on purpose (`set_model_data`),
because code that loads data while it is imported or constructed cannot run where there are none: at the
contract check and at export.
"""

from __future__ import annotations

from typing import Callable, List, Optional

from flops_worker.failures import ContractError

_WHAT = {
    "model_manager.py": "importing model_manager.py",
    "ModelManager()": "the constructor of ModelManager",
}


class Door:
    """The door of one learner; the session opens and shuts it."""

    def __init__(self) -> None:
        self._ask: Optional[Callable[[], List[int]]] = None
        self._where: Optional[str] = None
        self.refusal: Optional[ContractError] = None
        """Set by the first request that found the door shut; it is the cause of whatever came of it."""

    def open(self, ask: Callable[[], List[int]]) -> None:
        """From now on data are answered by `ask`, which returns open Arrow IPC files."""
        self._ask = ask
        self.refusal = None

    def watch(self, where: str) -> None:
        """User code of the step `where` runs next; without data a request is its mistake."""
        self._where = where

    def check(self) -> None:
        """Raise the refusal again, for code that swallowed it.

        Raises:
            ContractError: data were asked for while the door was shut.
        """
        if self.refusal is not None:
            raise self.refusal

    def request(self) -> List[int]:
        """Open files of all matching fragments; the caller owns them.

        Raises:
            ContractError: this code may not load data at this moment.
            LookupError: the agent has no data to give; the text is its own.
        """
        if self._ask is not None:
            return self._ask()
        if self._where is None:
            raise RuntimeError(
                "load_dataset() answers only in learners that FLOps starts - start it with 'flops run'"
            )
        self.refusal = ContractError(
            f"{_WHAT.get(self._where, self._where)} loads data - move the loading to set_model_data(),"
            " which runs on learners only"
        )
        raise self.refusal


class Entrance:
    """Where user code asks for data: it finds the door of the learner whose turn it is."""

    def __init__(self) -> None:
        self.door = Door()

    def request(self) -> List[int]:
        """See `Door.request`."""
        return self.door.request()


entrance = Entrance()
