"""Flower's programming model over our transport: the one module that touches flwr.

Public parts used: `flwr.app` (messages and records) and `flwr.serverapp` (`Grid`, strategies). One private
touch: `TaskIdentity`, which is global to a process and without which no `Message` can be made;
tests/federation checks it against the installed release. Records are never passed by reference to a
strategy that may change them.
"""

import itertools
import logging
import os
import random
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# Consent comes first: nothing is reported anywhere. These must be set before flwr is imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower_strategies
from flwr.supercore.task_identity import TaskIdentity

from flops.core.errors import FailedError, InvalidInputError
from flops.federation.blocks import Block
from flops.federation.strategies import NEEDS_LOSS_FIRST, Reduction, check_strategy
from flops.federation.updates import Update
from flops_worker.tensors import Layout, views

logging.getLogger("flwr").setLevel(logging.WARNING)

_ARRAYS, _METRICS, _EXAMPLES = "arrays", "metrics", "num-examples"

# Who takes part in a round is chosen before Flower is asked (`cohorts`): it is to take all that it sees.
_EVERYBODY = {
    "fraction_train": 1.0,
    "fraction_evaluate": 1.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
}

Carry = Callable[[Sequence[Message], float | None], list[Message]]


def claim_process(run_id: int = 1) -> None:
    """Let this process make Flower messages. One aggregator, one run a process."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = 1


class ExchangeGrid(Grid):  # type: ignore[misc]
    """Flower's view of the connected learners.

    The node ids are frozen for the length of a strategy call, so a learner that leaves meanwhile cannot make
    Flower's sampling wait without end for its return. Messages are carried by ``carry``, which sends them
    and returns the replies that came within the time limit.
    """

    def __init__(self, carry: Carry) -> None:
        self._carry = carry
        self._nodes: list[int] = []
        self._pushed: dict[str, Message] = {}
        self._run: Any = None
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    def freeze(self, nodes: Iterable[int]) -> None:
        """Set who takes part in the next call."""
        self._nodes = sorted(nodes)

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        if self._run is None:
            raise FailedError("no Flower run is set for this grid - call set_run first")
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages on; they leave with the `pull_messages` that asks for their replies."""
        ids = []
        with self._lock:
            for message in messages:
                message_id = f"message-{next(self._numbers)}"
                message.metadata.__dict__["_message_id"] = message_id
                self._pushed[message_id] = message
                ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        with self._lock:
            messages = [self._pushed.pop(name) for name in list(message_ids) if name in self._pushed]
        return self._carry(messages, None)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._carry(list(messages), timeout)


class FlowerStrategy:
    """One of Flower's strategies, and the reduction that its arithmetic allows."""

    def __init__(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Build it.

        Raises:
            InvalidInputError: an unknown or unsupported strategy, or parameters that it does not take.
        """
        self.reduction = check_strategy(name, parameters)
        self.name = name
        self._grid = ExchangeGrid(_no_carry)
        self._sent: dict[int, Any] = {}
        try:
            self._strategy: Any = getattr(flower_strategies, name)(**{**_EVERYBODY, **parameters})
        except (TypeError, ValueError) as error:
            raise InvalidInputError(
                f"strategy {name} does not accept its parameters: {error} - see training.strategy.parameters"
            ) from error

    def configure(
        self, phase: str, round_number: int, seed: int, nodes: Sequence[int], model: Callable[[], "Arrays"]
    ) -> dict[int, dict[str, Any]]:
        """What each learner of a cohort is told.

        Args:
            phase: "train" or "evaluate".
            seed: of the project, for strategies that use chance.
            nodes: ids of the cohort.
            model: makes the global model's arrays, for the strategies that look at them.
        Returns:
            the configuration to send, by node id.
        """
        if not nodes:
            return {}
        self._grid.freeze(nodes)
        arrays = ArrayRecord()
        if phase == "train" and self.reduction is not Reduction.MEAN:
            arrays = _record(model())
        # Flower uses the global generators; a round must come out alike after a restart.
        random.seed(f"{seed}-{round_number}-{phase}")
        np.random.seed(abs(hash((seed, round_number, phase == "train"))) % (1 << 32))
        configure = self._strategy.configure_train if phase == "train" else self._strategy.configure_evaluate
        messages = list(configure(round_number, arrays, ConfigRecord(), self._grid))
        if phase == "train":
            self._sent = {message.metadata.dst_node_id: message for message in messages}
        return {
            message.metadata.dst_node_id: {
                key: value
                for record in message.content.config_records.values()
                for key, value in record.items()
                if isinstance(value, (bool, int, float, str))
            }
            for message in messages
        }

    def apply_mean(
        self, round_number: int, mean: "Arrays", metrics: Mapping[str, float], weight: float
    ) -> list[np.ndarray[Any, Any]]:
        """Let a server optimiser (FedAdam, FedAvgM, ...) make its step from the mean of all updates.

        The weighted mean of one reply is that reply, so the strategy sees exactly what it would have computed
        from all the updates, which need not be in memory.
        """
        return self._aggregate(round_number, [self._reply(self._any_node(), mean, metrics, weight)])

    def apply_blocks(
        self, round_number: int, blocks: Iterable[Block], updates: Sequence[tuple[int, Update]]
    ) -> Iterable[tuple[Block, np.ndarray[Any, Any]]]:
        """Aggregate block by block, for strategies that treat every parameter by itself."""
        for block in blocks:
            replies = [
                self._reply(node, {"0": update.body.read(block)}, {}, update.num_examples)
                for node, update in updates
            ]
            yield block, self._aggregate(round_number, replies)[0]

    def apply_all(
        self, round_number: int, keys: Sequence[str], updates: Sequence[tuple[int, Update]]
    ) -> list[np.ndarray[Any, Any]]:
        """Aggregate whole updates, for strategies that compare learners with each other."""
        replies = [
            self._reply(
                node,
                dict(zip(keys, update.body.arrays(), strict=True)),
                self._needed_metrics(update),
                update.num_examples,
            )
            for node, update in updates
        ]
        return self._aggregate(round_number, replies)

    def _needed_metrics(self, update: Update) -> dict[str, float]:
        # Flower refuses replies whose metrics differ by name; learners may report what they like.
        return {"train_loss": update.metrics["train_loss"]} if self.name in NEEDS_LOSS_FIRST else {}

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """The server optimiser's own arrays after a round, by name."""
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        for attribute in ("m_t", "v_t"):
            for key, value in (getattr(self._strategy, attribute, None) or {}).items():
                arrays[f"{attribute}/{key}"] = np.asarray(value)
        for position, value in enumerate(getattr(self._strategy, "momentum_vector", None) or []):
            arrays[f"momentum_vector/{position}"] = np.asarray(value)
        return arrays

    def restore(self, state: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Put back what `state` returned."""
        for attribute in ("m_t", "v_t"):
            values = {
                name.partition("/")[2]: value
                for name, value in state.items()
                if name.startswith(f"{attribute}/")
            }
            if values:
                setattr(self._strategy, attribute, values)
        momentum = [value for name, value in state.items() if name.startswith("momentum_vector/")]
        if momentum:
            self._strategy.momentum_vector = momentum

    def _any_node(self) -> int:
        node: int = next(iter(self._sent))
        return node

    def _reply(self, node: int, arrays: "Arrays", metrics: Mapping[str, float], weight: float) -> Message:
        content = RecordDict(
            {
                _ARRAYS: _record(arrays),
                _METRICS: MetricRecord({**metrics, _EXAMPLES: weight}),
            }
        )
        return Message(content, reply_to=self._sent[node])

    def _aggregate(self, round_number: int, replies: list[Message]) -> list[np.ndarray[Any, Any]]:
        try:
            arrays, _ = self._strategy.aggregate_train(round_number, replies)
        except Exception as error:  # a strategy may raise anything; the round fails with its words
            raise FailedError(
                f"strategy {self.name} could not aggregate round {round_number}: {error}"
            ) from error
        if arrays is None:
            raise FailedError(
                f"strategy {self.name} made no model of the {len(replies)} updates of round {round_number} - "
                "it needs more learners, or other parameters"
            )
        return [array.numpy() for array in arrays.values()]


Arrays = Mapping[str, np.ndarray[Any, Any]]


def layout_arrays(layout: Layout, body: Any) -> Arrays:
    """The arrays of a flat body by their keys."""
    return dict(zip((tensor.key for tensor in layout.tensors), views(layout, body), strict=True))


def _record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({key: Array(np.asarray(value)) for key, value in arrays.items()})


def _no_carry(messages: Sequence[Message], timeout: float | None) -> list[Message]:
    raise FailedError("this grid only samples learners; the round loop sends the messages")
