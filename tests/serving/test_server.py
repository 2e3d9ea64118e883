"""What a server does under load, at its limits, and when its model misbehaves."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from flops.manager.authority import Authority
from flops.serving import ServingConfig
from tests.conftest import Require
from tests.serving.conftest import Serve, Server, images, later, together

RAISE, EXIT, HANG, SLEEP, NAN = -1.0, -2.0, -3.0, -4.0, -5.0


@pytest.fixture(scope="module")
def moody(serve: Serve) -> Server:
    return serve("moody")


def ask(server: Server, *rows: tuple[float, float]) -> httpx.Response:
    return server.ask({"inputs": {"x": rows}})


def wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + 60
    while server.client.get("/health").status_code != 200:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.05)


def busy(server: Server, seconds: float) -> object:
    """Keep the model busy; returns once it is."""
    work, _ = later(lambda: ask(server, (SLEEP, seconds)))
    deadline = time.monotonic() + 10
    while server.metric("flops_serving_requests_in_flight") < 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return work


def test_requests_that_wait_are_predicted_together(serve: Serve) -> None:
    server = serve("moody")
    before = server.metric("flops_serving_batch_requests_count")
    busy(server, 0.5)
    answers = together(server, [{"inputs": {"x": [[at, 1.0]]}} for at in range(40)])
    assert [answer.json()["predictions"] for answer in answers] == [[at + 1.0] for at in range(40)]
    assert server.metric("flops_serving_batch_requests_count") - before <= 10
    assert server.metric('flops_serving_requests_total{protocol="mlflow",status="200"}') == 41


def test_a_model_alone_is_asked_at_once(moody: Server) -> None:
    ask(moody, (1.0, 1.0))
    took = []
    for _ in range(10):
        began = time.perf_counter()
        ask(moody, (1.0, 1.0))
        took.append(time.perf_counter() - began)
    assert min(took) < 0.02


def test_one_request_that_fails_does_not_fail_those_beside_it(moody: Server) -> None:
    busy(moody, 0.5)
    rows = [[1.0, 1.0], [RAISE, 1.0], [2.0, 1.0]]
    answers = together(moody, [{"inputs": {"x": [row]}} for row in rows])
    assert [answer.status_code for answer in answers] == [200, 400, 200]
    assert "minus one is more than this model can take" in answers[1].json()["message"]
    assert answers[2].json() == {"predictions": [3.0]}


def test_requests_of_several_rows_get_their_own_back(moody: Server) -> None:
    busy(moody, 0.3)
    bodies = [{"inputs": {"x": [[float(at), float(row)] for row in range(at)]}} for at in range(1, 9)]
    answers = together(moody, bodies)
    for at, answer in zip(range(1, 9), answers, strict=True):
        assert answer.json() == {"predictions": [float(at + row) for row in range(at)]}


def test_a_model_that_does_not_answer_row_by_row_is_asked_one_by_one(serve: Serve) -> None:
    lump = serve("lump")
    answers = together(lump, [{"inputs": {"x": [[at, 1]] * 2}} for at in range(8)])
    assert [one.json()["predictions"] for one in answers] == [
        {"sum": 2.0 * at + 2, "rows": 2} for at in range(8)
    ]


def test_what_json_has_no_word_for_is_said_as_mlflow_says_it(moody: Server) -> None:
    assert ask(moody, (NAN, 1.0)).text == '{"predictions": [NaN]}'


def test_a_predictor_that_dies_costs_its_request_and_is_replaced(moody: Server) -> None:
    dead = moody.metric('flops_serving_predictor_restarts_total{reason="crash"}')
    before = moody.predictors()
    answer = ask(moody, (EXIT, 0.0))
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert moody.client.get("/health").status_code == 503
    assert moody.client.get("/v2/health/live").status_code == 200
    waiting = ask(moody, (1.0, 1.0))
    assert (waiting.status_code, waiting.json()["error_code"]) == (503, "TEMPORARILY_UNAVAILABLE")
    wait_until_ready(moody)
    assert ask(moody, (1.0, 1.0)).json() == {"predictions": [2.0]}
    assert moody.metric('flops_serving_predictor_restarts_total{reason="crash"}') == dead + 1
    assert set(moody.predictors()).isdisjoint(before)
    assert "the process ended with exit code 7" in moody.log


def test_a_predictor_that_is_killed_is_replaced(serve: Serve) -> None:
    server = serve("moody", predictors=2)
    first, second = server.predictors()
    os.kill(first, signal.SIGKILL)
    for _ in range(20):  # the other one goes on answering
        answer = ask(server, (1.0, 1.0))
        assert answer.status_code in (200, 503), f"{answer.text}\n{server.log}"
    assert server.client.get("/health").status_code == 200
    deadline = time.monotonic() + 60
    while server.metric("flops_serving_predictors_ready") < 2 or first in server.predictors():
        ask(server, (1.0, 1.0))
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert second in server.predictors()


def test_a_model_that_hangs_is_a_504_and_replaced(serve: Serve) -> None:
    server = serve("moody", limits={"request_timeout_s": 1.0})
    (hanging,) = server.predictors()
    began = time.monotonic()
    assert ask(server, (HANG, 0.0)).status_code == 504
    assert time.monotonic() - began < 3
    wait_until_ready(server)
    assert ask(server, (1.0, 1.0)).status_code == 200
    assert server.metric('flops_serving_predictor_restarts_total{reason="timeout"}') == 1
    assert not Path(f"/proc/{hanging}").exists()


def test_too_large_bodies_and_too_many_rows_are_a_413(serve: Serve) -> None:
    server = serve("moody", limits={"body_bytes": 2000, "rows": 10})
    assert ask(server, *[(1.0, 1.0)] * 10).status_code == 200
    rows = ask(server, *[(1.0, 1.0)] * 11)
    assert rows.status_code == 413
    assert "11 rows" in rows.json()["message"]
    assert ask(server, *[(1.0, 1.0)] * 400).status_code == 413

    def parts() -> object:
        for _ in range(100):
            yield b"1" * 100

    streamed = server.client.post("/invocations", content=parts(), headers={"content-type": "text/csv"})  # type: ignore[arg-type]
    assert streamed.status_code == 413
    assert ask(server, (1.0, 1.0)).status_code == 200


def test_more_requests_than_allowed_at_once_are_a_503(serve: Serve) -> None:
    server = serve("moody", limits={"concurrent": 4})
    busy(server, 1.0)
    answers = together(server, [{"inputs": {"x": [[1.0, 1.0]]}}] * 8)
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200] * 3 + [503] * 5
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.headers["retry-after"] == "1"


def test_slow_senders_and_endless_heads_are_cut_off(serve: Serve) -> None:
    server = serve("moody", limits={"receive_timeout_s": 1.0, "header_bytes": 4096})
    address = (server.client.base_url.host, server.client.base_url.port or 0)
    with socket.create_connection(address, 10) as silent:
        assert silent.recv(100) == b""
    with socket.create_connection(address, 10) as slow:
        slow.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    with socket.create_connection(address, 10) as endless:
        endless.sendall(b"GET / HTTP/1.1\r\n" + b"X-A: " + b"a" * 20_000 + b"\r\n")
        assert endless.recv(100).startswith(b"HTTP/1.1 400")
    assert ask(server, (1.0, 1.0)).status_code == 200


def test_sigterm_lets_requests_under_way_finish(serve: Serve) -> None:
    server = serve("moody", grace_s=20)
    ready = server.log_file.with_name("ready.json")
    (predictor,) = server.predictors()
    work, answers = later(lambda: ask(server, (SLEEP, 1.5)))
    while server.metric("flops_serving_requests_in_flight") < 1:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    with pytest.raises(httpx.TransportError):
        httpx.get(server.client.base_url.join("/ping"))
    work.join(20)
    assert answers[0].json() == {"predictions": [-2.5]}
    assert server.process.wait(10) == 0
    assert not ready.exists()
    assert not Path(f"/proc/{predictor}").exists()
    assert "Traceback" not in server.log


def test_what_takes_longer_than_the_grace_is_given_up(serve: Serve) -> None:
    server = serve("moody", grace_s=1)
    busy(server, 60)
    began = time.monotonic()
    assert server.end() == 0
    assert time.monotonic() - began < 10


def test_a_server_that_is_killed_leaves_no_predictor(serve: Serve) -> None:
    server = serve("moody")
    (predictor,) = server.predictors()
    server.process.kill()
    server.process.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{predictor}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_health_says_503_until_the_model_is_loaded(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    server = serve("moody", wait=False, port=port)
    statuses: list[int] = []
    deadline = time.monotonic() + 60
    while 200 not in statuses and time.monotonic() < deadline:
        try:
            statuses.append(httpx.get(f"http://127.0.0.1:{port}/health").status_code)
        except httpx.ConnectError:
            time.sleep(0.02)
    assert set(statuses) == {503, 200}
    assert server.end() == 0


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_reason(serve: Serve) -> None:
    server = serve("nothing_but_trouble", wait=False)
    assert server.process.wait(60) == 1
    assert "cannot be loaded: RuntimeError: the weights are gone" in server.log
    assert "Traceback" not in server.log.split("it wrote last")[0]


def test_what_cannot_be_used_ends_the_server_with_code_2(serve: Serve, tmp_path: Path) -> None:
    stale = tmp_path / "ready.json"
    stale.write_text("{}")
    empty = serve("no-such-model", wait=False, ready_file=str(stale))
    assert empty.process.wait(60) == 2
    assert "holds no model in MLflow's format" in empty.log
    assert not stale.exists()
    gone = serve("moody", wait=False, python=str(tmp_path / "python"))
    assert gone.process.wait(60) == 2
    assert "cannot be run" in gone.log
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = serve("moody", wait=False, port=taken.getsockname()[1])
        assert server.process.wait(60) == 2
        assert "choose another port" in server.log


def test_sigterm_while_the_model_is_loaded_ends_the_server(serve: Serve) -> None:
    server = serve("moody", wait=False)
    while not server.predictors():
        time.sleep(0.02)
    assert server.end() == 0


def test_callers_show_the_token(serve: Serve, tmp_path: Path) -> None:
    server = serve("digits", token="right")
    assert server.ask({"inputs": images(1)}).status_code == 200
    base = server.client.base_url
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "right"}):
        for path in ("/metrics", "/version", "/v2", "/nowhere"):
            assert httpx.get(base.join(path), headers=headers).status_code == 401
        refused = httpx.post(base.join("/invocations"), json={"inputs": images(1)}, headers=headers)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert httpx.get(base.join("/health"), headers=headers).status_code == 200


def test_tls_and_a_token_from_a_file(serve: Serve, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    issued = authority.issue("serving", ["127.0.0.1"])
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text(issued.certificate)
    key.write_text(issued.key)
    (tmp_path / "token").write_text("secret\n")
    server = serve("digits", tls={"cert": str(cert), "key": str(key)}, token_file=str(tmp_path / "token"))
    url = server.client.base_url.join("/invocations")
    assert url.scheme == "https"
    context = ssl.create_default_context(cafile=authority.certificate_file)
    answer = httpx.post(
        url, json={"inputs": images(1)}, headers={"authorization": "Bearer secret"}, verify=context
    )
    assert answer.status_code == 200


def test_metrics_are_read_by_prometheus(moody: Server) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    ask(moody, (1.0, 1.0))
    text = moody.client.get("/metrics").text
    names = {family.name for family in text_string_to_metric_families(text)}
    assert names >= {
        "flops_serving_requests",
        "flops_serving_request_seconds",
        "flops_serving_batch_requests",
        "flops_serving_batch_rows",
        "flops_serving_predict_seconds",
        "flops_serving_queue_requests",
        "flops_serving_requests_in_flight",
        "flops_serving_predictors_ready",
        "flops_serving_predictor_restarts",
    }


def test_the_models_network_is_cut_or_the_log_says_why(serve: Serve) -> None:
    server = serve("digits")
    (predictor,) = server.predictors()
    mine = Path("/proc/self/ns/net").readlink()
    cut = Path(f"/proc/{predictor}/ns/net").readlink() != mine
    assert cut or "the model's network is not cut" in server.log


CONFINED = """
set -e
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/secrets /run/model /run/python
cp "$CONFIG" /run/secrets/config.json
cp -r "$MODEL/." /run/model
chmod -R a+rX /run
if [ -n "$PRIVATE" ]; then
    mount --bind "$BASE" /run/python
    mount -t tmpfs -o mode=755 tmpfs "$PRIVATE"
    mkdir -p "$BASE"
    mount --bind /run/python "$BASE"
fi
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -o remount,bind,ro /run
mount -o remount,bind,ro /
exec setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \
    "$0" -P -m flops.serving --config /run/secrets/config.json
"""


def test_the_server_runs_without_any_right_on_a_root_it_cannot_write_to(
    models: Path, tmp_path: Path, require: Require
) -> None:
    """As in an image: user 10001, no capability, nothing writable but /tmp."""
    require(os.getuid() == 0, "root, who can give its rights away")
    config, log = tmp_path / "config.json", tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    ServingConfig(
        name="digits", model="/run/model", python=sys.executable, port=port, ready_file="/tmp/ready.json"
    ).write(config)
    # The interpreter may lie in a home that only root may enter.
    top = Path("/", Path(sys.base_prefix).parts[1])
    private = "" if top.stat().st_mode & 0o001 else str(top)
    places = {"CONFIG": config, "MODEL": models / "digits", "BASE": sys.base_prefix, "PRIVATE": private}
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", CONFINED, sys.executable],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **{name: str(place) for name, place in places.items()}},
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.05)
        answer = httpx.post(f"http://127.0.0.1:{port}/invocations", json={"inputs": images(1)})
        assert answer.status_code == 200
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status
        assert "Uid:\t10001" in status
    finally:
        process.terminate()
        code = process.wait(30)
    assert code == 0, log.read_text()
