"""The channel between agent and worker: JSON headers and file descriptors over one Unix socket.

A message is 4 bytes big-endian length and a JSON object; open files travel beside it (SCM_RIGHTS), so arrays
never pass through the socket and no path has to be shared. One side asks, the other answers; while the worker
works on a request it may ask back (for its data), and the agent answers before the worker does.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
from typing import Any, Dict, List, Sequence, Tuple

MAX_MESSAGE_BYTES = 16 << 20
MAX_FILES = 64


class ChannelClosed(ConnectionError):
    """The other side is gone, or does not keep to the protocol."""


def send(sock: socket.socket, header: Dict[str, Any], files: Sequence[int] = ()) -> None:
    """Send one message with the open files ``files``; they stay open here."""
    body = json.dumps(header, separators=(",", ":")).encode()
    if len(body) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(body)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    message = memoryview(len(body).to_bytes(4, "big") + body)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files).tobytes())] if files else []
    try:
        sent = sock.sendmsg([message], ancillary)
        sock.sendall(message[sent:])
    except OSError as error:
        raise ChannelClosed("the other side closed the channel") from error


def offer(sock: socket.socket, header: Dict[str, Any]) -> None:
    """Send a small message if it can go at once; never waits, and never fails."""
    body = json.dumps(header, separators=(",", ":")).encode()
    with contextlib.suppress(OSError):
        sock.send(len(body).to_bytes(4, "big") + body, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> Tuple[Dict[str, Any], List[int]]:
    """Receive one message and its files, which the caller closes.

    Raises:
        ChannelClosed: end of the channel, or something that is not a message.
        TimeoutError, socket.timeout: the socket's own timeout passed.
    """
    files: List[int] = []
    try:
        length = int.from_bytes(_exactly(sock, 4, files), "big")
        if length > MAX_MESSAGE_BYTES:
            raise ChannelClosed(f"a message of {length} bytes is over the limit")
        header = json.loads(_exactly(sock, length, files))
        if not isinstance(header, dict):
            raise ChannelClosed("a message is not a JSON object")
    except BaseException as error:
        close_all(files)
        if isinstance(error, socket.timeout):
            raise
        if isinstance(error, (OSError, ValueError)):
            raise ChannelClosed(str(error)) from error
        raise
    return header, files


def close_all(files: Sequence[int]) -> None:
    for fd in files:
        with contextlib.suppress(OSError):
            os.close(fd)


def _exactly(sock: socket.socket, count: int, files: List[int]) -> bytes:
    data = b""
    size = array.array("i").itemsize
    while len(data) < count:
        part, ancillary, flags, _ = sock.recvmsg(count - len(data), socket.CMSG_LEN(MAX_FILES * size))
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % size])
                files.extend(numbers)
        if not part:
            raise ChannelClosed("the other side closed the channel")
        if flags & socket.MSG_CTRUNC:
            raise ChannelClosed("a message brought too many files")
        data += part
    return data
