"""Where services run: deploy, stop, list, watch and read the logs of a project's components.

The port (`Orchestrator`) is what the rest of FLOps sees; adapters are interchangeable and pass one
contract suite (tests/orchestration/test_contract.py). FLOps never schedules across machines itself.
Adapters that drive Docker engines are imported from their modules (`flops.orchestration.docker`), where
they are wanted: the SDK takes 0.3 s.

Promises of every adapter:

- `deploy` is idempotent by name; a name belongs to one running service at most.
- An adapter's word is a hint: services report their own results, and "lost" says that nobody knows.
- `stop` and `remove` leave no process behind, not even one that forked and left the session.
- Services outlive the manager that deployed them; the next one finds them again.
- State changes reach watchers in order, from a thread of the adapter; no watcher is called under a lock.
"""

from flops.orchestration.consumption import consumed, rate
from flops.orchestration.fake import FakeOrchestrator
from flops.orchestration.linux import step_aside
from flops.orchestration.permitted import PermittedOrchestrator
from flops.orchestration.port import (
    LIVE_STATES,
    SECRETS,
    USER_ID,
    File,
    Node,
    Orchestrator,
    ServiceSpec,
    ServiceState,
    ServiceStatus,
    ServiceUsage,
    Subscription,
    Volume,
)
from flops.orchestration.process import ProcessOrchestrator
from flops.orchestration.replacing import deploy_in_place

__all__ = [
    "LIVE_STATES",
    "SECRETS",
    "USER_ID",
    "FakeOrchestrator",
    "File",
    "Node",
    "Orchestrator",
    "PermittedOrchestrator",
    "ProcessOrchestrator",
    "ServiceSpec",
    "ServiceState",
    "ServiceStatus",
    "ServiceUsage",
    "Subscription",
    "Volume",
    "consumed",
    "deploy_in_place",
    "rate",
    "step_aside",
]
