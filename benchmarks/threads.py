"""A proxy of bare Python threads, without HTTP: the floor of the language, not a product.

One thread a connection; the bytes of both sides pass as they are, nothing is checked, parsed or
counted. What it costs, no Python proxy that reads a thread per stream can get below.
"""

from __future__ import annotations

import argparse
import socket
import threading


def serve(port: int, backend_port: int) -> None:
    """Listen on 127.0.0.1:`port` forever."""
    with socket.create_server(("127.0.0.1", port), backlog=1024) as listener:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_pass_on, args=(client, backend_port), daemon=True).start()


def _pass_on(client: socket.socket, backend_port: int) -> None:
    with client, socket.create_connection(("127.0.0.1", backend_port)) as backend:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        backend.sendall(client.recv(1 << 16))  # the load generator sends a request in one piece
        while data := backend.recv(1 << 16):
            client.sendall(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("backend_port", type=int)
    given = parser.parse_args()
    serve(given.port, given.backend_port)


if __name__ == "__main__":
    main()
