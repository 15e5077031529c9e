"""A real S3 server on this machine, which counts its requests."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from kdx.remote import as_path

BUCKET = "bucket"


@dataclass
class Server:
    """environment: the variables with which other processes use the server. counts, writes: the requests since `reset`: the number by
    method, and those that change an object."""

    environment: dict[str, str]
    counts: Counter[str] = field(default_factory=Counter)
    writes: list[str] = field(default_factory=list)

    def reset(self) -> None:
        self.counts.clear()
        self.writes.clear()


class _Requests(logging.Handler):
    """Counts the lines that the server logs: one per request."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server

    def emit(self, record: logging.LogRecord) -> None:
        method, _, rest = re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage()).partition('"')[2].partition(" ")
        self.server.counts[method] += 1
        if method in ("PUT", "DELETE"):
            self.server.writes.append(f"{method} {rest.partition(' ')[0]}")


def upload(folder: Path, url: str) -> None:
    """Copy a folder to a URL."""
    for path in folder.rglob("*"):
        if path.is_file():
            (as_path(url) / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())


@contextmanager
def s3_server() -> Iterator[Server]:
    """A server with an empty bucket `BUCKET`. Environment variables contain its address."""
    import s3fs
    from moto.server import ThreadedMotoServer

    service: Any = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    service.start()
    host, port = service.get_host_and_port()
    server = Server(
        {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    )
    log, handler = logging.getLogger("werkzeug"), _Requests(server)
    level, propagate = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    try:
        with patch.dict(os.environ, server.environment):
            s3fs.S3FileSystem(use_listings_cache=False).mkdir(BUCKET)
            yield server
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
        service.stop()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The server of all tests of a process."""
    with s3_server() as server:
        yield server
