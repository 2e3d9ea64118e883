"""The last FLOps code before a guest: locks the process in, says so, and becomes the user's interpreter.

Run as a file by FLOps's own interpreter (``-I -S``: standard library only), so that no file of the user's
environment (not even one that Python runs at its start) has run before the doors are shut.
``launcher.py CHANNEL_FD LIFELINE_FD isolate|share MEMORY_BYTES PROGRAM ARGUMENTS...``; 0 bytes: no limit.
"""

import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from pathlib import Path

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_F_SETSIG = 10
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
# What root keeps: working with files (CHOWN, DAC_OVERRIDE, FOWNER, FSETID). Without SYS_ADMIN there is no way
# back to the old network; without SYS_PTRACE none into the memory of the agent.
_CAPABILITIES_KEPT = frozenset((0, 1, 3, 4))


def tie_to(lifeline: int) -> None:
    """Let the kernel kill this process group when the other end of the pipe is closed.

    PR_SET_PDEATHSIG would not do: it fires when the *thread* that started us ends, and spares our children.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:
        sys.exit("the parent is gone")


def cut_network(libc: ctypes.CDLL) -> str:
    """Move into a network namespace with nothing but loopback; returns why not, empty when done."""
    user, group = os.getuid(), os.getgid()
    flags = _CLONE_NEWNET if user == 0 else _CLONE_NEWUSER | _CLONE_NEWNET
    if libc.unshare(flags) != 0 and (user != 0 or libc.unshare(flags | _CLONE_NEWUSER) != 0):
        return f"the system refuses a network namespace: {os.strerror(ctypes.get_errno())}"
    if os.getuid() != user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))
    return ""


def drop_privileges(libc: ctypes.CDLL) -> None:
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(64):
        if capability not in _CAPABILITIES_KEPT:
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails where it is not ours anyway


def main() -> None:
    channel, lifeline, isolate, memory_bytes, *program = sys.argv[1:]
    tie_to(int(lifeline))
    libc = ctypes.CDLL(None, use_errno=True)
    reason = cut_network(libc) if isolate == "isolate" else "isolation was not asked for"
    if isolate == "isolate":
        drop_privileges(libc)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the learner's data
    if int(memory_bytes):
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_bytes), int(memory_bytes)))
    body = json.dumps({"reason": reason}).encode()
    os.write(int(channel), len(body).to_bytes(4, "big") + body)
    os.execv(program[0], program)  # noqa: S606


if __name__ == "__main__":
    main()
