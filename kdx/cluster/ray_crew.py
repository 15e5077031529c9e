"""Workers as actors of Ray. A cluster that kdx starts on this machine accepts no other user and ends with this process."""

from __future__ import annotations

import functools
import logging
import os
import pickle
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdx import threads
from kdx.cluster.options import AUTO, LOCAL, ClusterOptions
from kdx.cluster.pool import Member, WorkerEnded
from kdx.cluster.service import Build, Surroundings, Worker
from kdx.errors import KdxError, first_line, import_optional

log = logging.getLogger("kdx")

_SECONDS_BETWEEN_CHECKS = 5.0

_SECONDS_TO_START = 30.0
"""How long no worker answers until the user is told what the command waits for."""

_SECONDS_TO_CLOSE = 5.0

_SECONDS_TO_CONNECT = 10.0

_HTTP2_START = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""The first bytes of a gRPC client: the preface of HTTP/2 and an empty frame of settings. The server answers with its settings."""

_HTTP2_SETTINGS = b"\4"
"""The type of a frame of settings, which is the fourth byte of a frame."""

_REMOVALS = 10
"""How often a folder is deleted in which a process of Ray that ends may still write."""

_NO_CONNECTION = "Run the same command again to resume; start the cluster again if it has ended."


@functools.cache
def _token() -> str:
    """The password of the clusters that this process starts. Ray reads it once."""
    return secrets.token_hex(32)


@contextmanager
def connected(options: ClusterOptions) -> Iterator[Any]:
    """The module ray, connected to the cluster inside the block. A connection that exists already is used and kept.

    Raises KdxError if Ray is not installed, and if no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")  # hides Ray's lines about workers that end; kdx reports the important ones
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # when the work stops, Ray would print errors of results that nobody reads
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if options.address == LOCAL:
        # Ray's servers listen on all network interfaces. They accept only this token, which this process and its children know.
        os.environ["RAY_AUTH_TOKEN"] = _token()
        if "ray" not in sys.modules:  # Ray reads the mode when it is imported; its default for a new cluster is the same, with a message
            os.environ["RAY_AUTH_MODE"] = "token"
    ray = import_optional("ray", "cluster", "A cluster")
    if ray.is_initialized():
        yield ray
        return
    with ExitStack() as stack:
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if options.address == LOCAL:
            folder = stack.enter_context(_session_folder())
            settings |= {"num_cpus": threads.available_cores(), "include_dashboard": False, "_temp_dir": folder}
        stack.callback(ray.shutdown)
        with _same_handler():  # Ray replaces the handler of SIGTERM, which makes a run resumable
            try:
                address = _found(ray) if options.address == AUTO else options.address
                _check_answers(address)
                ray.init(address=address, **settings)
            except (ValueError, RuntimeError, OSError, OverflowError) as error:
                raise KdxError(
                    f"No Ray cluster answers at {options.address}: {first_line(error)}.",
                    "Start one with ray start --head, or give --cluster local for workers on this machine. If the cluster needs a token, "
                    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here too.",
                ) from error
        yield ray


def _found(ray: Any) -> str:
    """The address of the running cluster that Ray finds. It may have ended: Ray reads a file that outlives a killed cluster.

    Raises ConnectionError if there is none.
    """
    find = getattr(ray._private.services, "canonicalize_bootstrap_address", None)  # Ray has no public function for it
    return AUTO if find is None else str(find(AUTO))


def _check_answers(address: str) -> None:
    """Raise OSError if no gRPC server, such as that of a cluster, answers at an address HOST:PORT. Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return
    with socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_CONNECT) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):  # then the server answers only in TLS
            return
        connection.sendall(_HTTP2_START)
        answer = b""
        while len(answer) < 4 and (part := connection.recv(4 - len(answer))):
            answer += part
    if answer[3:] != _HTTP2_SETTINGS:
        raise ConnectionError("another program listens there")


@contextmanager
def _same_handler() -> Iterator[None]:
    """At the end of the block, the handler of SIGTERM is that of its beginning. Only the main thread can set it.

    A signal in the block, which Ray's handler turns into SystemExit, gets to that handler too.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _session_folder() -> Iterator[str]:
    """A folder for the files of a cluster, which is deleted at the end of the block."""
    folder = tempfile.mkdtemp(prefix="kdx-ray-", dir=_short_folder())
    try:
        yield folder
    finally:
        for _ in range(_REMOVALS):
            shutil.rmtree(folder, ignore_errors=True)
            if not Path(folder).exists():
                break
            time.sleep(0.2)


def _short_folder() -> str | None:
    """A folder for Ray's sockets, whose paths can have at most about 100 characters."""
    return "/tmp" if os.name == "posix" else None


@dataclass(frozen=True)
class WorkerSize:
    """The resources of each worker, and how many workers there are."""

    cpus: int
    gpus: float
    count: int


def size_of(ray: Any, options: ClusterOptions, uses_gpus: bool) -> WorkerSize:
    """Raises KdxError if no machine of the cluster has room for a worker."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = 1 / options.workers_per_gpu if uses_gpus and any(machine.get("GPU") for machine in machines) else 0.0
    machines = [machine for machine in machines if not gpus or machine.get("GPU")]
    places = [int(machine["GPU"]) * options.workers_per_gpu if gpus else int(machine.get("CPU", 0)) for machine in machines]
    cpus = options.cpus_per_worker or threads.chosen()
    if cpus is None:
        cpus = 1 if not gpus else max(1, min(int(machine.get("CPU", 1)) // place for machine, place in zip(machines, places, strict=True)))
    room = sum(min(place, int(machine.get("CPU", 0)) // cpus) for machine, place in zip(machines, places, strict=True))
    if not room:
        most = max((int(machine.get("CPU", 0)) for machine in machines), default=0)
        raise KdxError(
            f"No machine of the cluster has the {cpus} cores of a worker; the largest has {most}.", "Give a smaller --cpus-per-worker."
        )
    return WorkerSize(cpus, gpus, min(room, options.workers or room))


class Connection:
    """Waits for replies of actors, and detects the end of the cluster."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._node = ray.get_runtime_context().get_node_id()
        self._silent_since: float | None = time.monotonic()  # None as soon as a worker has answered, or the user knows

    def wait(self, replies: Sequence[Any]) -> list[Any]:
        """Those of the replies that have arrived, at least one. Raises KdxError if none can arrive any more."""
        checked = time.monotonic()
        while True:
            with self._lost_connection():
                ready, _ = self._ray.wait(list(replies), num_returns=1, timeout=1.0)
                if ready:  # and all others that have arrived
                    self._silent_since = None
                    ready, _ = self._ray.wait(list(replies), num_returns=len(replies), timeout=0)
                    return [reply for reply in replies if reply in ready]
                if self._silent_since is not None and time.monotonic() - self._silent_since > _SECONDS_TO_START:
                    self._silent_since = None
                    log.warning(
                        "No worker has started for %.0f s. Other programs may use the cluster's cores; kdx waits until enough are free.",
                        _SECONDS_TO_START,
                    )
                if time.monotonic() - checked > _SECONDS_BETWEEN_CHECKS:
                    checked = time.monotonic()
                    self._check()

    def result(self, reply: Any) -> Any:
        """The value of a reply. Raises WorkerEnded, or the exception that the worker raised."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(reply)
        except errors.RayTaskError as error:
            raise error.cause if isinstance(error.cause, KdxError) else error from None
        except (errors.RayActorError, errors.WorkerCrashedError, errors.OutOfMemoryError, errors.ObjectLostError) as error:
            self._check()
            raise WorkerEnded(_reason(error)) from error

    def _check(self) -> None:
        """Raise KdxError if this machine is no longer a part of the cluster: a worker that is started then never runs."""
        with self._lost_connection():
            alive = any(node["NodeID"] == self._node and node["Alive"] for node in self._ray.nodes())
        if not alive:
            raise KdxError("Ray's process on this machine (raylet) has ended.", _NO_CONNECTION)

    @contextmanager
    def _lost_connection(self) -> Iterator[None]:
        try:
            yield
        except (self._ray.exceptions.RaySystemError, ConnectionError) as error:
            raise KdxError(f"The connection to the Ray cluster was lost: {first_line(error)}.", _NO_CONNECTION) from error


class RayMember:
    """A worker that is an actor."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray = ray
        self._actor = actor

    def prepare(self) -> Any:
        return self._actor.prepare.remote()

    def step(self, tasks: Sequence[Any]) -> Any:
        return self._actor.step.remote(tasks)

    def close(self) -> Any:
        return self._actor.close.remote()

    def stop(self) -> None:
        self._ray.kill(self._actor)


class RayCrew:
    """Workers in a cluster that is `connected`. uses_gpus: whether a worker gets a GPU, or a part of one, if the cluster has any."""

    def __init__(self, ray: Any, options: ClusterOptions, build: Build, *, uses_gpus: bool) -> None:
        self._ray = ray
        self._resources = size_of(ray, options, uses_gpus)
        self._arguments = pickle.dumps(build), Surroundings.here(self._resources.cpus)
        self._connection = Connection(ray)

    @property
    def count(self) -> int:
        return self._resources.count

    def start(self) -> RayMember:
        actor = self._ray.remote(Worker).options(num_cpus=self._resources.cpus, num_gpus=self._resources.gpus, max_restarts=0)
        return RayMember(self._ray, actor.remote(*self._arguments))

    def wait(self, replies: Sequence[Any]) -> list[Any]:
        return self._connection.wait(replies)

    def result(self, reply: Any) -> Any:
        return self._connection.result(reply)

    def close(self, members: Sequence[Member]) -> None:
        replies = [member.close() for member in members]
        if replies:
            self._ray.wait(replies, num_returns=len(replies), timeout=_SECONDS_TO_CLOSE)


def _reason(error: BaseException) -> str:
    """Ray's reason in one line, without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if "exit detail" in line or "dead because" in line or "memory" in line]
    return (lines[0] if lines else first_line(error)).partition(" Some common causes")[0].rstrip(".")[:300]
