"""Issuers of OpenID Connect for tests: a certified one, and one that lies.

The certified one is the npm package `oidc-provider`, installed for the session below pytest's folder for
temporary files, without any of its scripts; node runs it on loopback.
"""

import base64
import json
import os
import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Mapping
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urljoin, urlsplit

import httpx
from joserfc import jws
from joserfc.jwk import ECKey, RSAKey

from flops.core.clock import Clock
from flops.core.issuer import IssuerSettings

PACKAGE = "oidc-provider@8.8.1"  # runs on Debian 12's node 18, too
SECRET = "a secret: of 100 % & more"
_SCRIPT = Path(__file__).parent / "identity" / "provider" / "provider.mjs"


def install_provider(folder: Path) -> Path:
    """Fetch the package with npm; the folder that it is in."""
    subprocess.run(
        ["npm", "install", "--prefix", str(folder), PACKAGE, "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=folder,
        env=os.environ | {"npm_config_update_notifier": "false", "npm_config_loglevel": "error"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=240,
    )
    return folder


@cache
def _first_key() -> RSAKey:
    """Making one takes long."""
    return RSAKey.generate_key(2048, {"kid": "first"})


def node_is_there() -> bool:
    return shutil.which("npm") is not None and shutil.which("node") is not None


class RealIssuer:
    """The certified one. Anybody whom it knows comes in there, with any password.

    Args:
        installed: by `install_provider`.
        people: where its knowledge of people is kept.
    """

    def __init__(self, installed: Path, people: Path) -> None:
        self._people = people
        self.know({})
        self._process = subprocess.Popen(
            ["node", str(_SCRIPT), str(people)],
            cwd=installed,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), "the provider did not start"

    def know(self, people: Mapping[str, Mapping[str, Any]]) -> None:
        """What it tells of whom from now on, by subject."""
        aside = self._people.with_suffix(".new")
        aside.write_text(json.dumps(people))
        aside.replace(self._people)

    def come_back(self, url: str, person: str) -> dict[str, str]:
        """What a browser brings back that goes there, for somebody who says yes to everything."""
        with httpx.Client(trust_env=False, timeout=60) as browser:
            answer = browser.get(url)
            for _ in range(20):
                if answer.is_redirect:
                    target = urljoin(str(answer.url), answer.headers["location"])
                    if not target.startswith(self.url):
                        return dict(parse_qsl(urlsplit(target).query))
                    answer = browser.get(target)
                    continue
                assert answer.status_code == 200, answer.text
                action = re.search(r'<form[^>]*action="([^"]+)"', answer.text)
                prompt = re.search(r'name="prompt" value="(\w+)"', answer.text)
                assert action, answer.text
                assert prompt, answer.text
                form = {"prompt": prompt[1], "login": person, "password": "any"}
                answer = browser.post(urljoin(str(answer.url), action[1]), data=form)
        raise AssertionError("no way back")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class FakeIssuer:
    """Does what a test says, on loopback. Everything it would answer can be replaced.

    Args:
        clock: its tokens' time.
        proof: files of its certificate and key; None: it speaks plain HTTP.
    """

    def __init__(self, clock: Clock, proof: tuple[Path, Path] | None = None) -> None:
        self._clock = clock
        self.key: RSAKey | ECKey = _first_key()
        self.header: dict[str, Any] = {"alg": "RS256", "kid": "first"}
        self.keys: list[dict[str, Any]] = [self.key.as_dict(private=False)]
        self.claims: dict[str, Any] = {"sub": "7", "email": "ann@example.org", "email_verified": True}
        """Over those that are right."""
        self.userinfo: dict[str, Any] | None = None
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None] | dict[str, Any]] = {}
        """By path."""
        self.places: dict[str, Any] = {}
        """Over those that are right, in its configuration."""
        self.sign: Callable[[dict[str, Any]], str] = self._sign
        self.asked: list[str] = []
        self.forms: list[dict[str, str]] = []
        self._nonces: dict[str, str] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"{'https' if proof else 'http'}://127.0.0.1:{self._server.server_address[1]}"
        if proof is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*proof)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def settings(self, **values: Any) -> IssuerSettings:
        return IssuerSettings(self.url, "flops", **values)

    def come_back(self, url: str) -> str:
        """The code that a browser brings back that went there."""
        asked = {name: values[-1] for name, values in parse_qs(urlsplit(url).query).items()}
        code = f"code-{len(self._nonces)}"
        self._nonces[code] = asked["nonce"]
        return code

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _sign(self, claims: dict[str, Any]) -> str:
        return jws.serialize_compact(self.header, json.dumps(claims).encode(), self.key)

    def _answer(self, path: str, form: dict[str, str]) -> tuple[int, Any]:
        if path == "/.well-known/openid-configuration":
            return 200, {
                "issuer": self.url,
                "authorization_endpoint": f"{self.url}/authorize?as=web",
                "token_endpoint": f"{self.url}/token",
                "jwks_uri": f"{self.url}/keys",
                **({} if self.userinfo is None else {"userinfo_endpoint": f"{self.url}/userinfo"}),
                **self.places,
            }
        if path == "/keys":
            return 200, {"keys": self.keys}
        if path == "/userinfo":
            return 200, self.userinfo
        if path == "/token":
            self.forms.append(form)
            nonce = self._nonces.pop(form.get("code", ""), None)
            if nonce is None:
                return 400, {"error": "invalid_grant"}
            now = self._clock.now()
            right = {"iss": self.url, "aud": "flops", "iat": now, "exp": now + 300, "nonce": nonce}
            claims = {name: value for name, value in {**right, **self.claims}.items() if value is not None}
            return 200, {
                "access_token": "for-userinfo",
                "token_type": "Bearer",
                "id_token": self.sign(claims),
            }
        return 404, {}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply({})

            def do_POST(self) -> None:
                length = int(self.headers.get("content-length", 0))
                self._reply(dict(parse_qsl(self.rfile.read(length).decode())))

            def _reply(self, form: dict[str, str]) -> None:
                path = self.path.partition("?")[0]
                issuer.asked.append(path)
                other = issuer.answers.get(path)
                if callable(other):
                    other(self)
                    return
                status, value = (200, other) if other is not None else issuer._answer(path, form)
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def part(value: Mapping[str, Any] | bytes) -> str:
    """A part of a token, as it stands in its text."""
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
