"""Scoring requests to our inference server, to ``mlflow models serve`` and to the model in process.

    python -m benchmarks.serving --json -

The model of ``examples/mnist-sklearn`` (logistic regression, 784 pixels, 10 digits), saved as the manager
saves it. Callers, each on a connection of its own, ask for one image at a time and wait for the answer; the
servers take turns in several short windows, so that a neighbour's load meets all of them. Every answer is
checked. MLflow runs in this environment (``--env-manager local``), with one worker as it does by default, and
with two. The limit is uvicorn with an application that only reads the body and says what it was given to say.
"""

import argparse
import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from flops.serving import ServingConfig, serving_command

PIXELS, DIGITS = 28 * 28, 10
START_S = 120.0
IMAGES = 64
ENVIRONMENT = {
    **os.environ,
    "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "true",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.serving", description=__doc__)
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each window")
    parser.add_argument("--windows", type=int, default=3, help="of each server")
    parser.add_argument("--only-answer", nargs=2, metavar=("PORT", "BODY"), help=argparse.SUPPRESS)
    parser.add_argument("--load", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--in-process", metavar="FOLDER", help=argparse.SUPPRESS)
    report.add_json_option(parser)
    options = parser.parse_args()
    if options.only_answer:
        only_answer(int(options.only_answer[0]), options.only_answer[1].encode())
    elif options.load:
        load(json.loads(Path(options.load).read_text()))
    elif options.in_process:
        in_process(Path(options.in_process))
    else:
        report.write(measure(options.callers, options.seconds, options.windows), options.json)


def measure(callers: int, seconds: float, windows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        model = folder / "model"
        bodies, answers = save_model(model, folder)
        ports = {
            "ours": stack.enter_context(ours(folder, model)),
            "mlflow": stack.enter_context(mlflow(folder, model, 1)),
            "mlflow_two_workers": stack.enter_context(mlflow(folder, model, 2)),
            "limit": stack.enter_context(limit(folder, answers[0])),
        }
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in ports}
        task = folder / "load.json"
        for name, port in ports.items():  # everybody's first requests are slow
            run_load(task, port, 2, 1.0, bodies, answers if name != "limit" else answers[:1])
        for _, (name, port) in itertools.product(range(windows), ports.items()):
            expected = answers if name != "limit" else answers[:1]
            found[name].append(run_load(task, port, callers, seconds, bodies, expected))
        alone = run_load(task, ports["ours"], 1, seconds, bodies, answers)
        mlflow_alone = run_load(task, ports["mlflow"], 1, seconds, bodies, answers)
        direct = json.loads(run("--in-process", str(folder)))
    result = {name: summary(parts) for name, parts in found.items()}
    mine, theirs, two = result["ours"], result["mlflow"], result["mlflow_two_workers"]
    return {
        "benchmark": "serving",
        "callers": callers,
        "windows": windows,
        "seconds_of_a_window": seconds,
        "request_bytes": len(bodies[0]),
        **result,
        "one_caller": {"ours": summary([alone]), "mlflow": summary([mlflow_alone])},
        "in_process": direct,
        "requests_per_s_ratio_to_mlflow": ratio(mine["requests_per_s"], theirs["requests_per_s"]),
        "p50_s_ratio_to_mlflow": ratio(mine["p50_s"], theirs["p50_s"]),
        "p99_s_ratio_to_mlflow": ratio(mine["p99_s"], theirs["p99_s"]),
        "requests_per_s_ratio_to_mlflow_two_workers": ratio(mine["requests_per_s"], two["requests_per_s"]),
        "p99_s_ratio_to_mlflow_two_workers": ratio(mine["p99_s"], two["p99_s"]),
        "requests_per_s_ratio_to_limit": ratio(mine["requests_per_s"], result["limit"]["requests_per_s"]),
        "requests_per_s_ratio_to_in_process": ratio(mine["requests_per_s"], direct["requests_per_s"]),
    }


def ratio(a: float, b: float) -> float:
    return round(a / b, 3)


def save_model(model: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Save the model as the manager does; returns bodies of requests and the answers to them."""
    import warnings

    from sklearn.linear_model import LogisticRegression

    from flops_worker import export

    random = np.random.default_rng(3)
    images = (random.random((600, PIXELS)) * (random.random((600, PIXELS)) < 0.2) * 255).round() / 255
    labels = np.arange(600) % DIGITS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator = LogisticRegression(max_iter=10).fit(images, labels)
        export.save(
            estimator,
            example=None,
            directory=str(model),
            flavor="sklearn",
            name="mnist",
            requirements=["mlflow", "scikit-learn"],
            code=str(folder),
        )
    asked = images[:IMAGES]
    np.save(folder / "images.npy", asked)
    bodies = [json.dumps({"inputs": [image.tolist()]}) for image in asked]
    answers = [json.dumps({"predictions": [int(label)]}) for label in estimator.predict(asked)]
    return bodies, answers


@contextmanager
def ours(folder: Path, model: Path) -> Iterator[int]:
    ready, path = folder / "ready.json", folder / "ours.json"
    ServingConfig(name="mnist", model=str(model), python=sys.executable, ready_file=str(ready)).write(path)
    with running(folder, "ours", serving_command(str(path), sys.executable)) as process:
        deadline = time.monotonic() + START_S
        while not ready.exists():
            check(process, deadline, folder / "ours.log")
        yield int(json.loads(ready.read_text())["url"].rpartition(":")[2])


@contextmanager
def mlflow(folder: Path, model: Path, workers: int) -> Iterator[int]:
    port, name = free_port(), f"mlflow{workers}"
    command = [
        *(sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"),
        *("-h", "127.0.0.1", "-p", str(port), "-w", str(workers)),
    ]
    with running(folder, name, command) as process:
        answers_at(process, f"http://127.0.0.1:{port}/ping", folder / f"{name}.log")
        yield port


@contextmanager
def limit(folder: Path, answer: str) -> Iterator[int]:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.serving", "--only-answer", str(port), answer]
    with running(folder, "limit", command) as process:
        answers_at(process, f"http://127.0.0.1:{port}/", folder / "limit.log")
        yield port


@contextmanager
def running(folder: Path, name: str, command: Sequence[str]) -> Iterator["subprocess.Popen[bytes]"]:
    with (folder / f"{name}.log").open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT, process_group=0
        )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers_at(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            check(process, deadline, log)


def check(process: "subprocess.Popen[bytes]", deadline: float, log: Path) -> None:
    if process.poll() is not None or time.monotonic() > deadline:
        raise RuntimeError(f"a server did not start:\n{log.read_text()}")
    time.sleep(0.05)


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.serving", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, check=True, text=True).stdout


def run_load(
    task: Path, port: int, callers: int, seconds: float, bodies: list[str], answers: list[str]
) -> dict[str, Any]:
    """Ask in a process of its own, so that the servers' processes are not those of this one's children."""
    asked = {"port": port, "callers": callers, "seconds": seconds, "bodies": bodies, "answers": answers}
    task.write_text(json.dumps(asked))
    result: dict[str, Any] = json.loads(run("--load", str(task)))
    return result


def load(task: dict[str, Any]) -> None:
    """Ask for a while; says how long each request took."""
    import uvloop

    took: list[float] = []
    requests = [
        b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body.encode())
        for body in task["bodies"]
    ]
    answers = [json.loads(answer) for answer in task["answers"]]

    async def caller(number: int, until: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", task["port"])
        for turn in itertools.count(number):
            began = time.perf_counter()
            if began >= until:
                break
            writer.write(requests[turn % len(requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
            body = await reader.readexactly(length)
            took.append(time.perf_counter() - began)
            if not head.startswith(b"HTTP/1.1 200") or json.loads(body) != answers[turn % len(answers)]:
                raise RuntimeError(f"a wrong answer: {head!r} {body!r}")
        writer.close()

    async def all_callers() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(caller(one, began + task["seconds"]) for one in range(task["callers"])))
        return time.perf_counter() - began

    elapsed = uvloop.run(all_callers())
    sys.stdout.write(json.dumps({"elapsed_s": elapsed, "took_s": took}))


def in_process(folder: Path) -> None:
    """The model without any server: what MLflow's loaded model takes for one image, and for many at once."""
    import mlflow.pyfunc

    images = np.load(folder / "images.npy")
    model = mlflow.pyfunc.load_model(str(folder / "model"))
    took: list[float] = []
    deadline = time.perf_counter() + 3.0
    for turn in itertools.count():
        began = time.perf_counter()
        if began > deadline:
            break
        model.predict(images[turn % IMAGES][None])
        took.append(time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(20):
        model.predict(images)
    together = (time.perf_counter() - began) / 20
    took = took[10:]
    result = {
        "requests_per_s": round(len(took) / sum(took), 1),
        "p50_s": float(np.median(took)),
        "p99_s": float(np.quantile(took, 0.99)),
        f"seconds_of_{IMAGES}_images_at_once": together,
    }
    sys.stdout.write(json.dumps(result))


def only_answer(port: int, body: bytes) -> None:
    """The limit: the same HTTP server, and nothing behind it."""
    import uvicorn

    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    uvicorn.run(
        app,
        host="127.0.0.1",
        port=port,
        http="httptools",
        loop="uvloop",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        date_header=False,
    )


def summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    took = np.concatenate([part["took_s"] for part in parts])
    elapsed = sum(part["elapsed_s"] for part in parts)
    return {
        "requests": len(took),
        "requests_per_s": round(len(took) / elapsed, 1),
        "p50_s": round(float(np.quantile(took, 0.5)), 6),
        "p99_s": round(float(np.quantile(took, 0.99)), 6),
        "max_s": round(float(took.max()), 6),
    }


if __name__ == "__main__":
    main()
