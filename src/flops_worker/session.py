"""The session: one checkout, imported once, and its learners; answers one request at a time.

A learner is a number in the request. Whatever user code raises becomes an answer, and concerns that learner
alone; only the end of the process or of the channel ends the session. Requests are ``{"op", "learner",
"seed", "round", ...}``; answers are ``{"ok": true, ...}`` or a report of `failures`.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from typing import Any, Callable, Dict, List

import numpy as np

from flops_worker import DISMISSED, channel, contract, models
from flops_worker.door import Door, entrance
from flops_worker.failures import ContractError, report
from flops_worker.flavors import flavor_of
from flops_worker.seeding import seed_everything
from flops_worker.tensors import Layout

Answer = Dict[str, Any]


class Session:
    """Serves requests over `sock` with the code in the folder `code`."""

    def __init__(self, sock: socket.socket, code: str) -> None:
        self._sock = sock
        self._code = code
        self._mapper = models.ModelMapper()
        self._learners: Dict[int, Learner] = {}

    def serve(self) -> bool:
        """Answer requests until the other side says that it was the last, or closes the channel (False)."""
        owner = os.getpid()
        while True:
            try:
                request, files = channel.receive(self._sock)
            except channel.ChannelClosed:
                return False
            if request["op"] == "end":
                return True
            learner = self._learner(request["learner"])
            try:
                seed_everything(request["seed"], request["round"])
                answer = self._answer(learner, request, files)
            except BaseException as error:
                answer = report(learner.where, learner.door.refusal or error, self._code)
            finally:
                channel.close_all(files)
            if os.getpid() != owner:
                os._exit(0)  # user code forked and its child came back here: the channel is not the child's
            try:
                channel.send(self._sock, answer)
            except channel.ChannelClosed:
                return False

    def _learner(self, key: int) -> Learner:
        """A learner, whose turn it is now."""
        learner = self._learners.get(key)
        if learner is None:
            learner = self._learners[key] = Learner(self._code, self._mapper, self._ask_for_data)
        entrance.door = learner.door
        return learner

    def _answer(self, learner: Learner, request: Answer, files: List[int]) -> Answer:
        if request["op"] == "leave":
            del self._learners[request["learner"]]
            return {"ok": True}
        return learner.operations[request["op"]](request, files)

    def _ask_for_data(self) -> List[int]:
        """Open Arrow IPC files from the agent, which answers in one or more messages."""
        channel.send(self._sock, {"ask": "dataset"})
        received: List[int] = []
        more = True
        while more:
            answer, files = channel.receive(self._sock)
            received += files
            if answer.get("op") == "end":
                os._exit(DISMISSED)  # user code waits for data, and nobody for it
            if "error" in answer:
                channel.close_all(received)
                raise LookupError(answer["error"])
            more = bool(answer.get("more"))
        return received


class Learner:
    """One learner: its ModelManager, alive over all rounds, and its door to the data."""

    def __init__(self, code: str, mapper: models.ModelMapper, ask_for_data: Callable[[], List[int]]) -> None:
        self._code = code
        self._mapper = mapper
        self._ask_for_data = ask_for_data
        self._manager: Any = None
        self.door = Door()
        self.where = "model_manager.py"
        self.operations: Dict[str, Callable[[Answer, List[int]], Answer]] = {
            "load": self._load,
            "describe": self._describe,
            "load_data": self._load_data,
            "fit": self._fit,
            "evaluate": self._evaluate,
            "export": self._export,
        }

    def _load(self, request: Answer, files: List[int]) -> Answer:
        """Import the repository, if no other learner has, and construct a ModelManager."""
        self._enter("model_manager.py")
        # One import serves all learners of a process, so random numbers in it cannot be those of any of them.
        seed_everything(0, 0)
        kind = contract.import_manager(self._code)
        self.door.check()
        self._enter("ModelManager()")
        seed_everything(request["seed"], request["round"])  # PyTorch may be there only now
        self._manager = kind()
        self.door.check()
        self._enter("get_model")
        flavor = flavor_of(self._manager.get_model())
        self.door.check()
        return {"ok": True, "flavor": flavor, "python_version": platform.python_version()}

    def _describe(self, request: Answer, files: List[int]) -> Answer:
        """Write the initial parameters to ``files[0]``, and try that the model takes them back."""
        self._enter("get_model_parameters")
        layout = models.write(files[0], self._parameters())
        self.door.check()
        self._set_parameters(files[0])
        self.door.check()
        self._enter("get_model_parameters")
        difference = layout.difference(Layout.of(self._parameters()))
        if difference:
            raise ContractError(
                f"get_model_parameters returned {difference} after set_model_parameters was given its own"
                " parameters - both must use the same arrays in the same order"
            )
        return {"ok": True}

    def _load_data(self, request: Answer, files: List[int]) -> Answer:
        self.door.open(self._ask_for_data)
        self._enter("set_model_data")
        self._loaded().set_model_data()
        return {"ok": True}

    def _fit(self, request: Answer, files: List[int]) -> Answer:
        """Train from the model in ``files[0]`` and write the update to ``files[1]``."""
        self._set_parameters(files[0])
        configure = getattr(self._manager, "configure_round", None)
        if callable(configure):
            self._enter("configure_round")
            configure(request["config"])
        self._enter("fit_model")
        started = time.perf_counter()
        result = self._manager.fit_model()
        fit_s = time.perf_counter() - started
        num_examples, metrics = contract.fit_result(result)
        self._enter("get_model_parameters")
        models.write(files[1], self._parameters())
        return {"ok": True, "num_examples": num_examples, "metrics": metrics, "fit_s": fit_s}

    def _evaluate(self, request: Answer, files: List[int]) -> Answer:
        self._set_parameters(files[0])
        self._enter("evaluate_model")
        loss, accuracy, num_examples, metrics = contract.evaluation(self._manager.evaluate_model())
        return {
            "ok": True,
            "loss": loss,
            "accuracy": accuracy,
            "num_examples": num_examples,
            "metrics": metrics,
        }

    def _export(self, request: Answer, files: List[int]) -> Answer:
        from flops_worker import export

        self._set_parameters(files[0])
        self._enter("get_model")
        model = self._manager.get_model()
        self.door.check()
        self._enter("export")
        return {
            "ok": True,
            **export.save(
                model,
                example=getattr(self._manager, "get_input_example", None),
                directory=request["directory"],
                flavor=request["flavor"] or flavor_of(model),
                name=request["name"],
                requirements=request["requirements"],
                code=self._code,
            ),
        }

    def _enter(self, where: str) -> None:
        """Name the next step of user code, for errors."""
        self.where = where
        self.door.watch(where)

    def _set_parameters(self, fd: int) -> None:
        self._enter("the model file")
        manager = self._loaded()
        _, arrays = self._mapper.map(fd)
        self._enter("set_model_parameters")
        manager.set_model_parameters(arrays)

    def _parameters(self) -> List[np.ndarray[Any, Any]]:
        return contract.parameters(self._loaded().get_model_parameters())

    def _loaded(self) -> Any:
        if self._manager is None:
            raise ContractError("ModelManager was not constructed - load the repository first")
        return self._manager
