import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from flops.serving import ServingConfig, serving_command

START_S = 90.0
SAVE = Path(__file__).with_name("save_models.py")


@dataclass
class Server:
    """A real inference server, MLflow's or ours."""

    process: "subprocess.Popen[bytes]"
    log_file: Path
    client: httpx.Client

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def ask(self, body: Any, path: str = "/invocations", **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def metric(self, name: str) -> float:
        """The value of one line of /metrics, by name and labels."""
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        raise AssertionError(f"there is no metric {name}")

    def end(self) -> int:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def predictors(self) -> list[int]:
        """Ids of the processes that hold the model."""
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        found = [int(one) for one in Path(children).read_text().split()]
        for thread in Path(f"/proc/{self.process.pid}/task").iterdir():
            found += [int(one) for one in (thread / "children").read_text().split()]
        return sorted(set(found))


Serve = Callable[..., Server]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models as MLflow saves them: see save_models.py."""
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, str(SAVE), str(folder)], check=True, env=quiet_environment())
    return folder


@pytest.fixture(scope="module")
def serve(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts a server of a model, and waits until it answers; ended with the module."""
    servers: list[Server] = []

    def start(model: str, *, wait: bool = True, **options: Any) -> Server:
        folder = tmp_path_factory.mktemp("server")
        ready = folder / "ready.json"
        config = ServingConfig.from_json(
            {
                "name": model,
                "model": str(models / model),
                "python": sys.executable,
                "ready_file": str(ready),
                "version": "3",
                **options,
            }
        )
        path = folder / "config.json"
        config.write(path)
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                serving_command(str(path), sys.executable), stdout=output, stderr=subprocess.STDOUT
            )
        server = Server(process, log, httpx.Client())
        servers.append(server)
        if not wait:
            return server
        deadline = time.monotonic() + START_S
        while not ready.exists():
            assert process.poll() is None, server.log
            assert time.monotonic() < deadline, server.log
            time.sleep(0.02)
        said = json.loads(ready.read_text())
        assert said["pid"] == process.pid
        token = options.get("token")
        server.client.close()
        server.client = httpx.Client(
            base_url=said["url"],
            timeout=30,
            verify=not options.get("tls"),
            headers={"authorization": f"Bearer {token}"} if token else {},
        )
        return server

    yield start
    for server in servers:
        server.client.close()
        if server.process.poll() is None:
            server.end()


@pytest.fixture(scope="module")
def serve_mlflow(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts MLflow's own server of a model."""
    servers: list[Server] = []

    def start(model: str) -> Server:
        folder = tmp_path_factory.mktemp("mlflow")
        port = free_port()
        log = folder / "log"
        command = [
            *(sys.executable, "-m", "mlflow", "models", "serve", "-m", str(models / model)),
            *("--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)),
        ]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=quiet_environment(),
                process_group=0,
            )
        server = Server(process, log, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30))
        servers.append(server)
        deadline = time.monotonic() + START_S
        while True:
            assert process.poll() is None, server.log
            assert time.monotonic() < deadline, server.log
            try:
                if server.client.get("/ping").status_code == 200:
                    return server
            except httpx.TransportError:
                time.sleep(0.05)

    yield start
    for server in servers:
        server.client.close()
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


def quiet_environment() -> dict[str, str]:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return {
        **os.environ,
        "PATH": path,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "true",
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def together(server: Server, bodies: list[Any], path: str = "/invocations") -> list[httpx.Response]:
    """Requests that are all under way at once."""

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(
            base_url=server.client.base_url,
            timeout=60,
            headers=server.client.headers,
            limits=httpx.Limits(max_connections=len(bodies)),
        ) as client:
            return await asyncio.gather(*(client.post(path, json=body) for body in bodies))

    return asyncio.run(ask_all())


def later(action: Callable[[], Any]) -> "tuple[threading.Thread, list[Any]]":
    """Run something beside the test."""
    results: list[Any] = []

    def act() -> None:
        try:
            results.append(action())
        except httpx.TransportError as error:
            results.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread, results


def images(count: int) -> list[list[float]]:
    values: list[list[float]] = np.random.default_rng(7).random((count, 64)).round(3).tolist()
    return values


def person(**changes: Any) -> Mapping[str, Any]:
    return {"age": 41.5, "children": 2, "city": "Munich", "married": True, **changes}
