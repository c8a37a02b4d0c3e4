"""A server that does not keep to the API."""

from __future__ import annotations

import socket
import threading
from pathlib import Path


class Liar:
    """Answers anything with ``answer``, and then ends the connection; with None it waits until the client does."""

    def __init__(self, path: Path, answer: bytes | None) -> None:
        self.path = path
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        sock, _ = self._listener.accept()
        with sock:
            sock.recv(1 << 16)
            if self._answer is None:
                sock.recv(1)
            else:
                sock.sendall(self._answer)

    def __enter__(self) -> Liar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.join()
        self._listener.close()
