"""Machines of data owners that have joined: how they are let in, what they hold and allow, what they are
wanted to run.

Owns: the tables ``join_tokens``, ``joined_nodes`` and ``node_services``.
Promises: a join token makes one node, once; a node's credential is known here by its hash alone, and dead the
moment the node has left; what is wanted of a node, and what it said, are committed rows.
"""

from flops.fleet.nodes import AWAY_S, LOST_S, JoinedNode, JoinToken, NodeStore
from flops.fleet.services import NodeService, Seen, ServiceStore

__all__ = [
    "AWAY_S",
    "LOST_S",
    "JoinToken",
    "JoinedNode",
    "NodeService",
    "NodeStore",
    "Seen",
    "ServiceStore",
]
