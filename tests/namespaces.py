"""Machines for tests: network namespaces, joined with each other and this one by a bridge in one more.

Their names begin with a prefix and the process that made them, so that what a test run that was killed has
left is cleared away by the next.
"""

import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path


def ip(*words: str) -> str:
    """What ``ip`` of iproute2 prints."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


def free_subnet() -> str:
    """Three quarters of an address: a network of private use that this machine has no way to yet."""
    taken = ip("-4", "address", "show") + ip("-4", "route", "show", "table", "all")
    candidates = (f"10.213.{(os.getpid() + step) % 250 + 1}" for step in range(250))
    return next(subnet for subnet in candidates if f"{subnet}." not in taken)


def connect(prefix: str, host: str, address: str, machines: Mapping[str, str]) -> None:
    """Make namespaces, and join them.

    Args:
        prefix: of the bridge's own namespace.
        host: this machine's network device there.
        address: of this machine there.
        machines: addresses by namespace.
    """
    lan = f"{prefix}-lan"
    ip("netns", "add", lan)
    ip("-n", lan, "link", "add", "lan", "type", "bridge")
    ip("-n", lan, "link", "set", "lan", "up")
    ip("link", "add", host, "type", "veth", "peer", "name", "host", "netns", lan)
    ip("-n", lan, "link", "set", "host", "master", "lan", "up")
    ip("address", "add", f"{address}/24", "dev", host)
    ip("link", "set", host, "up")
    for number, (namespace, own) in enumerate(machines.items()):
        ip("netns", "add", namespace)
        ip("-n", namespace, "link", "set", "lo", "up")
        peer = ("peer", "name", f"port{number}", "netns", lan)
        ip("-n", namespace, "link", "add", "eth0", "type", "veth", *peer)
        ip("-n", lan, "link", "set", f"port{number}", "master", "lan", "up")
        ip("-n", namespace, "address", "add", f"{own}/24", "dev", "eth0")
        ip("-n", namespace, "link", "set", "eth0", "up")


def disconnect(prefix: str, host: str) -> None:
    """Remove what `connect` has made, as far as it is there."""
    for line in ip("netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(f"{prefix}-"):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    subprocess.run(["ip", "link", "delete", host], capture_output=True, check=False)


def owners_that_are_gone(prefix: str, more: Iterable[str] = ()) -> set[int]:
    """Processes that have made such namespaces, or other things by name, and are not there any more.

    Args:
        prefix: in front of the process's id, ending in a dash.
        more: names of those other things.
    """
    names = [line.split()[0] for line in ip("netns", "list").splitlines()]
    owners = {name.removeprefix(prefix).split("-")[0] for name in (*names, *more) if name.startswith(prefix)}
    return {int(owner) for owner in owners if owner.isdigit() and not Path(f"/proc/{owner}").exists()}
