"""Repositories: from a link or a folder to checked user code at one known commit.

Owns: fetching, the detection of the contract, the translation of its dependencies to PEP 508, and the one
run of user code without data before anything is deployed. Promises: a checkout is there whole or not at
all, holds content only (no ``.git``, no credentials, no link that leaves it), and is bounded in size;
nothing of a repository is executed by fetching or inspecting it.
"""

from flops.repo.check import InitialModel, check
from flops.repo.contract import Contract, inspect
from flops.repo.fetch import Checkout, fetch
from flops.repo.requirements import Requirements

__all__ = [
    "Checkout",
    "Contract",
    "InitialModel",
    "Requirements",
    "check",
    "fetch",
    "inspect",
]
