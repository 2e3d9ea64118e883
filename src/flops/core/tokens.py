"""The text of tokens: ``PREFIX_ID_SECRET``. The id is no secret; of the secret only a hash is kept.

Secrets are 256 random bits, so a plain SHA-256 is as hard to turn around as a slow hash would be.
"""

import hashlib
import hmac
import re
import secrets

USER = "flops"
"""Prefix of users' tokens."""
JOIN = "flopsjoin"
"""Of what lets a machine join, once."""
NODE = "flopsnode"
"""Of what a joined machine proves itself with."""

_ID_BYTES, _SECRET_BYTES = 6, 32
BEGINNING = rf"(?:{USER}|{JOIN}|{NODE})_[0-9a-f]{{12}}_"
"""Pattern of what is no secret of a token, of whichever kind."""
_FORM = re.compile(rf"({USER}|{JOIN}|{NODE})_([0-9a-f]{{12}})_[A-Za-z0-9_-]{{43}}")


def make(prefix: str) -> tuple[str, str]:
    """A new token: its id, and its text."""
    number = secrets.token_hex(_ID_BYTES)
    return number, f"{prefix}_{number}_{secrets.token_urlsafe(_SECRET_BYTES)}"


def id_of(text: str, prefix: str) -> str | None:
    """The id in a token's text; None: it is no token of that kind."""
    found = _FORM.fullmatch(text)
    return found.group(2) if found and found.group(1) == prefix else None


def digest(text: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(text.encode()).hexdigest()


def fits(text: str, kept: str) -> bool:
    """Compared in constant time."""
    return hmac.compare_digest(digest(text), kept)
