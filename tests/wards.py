"""Machines of data owners for tests: each in a network namespace whose firewall lets nobody in.

All of them and this machine, which the manager runs on, are joined by a bridge that lies in one more
namespace. Without the rights for that they are folders of this machine, and nothing is cut. What a test run
that was killed has left is cleared away by the next.
"""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests import namespaces

_PREFIX = "flops-ward-"


def can_make_namespaces() -> bool:
    return os.geteuid() == 0 and all(shutil.which(program) for program in ("ip", "iptables"))


class Ward:
    """One data owner's machine.

    Args:
        namespace: of its network; None: this machine's own.
        address: of the machine there.
    """

    def __init__(self, number: int, namespace: str | None, address: str) -> None:
        self.number = number
        self.namespace = namespace
        self.address = address

    def command(self, *words: str) -> list[str]:
        """The command, run there."""
        inside = [] if self.namespace is None else ["ip", "netns", "exec", self.namespace]
        return [*inside, *words]

    def plug(self, *, connected: bool) -> None:
        """Pull its network cable, or put it in again."""
        assert self.namespace is not None
        namespaces.ip("-n", self.namespace, "link", "set", "eth0", "up" if connected else "down")

    def takes_connections(self, port: int) -> bool:
        """Whether somebody outside reaches a program that listens there on all addresses."""
        listening = (
            f"import socket; s = socket.create_server(('', {port})); print('', flush=True); s.accept()"
        )
        with subprocess.Popen(
            self.command("python3", "-c", listening), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as program:
            try:
                assert program.stdout is not None
                assert program.stdout.readline() == b"\n", "it does not listen"
                with socket.create_connection((self.address, port), timeout=3.0):
                    return True
            except OSError:
                return False
            finally:
                program.kill()


@contextmanager
def wards(count: int) -> Iterator[tuple[str, Sequence[Ward]]]:
    """Machines, and the address of this one that they see."""
    if not can_make_namespaces():
        yield "127.0.0.1", [Ward(number, None, "127.0.0.1") for number in range(1, count + 1)]
        return
    for owner in namespaces.owners_that_are_gone(_PREFIX):
        namespaces.disconnect(f"{_PREFIX}{owner}", _host(owner))
    subnet = namespaces.free_subnet()
    prefix = f"{_PREFIX}{os.getpid()}"
    made = [Ward(n, f"{prefix}-{n}", f"{subnet}.{20 + n}") for n in range(1, count + 1)]
    try:
        machines = {str(ward.namespace): ward.address for ward in made}
        namespaces.connect(prefix, _host(os.getpid()), f"{subnet}.1", machines)
        for ward in made:
            for rule in (
                ("-P", "INPUT", "DROP"),
                ("-A", "INPUT", "-i", "lo", "-j", "ACCEPT"),
                ("-A", "INPUT", "-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT"),
            ):
                subprocess.run(ward.command("iptables", "--wait", *rule), check=True, capture_output=True)
        yield f"{subnet}.1", made
    finally:
        namespaces.disconnect(prefix, _host(os.getpid()))


def _host(owner: int) -> str:
    return f"fwd{owner}"
