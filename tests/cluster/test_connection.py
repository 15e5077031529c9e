"""What a connection to Ray leaves behind, without Ray."""

from __future__ import annotations

import shutil
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

from kdx.cluster import ray_crew
from kdx.cluster.options import ClusterOptions
from kdx.errors import KdxError


def test_a_signal_while_ray_starts_gets_to_the_handler_of_the_command() -> None:
    """Ray's handler calls sys.exit(15), and a run would end without a message and with another exit status."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def of_ray(number: int, _frame: FrameType | None) -> None:
        sys.exit(number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), ray_crew._same_handler():
            signal.signal(signal.SIGTERM, of_ray)
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_folder_of_a_cluster_is_deleted_while_a_process_still_writes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    remove, late = shutil.rmtree, iter(["gcs_server.out", "raylet.out"])

    def removed(folder: str, **settings: Any) -> None:
        remove(folder, **settings)
        if (name := next(late, "")) != "":
            Path(folder).mkdir(exist_ok=True)
            Path(folder, name).touch()

    monkeypatch.setattr(shutil, "rmtree", removed)
    with ray_crew._session_folder() as folder:
        Path(folder, "raylet").touch()
    assert not Path(folder).exists()


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "[::1]:{}", "127.0.0.1:99999"])
def test_an_address_at_which_nothing_listens_is_an_error_at_once(address: str) -> None:
    """Ray tries for minutes, and prints its own lines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = address.format(free.getsockname()[1])
        with pytest.raises(KdxError, match="No Ray cluster answers at"), ray_crew.connected(ClusterOptions(place)):
            pass


def answering(server: socket.socket, answer: bytes) -> threading.Thread:
    """A server that answers one client, if one connects within some seconds."""
    server.settimeout(20)

    def serve() -> None:
        client, _ = server.accept()
        with client, suppress(ConnectionResetError):  # a client that does not read the whole answer
            client.recv(100)
            client.sendall(answer)
            client.recv(100)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"\0"])
@pytest.mark.parametrize("found", [False, True])
def test_another_program_at_the_address_is_no_cluster(answer: bytes, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray tries for minutes. It also finds addresses of clusters that have ended."""
    monkeypatch.setattr(ray_crew, "_SECONDS_TO_CONNECT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = answering(server, answer)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(ray_crew, "_found", lambda ray: address)
        options = ClusterOptions("auto" if found else address)
        with pytest.raises(KdxError, match=r"another program listens there|timed out"), ray_crew.connected(options):
            pass
        thread.join()


def test_a_server_of_grpc_may_be_a_cluster() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = answering(server, bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        ray_crew._check_answers(f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()


def test_a_silent_server_of_tls_may_be_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        ray_crew._check_answers(f"127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize("address", ["local", "auto", "ray://head:10001"])
def test_other_addresses_are_left_to_ray(address: str) -> None:
    ray_crew._check_answers(address)


class SlowRay:
    """Stands for Ray: the replies arrive at the third question."""

    def __init__(self) -> None:
        self.exceptions = SimpleNamespace(RaySystemError=OSError)
        self.questions = 0

    def get_runtime_context(self) -> SlowRay:
        return self

    def get_node_id(self) -> str:
        return "this"

    def wait(self, replies: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.questions += 1
        return (replies, []) if self.questions > 2 else ([], replies)


def test_the_user_is_told_once_that_no_worker_starts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(ray_crew, "_SECONDS_TO_START", -1.0)
    assert ray_crew.Connection(SlowRay()).wait(["a"]) == ["a"]
    assert [record.getMessage().partition(" for ")[0] for record in caplog.records] == ["No worker has started"]
    caplog.clear()
    monkeypatch.setattr(ray_crew, "_SECONDS_TO_START", 60.0)
    assert ray_crew.Connection(SlowRay()).wait(["a"]) == ["a"] and not caplog.records
