"""Signing in at a manager with its issuer: in a browser, which comes back to this machine's loopback.

Source:
    RFC 8252, OAuth 2.0 for Native Apps: a port of the system's choice, open until somebody came back.
"""

import hmac
import queue
import sys
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from flops.cli.output import note
from flops.core.errors import FailedError

if TYPE_CHECKING:
    from flops.client import Client
    from flops.client.shapes import SignedInView

_PATH = "/login/oidc"
_DEADLINE_S = 600.0
_STALLED_S = 10.0
_LONGEST = 8192
_PAGE = (
    "<!doctype html><html lang=en><meta charset=utf-8><title>FLOps</title>"
    "<h1>{}</h1><p>You can close this window.</p></html>"
)


def sign_in(client: "Client", *, browse: bool) -> "SignedInView":
    """Send somebody to the issuer, wait for them, and finish with what they bring back.

    Args:
        browse: open a browser; without, they open the address themselves, and may paste the one where they
            end, which helps where the browser is on another machine.
    Raises:
        FailedError: they said no there, or did not come back.
    """
    returned: queue.Queue[Mapping[str, str]] = queue.Queue()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(returned))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    try:
        begun = client.begin_sign_in(redirect_uri=f"http://127.0.0.1:{server.server_address[1]}{_PATH}")
        _show(begun["url"], browse=browse)
        if not browse:
            threading.Thread(target=_read_pasted, args=(returned,), daemon=True).start()
        query = _awaited(returned, begun["state"])
    finally:
        server.shutdown()
        server.server_close()
    if "code" not in query:
        raise FailedError(f"not signed in: the issuer says '{query.get('error', 'nothing')[:60]}'")
    return client.finish_sign_in(
        state=begun["state"], secret=begun["secret"], code=query["code"], iss=query.get("iss")
    )


def _show(url: str, *, browse: bool) -> None:
    if urlsplit(url).scheme not in ("http", "https"):
        raise FailedError(f"the manager sends you to '{url[:80]}', which is no web page - is it a manager?")
    note(f"sign in here:\n  {url}")
    if not browse:
        note("on another machine's browser, the last page cannot be found: paste its address here")
        return
    import webbrowser

    if not webbrowser.open(url):
        note("no browser could be opened")


def _awaited(returned: "queue.Queue[Mapping[str, str]]", state: str) -> Mapping[str, str]:
    """What came back for this sign-in; anything else is no answer to it."""
    deadline = time.monotonic() + _DEADLINE_S
    while (left := deadline - time.monotonic()) > 0:
        try:
            query = returned.get(timeout=min(left, 1.0))  # in pieces, so that Ctrl-C is heard
        except queue.Empty:
            continue
        if hmac.compare_digest(query.get("state", "").encode(), state.encode()):
            return query
        note("that is no answer to this sign-in")
    raise FailedError(f"nobody came back within {_DEADLINE_S / 60:.0f} minutes - run 'flops login' again")


def _read_pasted(returned: "queue.Queue[Mapping[str, str]]") -> None:
    while line := sys.stdin.readline(_LONGEST):
        if line.strip():
            returned.put(_query(line.strip()))


def _query(address: str) -> dict[str, str]:
    try:
        found = parse_qs(urlsplit(address).query, max_num_fields=20, errors="strict")
    except ValueError:
        return {}
    return {name: values[-1] for name, values in found.items()}


def _handler(returned: "queue.Queue[Mapping[str, str]]") -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _STALLED_S

        def do_GET(self) -> None:
            query = _query(self.path[:_LONGEST])
            ours = self.path.partition("?")[0] == _PATH and "state" in query
            if ours:
                returned.put(query)
            words = "Go back to the terminal." if ours else "There is nothing here."
            content = _PAGE.format(words).encode()
            self.send_response(200 if ours else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Security-Policy", "default-src 'none'")
            self.send_header("Referrer-Policy", "no-referrer")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # addresses hold codes
            pass

    return Handler
