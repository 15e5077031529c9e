"""``python -m kdx.kernels build``: compile the CUDA kernels ahead of time, for machines without a compiler."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

from kdx.errors import KdxError
from kdx.kernels import cubins
from kdx.kernels.compilers import PTX, compilers


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kdx.kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="compile every kernel into the cache", description="Compiles every kernel into the cache.")
    build.add_argument(
        "--arch",
        required=True,
        help="architectures of the GPUs, such as sm_80,sm_90; machine code also runs on later architectures of the same generation. "
        "compute_90 means PTX, which runs on every GPU from sm_90 on",
    )
    try:
        build_all([name.strip() for name in parser.parse_args(arguments).arch.split(",")])
    except KdxError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def build_all(architectures: list[str]) -> None:
    """Compile every source for every architecture and print a line per kernel with its usage; KdxError for an unknown architecture."""
    compiler = compilers()[0]
    unknown = [name for name in architectures if name.replace(PTX, "sm_") not in compiler.architectures]
    if unknown:
        raise KdxError(
            f"{compiler.name} {compiler.version} does not compile for {', '.join(map(repr, unknown))}.",
            f"Choose among {', '.join(compiler.architectures)}.",
        )
    builds = [(source, architecture) for source in cubins.names() for architecture in dict.fromkeys(architectures)]
    print(f"{compiler.name} {compiler.version}, into {cubins.folder()}")
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda names: cubins.build(names[0], names[1], compiler), builds)
        for (source, architecture), cubin in zip(builds, results, strict=True):
            for kernel, usage in sorted(cubin.usage.items()):
                spilled = f", {usage.spilled} bytes spilled" if usage.spilled else ""
                print(f"{source:12} {architecture:10} {kernel:28} {usage.registers:3} registers{spilled}")
            if not cubin.usage:
                print(f"{source:12} {architecture:10} PTX, which the driver of a GPU compiles")


if __name__ == "__main__":
    sys.exit(main())
