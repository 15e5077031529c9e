"""Where a command distributes its work, and the size of a worker."""

from __future__ import annotations

from dataclasses import dataclass

from kdx.cluster import processes
from kdx.errors import KdxError

LOCAL = "local"
"""The address that starts a cluster on this machine, which ends with the command."""

AUTO = "auto"
"""The address of the running cluster that Ray finds."""


@dataclass(frozen=True)
class ClusterOptions:
    """How a command distributes its work.

    address: ``local``, ``auto`` for the running cluster that Ray finds, or the address of one, such as ``head:6379``.
    workers_per_gpu: the workers that share a GPU. cpus_per_worker: the cores and threads of a worker; None stands for
    OMP_NUM_THREADS if it is set, otherwise for one, or for a worker with a GPU an equal part of the machine's cores. workers: the number of
    workers; None stands for as many as the cluster has room for.
    """

    address: str = LOCAL
    workers_per_gpu: int = 1
    cpus_per_worker: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers_per_gpu", "cpus_per_worker", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise KdxError(f"The cluster option {name} is {value}.", "Give a number of 1 or more.")


def cluster_options(address: str | None, workers_per_gpu: int, cpus_per_worker: int | None) -> ClusterOptions | None:
    """The options of a cluster on the command line; None without ``--cluster``. Raises KdxError for options that would have no effect."""
    if address is None:
        if workers_per_gpu != 1 or cpus_per_worker is not None:
            raise KdxError(
                "--workers-per-gpu and --cpus-per-worker describe the workers of a cluster.", "Add --cluster, or leave them out."
            )
        return None
    if processes.count() > 1:
        raise KdxError("torchrun and --cluster would both distribute the work.", "Leave one of them out.")
    return ClusterOptions(address, workers_per_gpu, cpus_per_worker)
