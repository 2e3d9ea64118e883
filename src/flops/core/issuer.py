"""An OpenID Connect issuer that people sign in with, as the operator configured it; no I/O."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MAX_URL = 500
_MAX_PAIRS = 200


@dataclass(frozen=True)
class IssuerSettings:
    """Who proves who people are, and what follows from what it tells of them."""

    url: str
    """As it calls itself, to the letter."""
    client_id: str
    secret_file: Path | None = None
    """Holds our secret at the issuer; None: we are a public client, which PKCE is enough for."""
    authority_file: Path | None = None
    """PEM of the only authority to trust for the issuer; None: those of this machine."""
    user_claim: str | None = None
    """Names a person; None: a verified e-mail address, else the preferred user name, which is good for
    newcomers only."""
    groups_claim: str = "groups"
    """A list of names, below dots where it is inside of others: ``realm_access.roles``."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """From groups to roles; empty: admins say who has which role."""
    teams: Mapping[str, str] = field(default_factory=dict)
    """From groups to teams; empty: admins say who is in which."""
    newcomers: str | None = None
    """Role of people whom nobody added, and whose groups give them none; None: they do not come in."""
    scopes: str = "openid email profile"

    @property
    def host(self) -> str:
        """What people know it by."""
        return urlsplit(self.url).hostname or self.url

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "IssuerSettings | None":
        """None: there is no issuer.

        Raises:
            ValueError: a variable cannot be understood, or one is missing.
        """

        def given(name: str) -> str | None:
            return environment.get(f"FLOPS_OIDC_{name}", "").strip() or None

        url = given("ISSUER")
        if url is None:
            stray = sorted(name for name in environment if name.startswith("FLOPS_OIDC_"))
            if any(environment[name].strip() for name in stray):
                raise ValueError(f"{stray[0]} is set, and FLOPS_OIDC_ISSUER is not - name the issuer")
            return None
        check_url(url, "FLOPS_OIDC_ISSUER")
        client_id = given("CLIENT_ID")
        if client_id is None:
            raise ValueError("FLOPS_OIDC_CLIENT_ID is not set - name us as the issuer knows us")
        secret, authority = given("CLIENT_SECRET_FILE"), given("CA")
        scopes = given("SCOPES") or cls.scopes
        if "openid" not in scopes.split():
            raise ValueError(f"FLOPS_OIDC_SCOPES is '{scopes[:80]}' - 'openid' must be one of them")
        return cls(
            url=url,
            client_id=client_id,
            secret_file=Path(secret).expanduser().absolute() if secret else None,
            authority_file=Path(authority).expanduser().absolute() if authority else None,
            user_claim=given("CLAIM_USER"),
            groups_claim=given("CLAIM_GROUPS") or cls.groups_claim,
            roles=_pairs("FLOPS_OIDC_ROLES", given("ROLES")),
            teams=_pairs("FLOPS_OIDC_TEAMS", given("TEAMS")),
            newcomers=given("NEWCOMERS"),
            scopes=scopes,
        )


def check_url(url: str, what: str) -> None:
    """An address that secrets may be sent to.

    Raises:
        ValueError: it is none, or another machine's without TLS.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{what} is no address: {error}") from error
    odd = len(url) > _MAX_URL or not url.isascii() or not url.isprintable() or " " in url
    if odd or parts.scheme not in ("https", "http") or not host or "@" in parts.netloc or parts.fragment:
        raise ValueError(f"{what} is '{url[:80]}', which is no address - use https://HOST/PATH")
    if parts.scheme == "http" and host not in _LOOPBACK:
        raise ValueError(f"{what} is '{url[:80]}', which sends secrets in the clear - use https://")


def _pairs(name: str, text: str | None) -> dict[str, str]:
    """``GROUP=VALUE,GROUP=VALUE``; a group's name may hold ``=``, but no comma."""
    found: dict[str, str] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        group, equals, value = part.rpartition("=")
        if not equals or not group.strip() or not value.strip():
            raise ValueError(f"{name} holds '{part.strip()[:80]}' - use GROUP=VALUE, with commas between")
        found[group.strip()] = value.strip()
    if len(found) > _MAX_PAIRS:
        raise ValueError(f"{name} names {len(found)} groups - use up to {_MAX_PAIRS}")
    return found
