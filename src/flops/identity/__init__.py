"""Who may do what: users, their tokens and roles, limits against guessing, and the audit log.

Owns: the tables ``users``, ``tokens`` and ``audit``.
Promises: a token is known here by its hash alone; what a caller may do follows from role and scopes in pure
functions; the audit log only grows, and whoever changes an entry breaks the chain of hashes behind it.
"""

from flops.identity.attempts import Attempts, RateLimit
from flops.identity.audit import AuditEntry, AuditLog, Verification
from flops.identity.roles import PERMISSIONS, Caller, Role, check_scopes
from flops.identity.store import ADMIN, IdentityStore, Token, User

__all__ = [
    "ADMIN",
    "PERMISSIONS",
    "Attempts",
    "AuditEntry",
    "AuditLog",
    "Caller",
    "IdentityStore",
    "RateLimit",
    "Role",
    "Token",
    "User",
    "Verification",
    "check_scopes",
]
