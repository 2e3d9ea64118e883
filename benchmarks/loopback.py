"""The physical limit of a round: raw loopback sockets that move the same bytes, learner after learner."""

import socket
import threading
import time

_BUFFER = 1 << 20


def seconds(learners: int, nbytes: int, repeats: int = 3) -> float:
    """The best of some runs: ``nbytes`` down to and up from each peer, one peer after the other."""
    return min(_once(learners, nbytes) for _ in range(repeats))


def _once(learners: int, nbytes: int) -> float:
    listener = socket.create_server(("127.0.0.1", 0))
    peers = []
    pairs = []
    for _ in range(learners):
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pairs.append(server)
        peers.append(threading.Thread(target=_peer, args=(client, nbytes), daemon=True))
    for peer in peers:
        peer.start()
    payload, target = bytes(nbytes), bytearray(nbytes)
    start = time.perf_counter()
    for server in pairs:
        server.sendall(payload)
        _receive_into(server, memoryview(target))
    elapsed = time.perf_counter() - start
    for server in pairs:
        server.close()
    listener.close()
    return elapsed


def _peer(sock: socket.socket, nbytes: int) -> None:
    data = bytearray(nbytes)
    with sock:
        _receive_into(sock, memoryview(data))
        sock.sendall(data)


def _receive_into(sock: socket.socket, target: memoryview) -> None:
    while target:
        count = sock.recv_into(target, min(len(target), _BUFFER))
        if not count:
            raise ConnectionError("the peer closed")
        target = target[count:]
