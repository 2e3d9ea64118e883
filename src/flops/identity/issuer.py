"""Talking to an OpenID Connect issuer: where it is, who somebody is, and whether it may be believed.

The authorization code flow with PKCE. Whatever comes from there is taken for hostile until it is checked:
answers are bounded in size and time and followed nowhere; an ID token counts only with a signature of a key
that the issuer shows, by an algorithm for such signatures, made for us, for this sign-in, and now.

Source:
    OpenID Connect Core 1.0, section 3.1.3.7 (what is checked); RFC 7636 (PKCE); RFC 9207 (mixed-up issuers).
"""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard
from urllib.parse import quote, urlencode, urlsplit

import httpx
from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import JWKRegistry

from flops.core.clock import Clock, SystemClock
from flops.core.errors import UnauthorizedError, UnavailableError
from flops.core.issuer import IssuerSettings, check_url

log = logging.getLogger(__name__)

_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512")
"""By which only the issuer can sign: never ``none``, never one with a secret that is ours as well."""
_MIN_RSA_BITS = 2048
_DEADLINE_S = 15.0
_MAX_BYTES = 256 << 10
_MAX_TOKEN = 32 << 10
_MAX_KEYS = 100
_FRESH_S = 3600.0
_PAUSE_S = 10.0
"""Between looks for keys that were not there, and after the issuer did not answer."""
_LEEWAY_S = 60.0
_OLDEST_S = 600.0


@dataclass(frozen=True)
class _Places:
    """What the issuer says of itself."""

    authorization: str
    token: str
    keys: str
    userinfo: str | None
    names_itself: bool
    """Its redirects carry ``iss``."""
    secret_in_body: bool


class Issuer:
    """One issuer. To be used in one event loop at a time; knows keys and places for an hour."""

    def __init__(self, settings: IssuerSettings, clock: Clock | None = None) -> None:
        self.settings = settings
        self._clock = clock or SystemClock()
        self._trust: ssl.SSLContext | None = None
        self._places: tuple[float, _Places] | None = None
        self._keys: tuple[float, list[dict[str, Any]]] | None = None
        self._away: tuple[float, str] | None = None
        self._registry = jws.JWSRegistry(algorithms=_ALGORITHMS, strict_check_header=False)

    async def address(self, redirect_uri: str, state: str, nonce: str, verifier: str) -> str:
        """Where somebody goes to say who they are.

        Raises:
            UnavailableError: the issuer is away, or not what it should be.
        """
        places = await self._found()
        digest = hashlib.sha256(verifier.encode()).digest()
        asked = {
            "response_type": "code",
            "client_id": self.settings.client_id,
            "redirect_uri": redirect_uri,
            "scope": self.settings.scopes,
            "state": state,
            "nonce": nonce,
            "code_challenge": _base64url(digest),
            "code_challenge_method": "S256",
        }
        joint = "&" if urlsplit(places.authorization).query else "?"
        return f"{places.authorization}{joint}{urlencode(asked)}"

    async def claims(
        self,
        code: str,
        redirect_uri: str,
        nonce: str,
        verifier: str,
        *,
        named: str | None,
        wanted: frozenset[str],
    ) -> Mapping[str, Any]:
        """What the issuer says of whoever came back with this code.

        Args:
            named: the issuer that the redirect names (``iss``).
            wanted: claims to ask for where the ID token has none of them.
        Raises:
            UnauthorizedError: it is not to be believed, or does not stand by the code.
            UnavailableError: the issuer is away, or does not take us for who we are.
        """
        places = await self._found()
        if named != self.settings.url and (named is not None or places.names_itself):
            self._disbelieve("the answer is another issuer's")
        token, access = await self._redeemed(places, code, redirect_uri, verifier)
        claims = await self._checked(places, token, nonce, access)
        if places.userinfo is not None and access is not None and not wanted <= claims.keys():
            headers = {"Authorization": f"Bearer {access}"}
            status, more = await self._ask("GET", places.userinfo, headers=headers)
            if status != 200 or more.get("sub") != claims["sub"]:
                self._disbelieve("it told of somebody else when it was asked for more")
            claims = {**more, **claims}
        return claims

    # discovery

    async def _found(self) -> _Places:
        now = self._clock.monotonic()
        if self._places is not None and now - self._places[0] < _FRESH_S:
            return self._places[1]
        if self._away is not None and now - self._away[0] < _PAUSE_S:
            raise UnavailableError(self._away[1])
        try:
            status, told = await self._ask(
                "GET", f"{self.settings.url.rstrip('/')}/.well-known/openid-configuration"
            )
            if status != 200:
                raise self._unusable(f"it answers with status {status} where its configuration should be")
            places = self._read_places(told)
        except UnavailableError as error:
            if self._places is not None:  # as it was an hour ago is better than not at all
                log.warning("%s", error)
                return self._places[1]
            self._away = self._clock.monotonic(), str(error)
            raise
        self._places, self._away = (self._clock.monotonic(), places), None
        return places

    def _read_places(self, told: Mapping[str, Any]) -> _Places:
        if told.get("issuer") != self.settings.url:
            raise self._unusable(
                f"it calls itself '{str(told.get('issuer'))[:100]}' - FLOPS_OIDC_ISSUER must be that"
            )

        def place(name: str) -> str:
            value = told.get(name)
            try:
                check_url(value if isinstance(value, str) else "", name)
            except ValueError as error:
                raise self._unusable(str(error)) from error
            assert isinstance(value, str)
            if value.startswith("http:") and self.settings.url.startswith("https:"):
                raise self._unusable(f"{name} is without TLS")
            return value

        methods = told.get("token_endpoint_auth_methods_supported")
        return _Places(
            authorization=place("authorization_endpoint"),
            token=place("token_endpoint"),
            keys=place("jwks_uri"),
            userinfo=place("userinfo_endpoint") if "userinfo_endpoint" in told else None,
            names_itself=told.get("authorization_response_iss_parameter_supported") is True,
            secret_in_body=isinstance(methods, list)
            and "client_secret_basic" not in methods
            and "client_secret_post" in methods,
        )

    # the code

    async def _redeemed(
        self, places: _Places, code: str, redirect_uri: str, verifier: str
    ) -> tuple[str, str | None]:
        """The ID token and the access token."""
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_uri,
            "client_id": self.settings.client_id,
            "code_verifier": verifier,
        }
        headers = {}
        if self.settings.secret_file is not None:
            secret = await asyncio.to_thread(self.secret)
            if places.secret_in_body:
                form["client_secret"] = secret
            else:  # RFC 6749, section 2.3.1: both are form-encoded first
                both = f"{quote(self.settings.client_id, safe='')}:{quote(secret, safe='')}"
                headers["Authorization"] = f"Basic {base64.b64encode(both.encode()).decode()}"
        status, told = await self._ask("POST", places.token, data=form, headers=headers)
        if status != 200:
            problem = str(told.get("error", f"status {status}"))[:80]
            if problem in ("invalid_client", "unauthorized_client"):
                raise self._unusable(
                    f"it does not take us for a client ({problem}) - look at FLOPS_OIDC_CLIENT_ID"
                )
            if status >= 500:
                raise self._unusable(f"it answers with {problem!r}")
            self._disbelieve(f"it does not stand by the code ({problem!r})")
        token, access = told.get("id_token"), told.get("access_token")
        if not isinstance(token, str) or not 0 < len(token) <= _MAX_TOKEN or not token.isascii():
            self._disbelieve("it gave no ID token")
        if access is not None and not (
            isinstance(access, str)
            and 0 < len(access) <= _MAX_TOKEN
            and access.isascii()
            and access.isprintable()
            and " " not in access
        ):
            self._disbelieve("its access token is none")
        return token, access

    def secret(self) -> str:
        """Ours at the issuer, as its file has it now.

        Raises:
            UnavailableError: the file cannot be read.
        """
        file = self.settings.secret_file
        assert file is not None
        try:
            with file.open("rb") as source:
                text = source.read(4097).decode().strip()
        except (OSError, ValueError) as error:
            raise UnavailableError(f"FLOPS_OIDC_CLIENT_SECRET_FILE cannot be read: {error}") from error
        if not 0 < len(text) <= 4000:
            raise UnavailableError(f"FLOPS_OIDC_CLIENT_SECRET_FILE names {file}, which holds no secret")
        return text

    # the ID token

    async def _checked(self, places: _Places, token: str, nonce: str, access: str | None) -> dict[str, Any]:
        try:
            header = jws.extract_compact(token.encode(), registry=self._registry).headers()
        except (JoseError, ValueError, TypeError, RecursionError) as error:
            self._disbelieve(f"its ID token is none ({type(error).__name__})")
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in _ALGORITHMS:
            self._disbelieve(f"its ID token is signed by '{str(algorithm)[:20]}', which counts for nothing")
        if kid is not None and not isinstance(kid, str):
            self._disbelieve("its ID token names no key")
        payload = self._signed(token, await self._candidates(places, kid), kid)
        if payload is None and await self._look_for_keys(places):  # it may have changed them since
            payload = self._signed(token, await self._candidates(places, kid), kid)
        if payload is None:
            self._disbelieve("its ID token is signed by none of its keys")
        claims = _json_object(payload)
        if claims is None:
            self._disbelieve("its ID token says nothing")
        self._check_claims(claims, nonce)
        if access is not None and "at_hash" in claims:
            digest = hashlib.new(f"sha{algorithm[2:]}", access.encode()).digest()
            if not _same(claims["at_hash"], _base64url(digest[: len(digest) // 2])):
                self._disbelieve("its access token belongs to another ID token")
        return claims

    def _signed(self, token: str, keys: list[dict[str, Any]], kid: str | None) -> bytes | None:
        """What was signed by one of the keys; None: none of them signed it.

        A token that names no key is believed only where there is no choice.
        """
        if kid is None and len(keys) != 1:
            return None
        for known in keys:
            try:
                key = JWKRegistry.import_key(dict(known))
                found = jws.deserialize_compact(token.encode(), key, registry=self._registry)
            except (JoseError, ValueError, TypeError, KeyError, RecursionError):
                continue
            return found.payload
        return None

    def _check_claims(self, claims: Mapping[str, Any], nonce: str) -> None:
        """Raises: UnauthorizedError: it was made by another, for another, or at another time."""
        now = self._clock.now()
        audience, ours = claims.get("aud"), self.settings.client_id
        named = audience if isinstance(audience, list) else [audience]
        subject = claims.get("sub")
        expires, issued, begins = claims.get("exp"), claims.get("iat"), claims.get("nbf", 0)
        if claims.get("iss") != self.settings.url:
            self._disbelieve("its ID token is another issuer's")
        if ours not in named or claims.get("azp", ours) != ours or (len(named) > 1 and "azp" not in claims):
            self._disbelieve("its ID token is for somebody else than us")
        if not isinstance(subject, str) or not 0 < len(subject) <= 255 or not subject.isprintable():
            self._disbelieve("its ID token is about nobody")
        if not (_is_time(expires) and _is_time(issued) and _is_time(begins)):
            self._disbelieve("its ID token has no time")
        if expires <= now - _LEEWAY_S or issued < now - _OLDEST_S:
            self._disbelieve("its ID token is over - are the clocks right?")
        if max(issued, begins) > now + _LEEWAY_S:
            self._disbelieve("its ID token is of the future - are the clocks right?")
        if not _same(claims.get("nonce"), nonce):
            self._disbelieve("its ID token is of another sign-in")

    async def _candidates(self, places: _Places, kid: str | None) -> list[dict[str, Any]]:
        now = self._clock.monotonic()
        if self._keys is None or now - self._keys[0] >= _FRESH_S:
            try:
                await self._fetch_keys(places)
            except UnavailableError as error:
                if self._keys is None:
                    raise
                log.warning("%s", error)
        assert self._keys is not None
        return [key for key in self._keys[1] if kid is None or key.get("kid") == kid]

    async def _look_for_keys(self, places: _Places) -> bool:
        """Whether it was worth it: not a moment after the last time."""
        if self._keys is not None and self._clock.monotonic() - self._keys[0] < _PAUSE_S:
            return False
        await self._fetch_keys(places)
        return True

    async def _fetch_keys(self, places: _Places) -> None:
        status, told = await self._ask("GET", places.keys)
        keys = told.get("keys")
        if status != 200 or not isinstance(keys, list) or len(keys) > _MAX_KEYS:
            raise self._unusable("it shows no keys")
        self._keys = self._clock.monotonic(), [key for key in keys if _is_usable(key)]

    # the wire

    async def _ask(self, method: str, url: str, **sent: Any) -> tuple[int, dict[str, Any]]:
        """The status and the JSON object of an answer; empty where an error has none."""
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", **sent.pop("headers", {})}
        try:
            async with asyncio.timeout(_DEADLINE_S):
                if self._trust is None:
                    self._trust = await asyncio.to_thread(self._trusted)
                proxied = urlsplit(url).scheme == "https"
                async with (
                    httpx.AsyncClient(verify=self._trust, timeout=_DEADLINE_S, trust_env=proxied) as client,
                    client.stream(method, url, headers=headers, follow_redirects=False, **sent) as answer,
                ):
                    body = bytearray()
                    async for piece in answer.aiter_raw():
                        body += piece
                        if len(body) > _MAX_BYTES:
                            raise self._unusable(f"its answer is over {_MAX_BYTES} bytes")
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            reason = str(error)[:200] or f"no answer within {_DEADLINE_S:g} s"
            raise UnavailableError(
                f"the issuer at {self.settings.host} cannot be reached ({reason}) - try again, or use a token"
            ) from error
        found = _json_object(bytes(body))
        if found is None:
            if answer.status_code == 200:
                raise self._unusable("its answer is no JSON object")
            found = {}
        return answer.status_code, found

    def _trusted(self) -> ssl.SSLContext:
        file = self.settings.authority_file
        if self.settings.url.startswith("http:"):
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody; to read whom takes 0.1 s
        try:
            return ssl.create_default_context(cafile=str(file) if file is not None else None)
        except (OSError, ValueError) as error:
            raise UnavailableError(f"FLOPS_OIDC_CA names {file}, which cannot be read: {error}") from error

    def _unusable(self, reason: str) -> UnavailableError:
        return UnavailableError(f"the issuer at {self.settings.host} cannot be used: {reason}")

    def _disbelieve(self, reason: str) -> NoReturn:
        raise UnauthorizedError(
            f"the sign-in at {self.settings.host} is not believed: {reason} - begin again, or use a token"
        )


def _base64url(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def _same(given: object, expected: str) -> bool:
    return isinstance(given, str) and hmac.compare_digest(given.encode(), expected.encode())


def _is_usable(key: object) -> bool:
    """Whether signatures by it count."""
    if not isinstance(key, dict) or key.get("kty") not in ("RSA", "EC") or key.get("use", "sig") != "sig":
        return False
    modulus = key.get("n")
    return key["kty"] == "EC" or (isinstance(modulus, str) and len(modulus) * 6 >= _MIN_RSA_BITS)


def _is_time(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12


def _json_object(text: bytes) -> dict[str, Any] | None:
    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
