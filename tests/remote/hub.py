"""The part of the Hugging Face hub's protocol that reading a data set needs, on this machine."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "someone/pictures"


class _Handler(BaseHTTPRequestHandler):
    """Serves the files of `folder` as the repository of a data set."""

    protocol_version = "HTTP/1.1"
    folder: Path
    reads: list[str]

    def do_GET(self) -> None:
        place = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(rf"/api/datasets/{REPOSITORY}/tree/main/?(.*)", place):
            self._reply(self._entries(sorted((self.folder / match[1]).rglob("*"))))
        elif place == f"/api/datasets/{REPOSITORY}":
            self._reply({"id": REPOSITORY, "sha": "0" * 40})
        elif place.startswith(prefix := f"/datasets/{REPOSITORY}/resolve/main/"):
            self._send(self.folder / place.removeprefix(prefix))
        else:
            self._reply({"error": "Repository not found"}, 404)

    def do_POST(self) -> None:
        """The entries of some paths."""
        paths = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        self._reply(self._entries([self.folder / path for path in paths if (self.folder / path).exists()]))

    def log_message(self, *_: Any) -> None: ...

    def _entries(self, paths: list[Path]) -> list[dict[str, Any]]:
        entries = []
        for path in paths:
            content = path.read_bytes() if path.is_file() else b""
            kind, version = ("file" if path.is_file() else "directory"), hashlib.sha1(content).hexdigest()
            entries.append({"type": kind, "oid": version, "size": len(content), "path": path.relative_to(self.folder).as_posix()})
        return entries

    def _send(self, path: Path) -> None:
        if not path.is_file():
            self._reply({"error": "Entry not found"}, 404)
            return
        content, status, fields = path.read_bytes(), 200, {"ETag": '"0"', "X-Repo-Commit": "0" * 40}
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2]), len(content) - 1)
            fields["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self.reads.append(path.name)
        self._respond(content, status, fields)

    def _reply(self, content: Any, status: int = 200) -> None:
        self._respond(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def _respond(self, content: bytes, status: int, fields: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**fields, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub whose only data set is a folder: its address, and the names of the files that it has sent."""
    reads: list[str] = []
    handler = type("Handler", (_Handler,), {"folder": folder, "reads": reads})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", reads
        finally:
            server.shutdown()
            thread.join()
