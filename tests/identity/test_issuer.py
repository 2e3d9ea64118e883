"""Whether an issuer is believed: one on loopback that lies in every way, and a certified one."""

import hashlib
import hmac
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from joserfc import jws
from joserfc.jwk import ECKey, RSAKey

from flops.core.clock import ManualClock, SystemClock
from flops.core.errors import InvalidInputError, UnauthorizedError, UnavailableError
from flops.core.issuer import IssuerSettings
from flops.identity import IdentityStore, Role
from flops.manager.authority import Authority
from tests.identity.conftest import Door
from tests.issuers import SECRET, FakeIssuer, RealIssuer, part


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """One engine is enough here."""
    return tmp_path / "manager.db"


def test_what_the_id_token_leaves_out_is_asked_for(
    door: Callable[..., Door], identity: IdentityStore, issuer: FakeIssuer
) -> None:
    identity.add_user("ann@example.org", Role.ENGINEER)
    issuer.claims = {"sub": "7"}
    issuer.userinfo = {"sub": "7", "email": "ann@example.org", "email_verified": True}
    assert door().enter(issuer)[0].name == "ann@example.org"
    issuer.userinfo["sub"] = "8"
    with pytest.raises(UnauthorizedError, match="told of somebody else"):
        door().enter(issuer)


# what is not believed


def _with_none(claims: dict[str, Any], issuer: FakeIssuer) -> str:
    return f"{part({'alg': 'none'})}.{part(claims)}."


def _with_our_secret(claims: dict[str, Any], issuer: FakeIssuer) -> str:
    """Signed with what everybody knows: the public key, taken for a secret."""
    begun = f"{part({'alg': 'HS256', 'kid': 'first'})}.{part(claims)}"
    pem = RSAKey.import_key(issuer.keys[0]).as_pem(private=False)
    return f"{begun}.{part(hmac.digest(pem, begun.encode(), 'sha256'))}"


def _with_a_key_of_its_own(claims: dict[str, Any], issuer: FakeIssuer) -> str:
    own = RSAKey.generate_key(2048)
    header = {"alg": "RS256", "kid": "first", "jwk": own.as_dict(private=False)}
    registry = jws.JWSRegistry(algorithms=["RS256"])
    registry.max_header_length = 2048
    return jws.serialize_compact(header, repr(claims).encode(), own, registry=registry)


def _with_an_unknown_key(claims: dict[str, Any], issuer: FakeIssuer) -> str:
    issuer.header = {"alg": "RS256", "kid": "another"}
    return issuer._sign(claims)


def _altered(claims: dict[str, Any], issuer: FakeIssuer) -> str:
    head, _, signature = issuer._sign(claims).split(".")
    return f"{head}.{part({**claims, 'sub': '1'})}.{signature}"


def _critical(claims: dict[str, Any], issuer: FakeIssuer) -> str:
    begun = f"{part({'alg': 'RS256', 'kid': 'first', 'crit': ['exp'], 'exp': 1})}.{part(claims)}"
    return f"{begun}.{part(b'x' * 256)}"


@pytest.mark.parametrize(
    "sign",
    [
        _with_none,
        _with_our_secret,
        _with_a_key_of_its_own,
        _with_an_unknown_key,
        _altered,
        _critical,
        lambda claims, issuer: "",
        lambda claims, issuer: "a.b",
        lambda claims, issuer: f"{part(b'[]')}.{part(claims)}.",
        lambda claims, issuer: f"{part(b'7')}.{part(claims)}.",
        lambda claims, issuer: f"{part({'alg': ['RS256']})}.{part(claims)}.",
        lambda claims, issuer: f"{part(b'[' * 300)}.{part(claims)}.",
        lambda claims, issuer: "x" * 40_000,
        lambda claims, issuer: 7,
        lambda claims, issuer: jws.serialize_compact(issuer.header, b"[]", issuer.key),
        lambda claims, issuer: jws.serialize_compact(issuer.header, b"\xff", issuer.key),
        lambda claims, issuer: jws.serialize_compact(issuer.header, b"[" * 20_000, issuer.key),
    ],
)
def test_a_token_that_the_issuer_did_not_sign_is_not_believed(
    door: Callable[..., Door], issuer: FakeIssuer, sign: Callable[[Any, FakeIssuer], Any]
) -> None:
    issuer.sign = lambda claims: sign(claims, issuer)
    with pytest.raises(UnauthorizedError, match=r"is not believed: its? "):
        door(newcomers="engineer").enter(issuer)


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"nonce": "another"}, "of another sign-in"),
        ({"nonce": None}, "of another sign-in"),
        ({"aud": "somebody"}, "for somebody else"),
        ({"aud": ["flops", "somebody"]}, "for somebody else"),
        ({"aud": None}, "for somebody else"),
        ({"azp": "somebody"}, "for somebody else"),
        ({"iss": "http://evil.example"}, "another issuer's"),
        ({"exp": 1}, "is over"),
        ({"exp": None}, "has no time"),
        ({"exp": True}, "has no time"),
        ({"exp": "soon"}, "has no time"),
        ({"exp": 1e300}, "has no time"),
        ({"iat": 2e10, "exp": 3e10}, "of the future"),
        ({"nbf": 2e10}, "of the future"),
        ({"iat": 1_600_000_000}, "is over"),
        ({"sub": ""}, "about nobody"),
        ({"sub": 7}, "about nobody"),
        ({"sub": "x" * 256}, "about nobody"),
        ({"at_hash": "AAAA"}, "belongs to another"),
        ({"at_hash": 7}, "belongs to another"),
    ],
)
def test_a_token_for_another_or_of_another_time_is_not_believed(
    door: Callable[..., Door], issuer: FakeIssuer, claims: dict[str, Any], reason: str
) -> None:
    issuer.claims |= claims
    with pytest.raises(UnauthorizedError, match=reason):
        door(newcomers="engineer").enter(issuer)


def test_a_token_of_the_right_access_token_and_audience_is_believed(
    door: Callable[..., Door], issuer: FakeIssuer
) -> None:
    half = hashlib.sha256(b"for-userinfo").digest()[:16]
    issuer.claims |= {"at_hash": part(half), "aud": ["flops", "other"], "azp": "flops"}
    assert door(newcomers="engineer").enter(issuer)[0].name == "ann@example.org"


def test_small_keys_and_keys_for_other_things_count_for_nothing(
    door: Callable[..., Door], issuer: FakeIssuer
) -> None:
    shown = issuer.keys[0]
    useless: list[list[Any]] = [
        [{**shown, "use": "enc"}],
        [{**shown, "n": shown["n"][:170]}],
        [{**shown, "n": 7}],
        [{"kty": "oct", "kid": "first", "k": "AAAA"}],
        ["first", None, {}],
        [{**shown, "kty": "EC"}],
    ]
    for keys in useless:
        issuer.keys = keys
        with pytest.raises(UnauthorizedError, match="signed by none of its keys"):
            door(newcomers="engineer").enter(issuer)


@pytest.mark.parametrize("named", [True, False])
def test_a_curve_is_believed_as_well_with_and_without_the_keys_name(
    door: Callable[..., Door], issuer: FakeIssuer, named: bool
) -> None:
    issuer.key = ECKey.generate_key("P-256", {"kid": "curve"})
    issuer.header = {"alg": "ES256", "kid": "curve"} if named else {"alg": "ES256"}
    issuer.keys = [issuer.key.as_dict(private=False)]
    assert door(newcomers="engineer").enter(issuer)[0].name == "ann@example.org"
    issuer.keys = [*issuer.keys, ECKey.generate_key("P-256", {"kid": "other"}).as_dict(private=False)]
    if named:
        door(newcomers="engineer").enter(issuer)
    else:  # two keys, and none is named
        with pytest.raises(UnauthorizedError):
            door(newcomers="engineer").enter(issuer)


def test_new_keys_of_the_issuer_are_found_and_not_looked_for_again_and_again(
    door: Callable[..., Door], issuer: FakeIssuer, clock: ManualClock
) -> None:
    here = door(newcomers="engineer")
    here.enter(issuer)
    here.enter(issuer)
    assert issuer.asked.count("/keys") == 1
    issuer.key = RSAKey.generate_key(2048, {"kid": "second"})
    issuer.header["kid"] = "second"
    with pytest.raises(UnauthorizedError):  # a moment ago there was no such key
        here.enter(issuer)
    assert issuer.asked.count("/keys") == 1
    issuer.keys = [issuer.key.as_dict(private=False)]
    clock.advance(11)
    here.enter(issuer)
    assert issuer.asked.count("/keys") == 2


def test_a_sign_in_is_finished_once_in_time_and_by_whoever_began_it(
    door: Callable[..., Door], issuer: FakeIssuer, clock: ManualClock
) -> None:
    here = door(newcomers="engineer")
    begun = here.begin()
    code = issuer.come_back(begun.url)
    for wrong in ({"state": "another"}, {"secret": "another"}, {"secret": here.begin().secret}):
        with pytest.raises(UnauthorizedError, match="no such sign-in is under way"):
            here.account(begun, code, **wrong)
    here.account(begun, code)
    with pytest.raises(UnauthorizedError, match="no such sign-in is under way"):
        here.account(begun, code)
    late = here.begin()
    clock.advance(601)
    with pytest.raises(UnauthorizedError, match="took too long"):
        here.account(late, issuer.come_back(late.url))
    assert len(issuer.forms) == 1


def test_an_answer_that_names_another_issuer_is_mixed_up(
    door: Callable[..., Door], issuer: FakeIssuer
) -> None:
    here = door(newcomers="engineer")
    begun = here.begin()
    with pytest.raises(UnauthorizedError, match="another issuer's"):
        here.account(begun, issuer.come_back(begun.url), issuer="https://evil.example")
    issuer.places["authorization_response_iss_parameter_supported"] = True
    here = door(newcomers="engineer")
    begun = here.begin()
    with pytest.raises(UnauthorizedError, match="another issuer's"):
        here.account(begun, issuer.come_back(begun.url))
    begun = here.begin()
    here.account(begun, issuer.come_back(begun.url), issuer=issuer.url)


# an issuer that is not what it should be


def _endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(2000):
            handler.wfile.write(b" " * 65536)
    except OSError:
        pass


def _elsewhere(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", "/keys")
    handler.end_headers()


def _no_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\0\0\0\0\r\n\r\n")


def _text(text: bytes, status: int = 200) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(text)

    return answer


CONFIGURATION = "/.well-known/openid-configuration"


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        (CONFIGURATION, _endless, "its answer is over 262144 bytes"),
        (CONFIGURATION, _elsewhere, "answers with status 302"),
        (CONFIGURATION, _no_http, "cannot be reached"),
        (CONFIGURATION, _text(b"<html>"), "no JSON object"),
        (CONFIGURATION, _text(b"[" * 100_000), "no JSON object"),
        (CONFIGURATION, _text(b'{"issuer": NaN}'), "no JSON object"),
        (CONFIGURATION, _text(b"away", 500), "answers with status 500"),
        (CONFIGURATION, {}, "calls itself 'None'"),
        (CONFIGURATION, {"issuer": "https://evil.example"}, "calls itself 'https://evil.example'"),
        ("/keys", {"keys": {}}, "shows no keys"),
        ("/keys", _elsewhere, "shows no keys"),
        ("/keys", {"keys": [{}] * 101}, "shows no keys"),
        ("/keys", _endless, "its answer is over"),
        ("/token", _text(b'{"error": "invalid_client"}', 401), "does not take us for a client"),
        ("/token", _text(b"", 503), "answers with 'status 503'"),
    ],
)
def test_an_issuer_that_cannot_be_used_is_named(
    door: Callable[..., Door], issuer: FakeIssuer, path: str, answer: Any, message: str
) -> None:
    issuer.answers[path] = answer
    with pytest.raises(UnavailableError, match=f"the issuer at 127.0.0.1 .*{message}"):
        door(newcomers="engineer").enter(issuer)


@pytest.mark.parametrize(
    "place",
    [
        None,
        7,
        "",
        "javascript:alert(1)",
        "http://evil.example/token",
        "https://u:p@host/",
        "https://h/\n",
        "//h/x",
    ],
)
def test_secrets_go_to_no_odd_place(door: Callable[..., Door], issuer: FakeIssuer, place: Any) -> None:
    issuer.places["token_endpoint"] = place
    with pytest.raises(UnavailableError, match="token_endpoint is"):
        door().begin()


def test_an_issuer_that_is_away_is_not_asked_again_at_once_and_comes_back(
    door: Callable[..., Door], issuer: FakeIssuer, clock: ManualClock
) -> None:
    here = door()
    issuer.answers[CONFIGURATION] = _text(b"", 500)
    for _ in range(3):
        with pytest.raises(UnavailableError):
            here.begin()
    assert issuer.asked == [CONFIGURATION]
    issuer.answers.clear()
    clock.advance(11)
    here.begin()
    clock.advance(4000)
    issuer.answers[CONFIGURATION] = _text(b"", 500)
    here.begin()  # as it was an hour ago


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            {"roles": {"g": "king"}},
            InvalidInputError,
            "FLOPS_OIDC_ROLES gives the role 'king' - use one of admin",
        ),
        ({"newcomers": "king"}, InvalidInputError, "FLOPS_OIDC_NEWCOMERS gives the role"),
        ({"teams": {"g": "No Team"}}, InvalidInputError, "cannot be the name of a team"),
        ({"secret_file": Path("/nothing/there")}, UnavailableError, "CLIENT_SECRET_FILE cannot be read"),
        ({"secret_file": Path("/dev/null")}, UnavailableError, "holds no secret"),
    ],
)
def test_what_the_operator_configured_is_checked_first(
    door: Callable[..., Door], values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        door(**values)


def test_a_private_authority_is_trusted_where_the_operator_says_so(
    identity: IdentityStore, clock: ManualClock, tmp_path: Path
) -> None:
    identity.ensure_admin()
    authority = Authority(tmp_path / "authority")
    issuer = FakeIssuer(clock, authority.issue_files("issuer", "issuer", ["127.0.0.1"]))
    try:
        with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
            Door(identity, issuer.settings(newcomers="engineer"), clock).begin()
        trusting = issuer.settings(newcomers="engineer", authority_file=authority.certificate_file)
        user, _, _ = Door(identity, trusting, clock).enter(issuer)
        assert user.name == "ann@example.org"
        broken = issuer.settings(authority_file=tmp_path / "nothing.pem")
        with pytest.raises(
            UnavailableError, match=r"FLOPS_OIDC_CA names .*nothing.pem, which cannot be read"
        ):
            Door(identity, broken, clock).begin()
        issuer.places["token_endpoint"] = issuer.url.replace("https", "http") + "/token"
        with pytest.raises(UnavailableError, match="token_endpoint is without TLS"):
            Door(identity, trusting, clock).begin()
    finally:
        issuer.close()


# the certified one


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("client", ["flops", "flops-public"])
def test_a_certified_provider_lets_people_in(
    identity: IdentityStore, real_issuer: RealIssuer, tmp_path: Path, client: str
) -> None:
    identity.ensure_admin()
    secret = tmp_path / "secret"
    secret.write_text(f"{SECRET}\n")
    settings = IssuerSettings(
        real_issuer.url,
        client,
        secret_file=secret if client == "flops" else None,
        roles={"ml": "engineer"},
    )
    here = Door(identity, settings, SystemClock())
    real_issuer.know({"sub-1": {"email": "ann@example.org", "email_verified": True, "groups": ["ml"]}})
    begun = here.begin()
    returned = real_issuer.come_back(begun.url, "sub-1")
    assert (returned["state"], returned["iss"]) == (begun.state, real_issuer.url)
    account = here.account(begun, returned["code"], issuer=returned["iss"])
    user, _, _ = here.sign_ins.admit(account)
    assert (account.subject, user.name, user.role) == ("sub-1", "ann@example.org", Role.ENGINEER)
    other = here.begin()
    with pytest.raises(UnauthorizedError, match=r"does not stand by the code \('invalid_grant'\)"):
        here.account(other, returned["code"], issuer=real_issuer.url)


@pytest.mark.slow
@pytest.mark.network
def test_a_wrong_secret_is_the_operators_to_mend(
    identity: IdentityStore, real_issuer: RealIssuer, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("wrong")
    here = Door(identity, IssuerSettings(real_issuer.url, "flops", secret_file=secret), SystemClock())
    real_issuer.know({"sub-1": {}})
    begun = here.begin()
    returned = real_issuer.come_back(begun.url, "sub-1")
    with pytest.raises(UnavailableError, match="does not take us for a client"):
        here.account(begun, returned["code"], issuer=returned["iss"])
