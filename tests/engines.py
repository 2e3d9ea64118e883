"""Docker engines of our own for tests: one dockerd each, in a folder that is gone afterwards.

Several may run at once on a machine; what a killed test run left is cleared away by the next. An image to
run in them is made of this machine's own programs, so nothing is downloaded.
"""

import hashlib
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import docker
from docker.errors import DockerException

IMAGE = "flops-test:1"
"""Holds dash, a few of coreutils, and this machine's /usr/bin/python3 with its standard library."""

ARM64_IMAGE = "flops-test-arm64:1"
"""The same for another platform, in name only."""

_PREFIX = "flops-engine-"
_BRIDGE = "feb"
_ATTEMPTS = 4
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 40.0
_PROGRAMS = re.findall(
    r"\w+",
    "cat chmod cp date dd echo false grep head id ls mkdir mkfifo printf rm sh sleep stat tail touch tr true",
)
_NOT_OF_PYTHON = {"__pycache__", "test", "tests", "idlelib", "ensurepip", "lib2to3", "tkinter", "turtledemo"}


def can_run_engines() -> bool:
    """Whether this machine and this user can start a dockerd."""
    return os.geteuid() == 0 and shutil.which("dockerd") is not None and Path("/usr/bin/python3").exists()


class PrivateEngine:
    """One dockerd; `start`, `stop` and `kill` it as often as you like, then `close` it.

    Args:
        options: of dockerd, besides ours.
        bridge: it has a default bridge, as engines usually have.
    """

    def __init__(self, options: Sequence[str] = (), *, bridge: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        (self.folder / "owner").write_text(str(os.getpid()))
        self.socket = self.folder / "docker.sock"
        self.url = f"unix://{self.socket}"
        self._options = (*options, "--bridge", self._make_bridge() if bridge else "none")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """The last lines of what it said."""
        path = self.folder / "log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    def start(self) -> None:
        """Returns once it answers; raises AssertionError with its log when it does not."""
        for attempt in range(1, _ATTEMPTS + 1):
            self._start_once()
            if self._await():
                return
            log = self.log
            # Engines that start at the same moment take the rules of the firewall from each other.
            assert "iptables" in log.splitlines()[-1] or "iptables" in log.splitlines()[-2], log
            assert attempt < _ATTEMPTS, log
            time.sleep(attempt)

    def _make_bridge(self) -> str:
        """A bridge of its own: docker0 belongs to whoever is first on the machine."""
        name = f"{_BRIDGE}{secrets.token_hex(4)}"
        (self.folder / "bridge").write_text(name)
        address = f"10.215.{secrets.randbelow(250)}.1/24"
        for words in (
            ["link", "add", "name", name, "type", "bridge"],
            ["address", "add", address, "dev", name],
            ["link", "set", name, "up"],
        ):
            subprocess.run(["ip", *words], check=True, capture_output=True)
        return name

    def _start_once(self) -> None:
        folder = self.folder
        with (folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    "dockerd",
                    *("--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")),
                    *("--pidfile", str(folder / "pid"), "--host", self.url),
                    # Raising limits is not permitted everywhere.
                    *("--default-ulimit", "nofile=1024:1024"),
                    *("--shutdown-timeout", "5"),
                    *self._options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _await(self) -> bool:
        """Whether the process that was just started answers, or else has ended."""
        assert self._process is not None
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None:
                return False
            assert time.monotonic() < deadline, f"dockerd does not answer:\n{self.log}"
            time.sleep(0.05)
        return True

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:  # the SDK leaves a socket open where nobody listens
            if probe.connect_ex(str(self.socket)) != 0:
                return False
        try:
            client = self.client()
        except DockerException:
            return False
        client.close()
        return True

    def client(self) -> docker.APIClient:
        """A new one, the caller's to close."""
        return docker.APIClient(base_url=self.url, version="auto", timeout=60)

    def stop(self) -> None:
        """As `systemctl stop docker` does."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None

    def kill(self) -> None:
        """As a crash of dockerd does; its containers stay until it starts again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            (self.folder / "pid").unlink(missing_ok=True)
            for pid in _pids_of(self.folder, ("containerd",)):  # a service of its own elsewhere, a child here
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            (self.folder / "exec" / "containerd" / "containerd.pid").unlink(missing_ok=True)

    def load_image(self) -> None:
        """Have `IMAGE` and `ARM64_IMAGE`."""
        client = self.client()
        try:
            client.load_image(_image_archive())  # type: ignore[no-untyped-call]
        finally:
            client.close()

    def close(self) -> None:
        """End it, with all that it runs, has mounted and has written."""
        with suppress(Exception):
            if self._process is not None and self._process.poll() is None:
                self._clear()
        with suppress(Exception):
            self.stop()
        clear(self.folder)

    def _clear(self) -> None:
        client = self.client()
        try:
            for container in client.containers(all=True):
                client.remove_container(container["Id"], force=True, v=True)
            for network in client.networks():
                if network["Name"] not in ("bridge", "host", "none"):
                    client.remove_network(network["Id"])
        finally:
            client.close()


@contextmanager
def private_engine(options: Sequence[str] = (), *, bridge: bool = False) -> Iterator[PrivateEngine]:
    """A running `PrivateEngine` with the test images."""
    clear_leftovers()
    engine = PrivateEngine(options, bridge=bridge)
    try:
        engine.start()
        engine.load_image()
        yield engine
    finally:
        engine.close()


def clear_leftovers() -> None:
    """Clear away engines whose test run is gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            owner = int((folder / "owner").read_text())
        except (OSError, ValueError):
            continue
        if not Path(f"/proc/{owner}").exists():
            clear(folder)


def clear(folder: Path) -> None:
    """Kill what runs in an engine's folder, unmount what is mounted there, delete its bridges and itself."""
    for _ in range(50):
        pids = _pids_of(folder)
        if not pids:
            break
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    for bridge in _bridges_of(folder):
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True, check=False)
        _drop_rules(bridge)
    for mounted in sorted(_mounts_of(folder), reverse=True):
        subprocess.run(["umount", "--lazy", mounted], capture_output=True, check=False)
    shutil.rmtree(folder, ignore_errors=True)


_OF_ENGINES = ("dockerd", "containerd", "containerd-shim-runc-v2", "docker-proxy")


def _pids_of(folder: Path, programs: Sequence[str] = _OF_ENGINES) -> list[int]:
    """Of an engine's programs that name its folder; with the shims, of what runs in its containers."""
    mine: set[int] = set()
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        names_us = any(os.fsencode(folder) + b"/" in word for word in words)
        if names_us and Path(os.fsdecode(words[0])).name in programs:
            mine.add(int(entry.name))
    while "containerd-shim-runc-v2" in programs and (
        grown := {pid for pid, parent in parents.items() if parent in mine and pid not in mine}
    ):
        mine |= grown
    return sorted(mine)


def _bridges_of(folder: Path) -> list[str]:
    """Its own, and those of networks that it left when it was killed: only its store of them tells."""
    own, store = folder / "bridge", folder / "data" / "network" / "files" / "local-kv.db"
    names = [own.read_text()] if own.exists() else []
    if store.exists():
        ids = set(re.findall(rb"docker/network/v1\.0/network/([0-9a-f]{64})", store.read_bytes()))
        names += [f"br-{number[:12].decode()}" for number in ids]
    return names


def _drop_rules(bridge: str) -> None:
    """The firewall's rules for a bridge that is gone."""
    for table in ("filter", "nat"):
        listed = ["iptables", "--wait", "--table", table, "--list-rules"]
        for rule in subprocess.run(listed, capture_output=True, text=True, check=False).stdout.splitlines():
            words = rule.split()
            if words[0] == "-A" and bridge in words:
                words[0] = "-D"
                subprocess.run([*listed[:-1], *words], capture_output=True, check=False)


def _mounts_of(folder: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    return [point for point in points if point.startswith(f"{folder}/")]


# the image
@cache
def _image_archive() -> bytes:
    """`IMAGE` and `ARM64_IMAGE`, as 'docker save' would write them."""
    layer = _layer()
    diff_id = hashlib.sha256(layer).hexdigest()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        _add_bytes(archive, "layer.tar", layer)
        manifest = []
        for tag, architecture in ((IMAGE, _architecture()), (ARM64_IMAGE, "arm64")):
            config = json.dumps(
                {
                    "architecture": architecture,
                    "os": "linux",
                    "config": {"Env": ["PATH=/usr/bin:/bin"], "Labels": {"tag": tag}},
                    "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff_id}"]},
                }
            ).encode()
            name = f"{hashlib.sha256(config).hexdigest()}.json"
            _add_bytes(archive, name, config)
            manifest.append({"Config": name, "RepoTags": [tag], "Layers": ["layer.tar"]})
        _add_bytes(archive, "manifest.json", json.dumps(manifest).encode())
    return buffer.getvalue()


def _architecture() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]


def _layer() -> bytes:
    python = Path("/usr/bin/python3").resolve()
    library = Path("/usr/lib") / python.name
    programs = {f"/bin/{name}": Path(f"/bin/{name}").resolve() for name in _PROGRAMS}
    extensions = sorted(library.glob("lib-dynload/*.so"))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        _add_folder(tar, "tmp", 0o1777)
        for folder in ("run", "proc", "dev", "etc"):
            _add_folder(tar, folder, 0o755)
        for folder in ("run/secrets", "run/flops", "run/flops/seat", "var/lib/flops"):
            _add_folder(tar, folder, 0o700, owner=10001)
        for target, path in {**programs, "/usr/bin/python3": python}.items():
            _add_bytes(tar, target[1:], path.read_bytes(), 0o755)
        for path in _libraries_of([python, *programs.values(), *extensions]):
            _add_bytes(tar, str(path)[1:], path.read_bytes(), 0o755)
        for path in sorted(library.rglob("*")):
            parts = path.relative_to(library).parts
            if path.is_file() and not _NOT_OF_PYTHON & set(parts) and not parts[0].startswith("config-"):
                _add_bytes(tar, str(path)[1:], path.read_bytes(), 0o644)
    return buffer.getvalue()


def _libraries_of(programs: Sequence[Path]) -> list[Path]:
    said = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=False).stdout
    return sorted({Path(path) for path in re.findall(r"(/\S+\.so\S*) \(0x", said)})


def _add_folder(tar: tarfile.TarFile, name: str, mode: int, owner: int = 0) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.mode = tarfile.DIRTYPE, mode
    member.uid = member.gid = owner
    tar.addfile(member)


def _add_bytes(tar: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), mode
    tar.addfile(member, io.BytesIO(content))
