"""Environments for user code, on this machine and in images: what to install, resolved once, laid down once.

Owns: the user's pip configuration as uv understands it, the choice of a Python interpreter, locks (exactly
pinned requirements under a hash) and the environments made from them.
Promises: the same requirements give the stored lock again, with no index asked; an environment is made once
per lock, appears whole or not at all, is shared by all projects with that lock and never changed; callers in
several threads and processes may ask for the same one at once. Nothing of FLOps is ever installed in it.
Code of a package runs here only when that package has no wheel and is built; a warning always says so.

Images are made by `flops.images.assembler` on what `flops.images.base` finds, lie in a `flops.images.layout`,
and travel with `flops.images.push` and `flops.images.pull`; whoever needs no images imports none of these.
"""

from flops.images.environments import Environment, ensure_environment
from flops.images.interpreters import Interpreter, installed_interpreters
from flops.images.locks import Lock, LockStore
from flops.images.pip_configuration import PipConfiguration
from flops.images.resolution import resolve

__all__ = [
    "Environment",
    "Interpreter",
    "Lock",
    "LockStore",
    "PipConfiguration",
    "ensure_environment",
    "installed_interpreters",
    "resolve",
]
