"""Federation: aggregator and agents of a training, the transport between them, and the round loop.

The manager starts both as services (``python -m flops.federation.aggregator``, ``python -m flops.agent``)
with a configuration file each, and hears of them through the aggregator's reports. Nothing here waits
without end, an update counts only when it was checked, and a committed round survives the death of every
process. Importing this package is light: flwr and pyarrow are loaded by the two programs only.
"""

from flops.federation.config import (
    AgentConfig,
    AggregatorConfig,
    DataAccess,
    Link,
    Member,
    Plan,
    ReportTo,
    Tls,
    VirtualLearner,
)
from flops.federation.strategies import check_strategy, strategy_names

__all__ = [
    "AgentConfig",
    "AggregatorConfig",
    "DataAccess",
    "Link",
    "Member",
    "Plan",
    "ReportTo",
    "Tls",
    "VirtualLearner",
    "check_strategy",
    "strategy_names",
]
