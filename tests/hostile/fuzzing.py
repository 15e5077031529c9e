"""Damages inputs of every kind, and reads them with kdx in forked processes with limited memory and time.

``python -m tests.hostile.fuzzing --count N`` or ``--minutes M`` prints one JSON object: the number of inputs per kind, and the failures.
An input may be read without an error or end with a KdxError. Everything else is a failure: another exception, a crash, more than
`SECONDS`, more than `MEMORY`, or a canary file, which only code in an input can write.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdx.errors import KdxError
from tests.hostile import fuzzed_inputs

SECONDS = 10
MEMORY = 2_000_000_000
CHUNK = 100


class _Late(BaseException):
    """An input that takes too long."""


def attempts(kind: str, first: int, last: int, seed: int, folder: Path, connection: int) -> None:
    """Read the inputs with these numbers in this process. A line per input goes to the connection, before it is read and after."""
    target = fuzzed_inputs.TARGETS[kind]
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _late)
    os.chdir(folder)
    os.environ["KDX_CACHE"] = str(folder / "cache")
    for number in range(first, last):
        os.write(connection, f"{number}\n".encode())
        random_ = random.Random(f"{seed}/{kind}/{number}")
        outcome = "read"
        try:
            call = target(folder / "input", random_)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: the machine may be busy
            call()
        except KdxError as error:
            outcome = "refused"
            if any((ord(character) < 32 and character not in "\n\t") or character in "\x1b\x9b\u202e" for character in str(error)):
                outcome = f"failure: control characters in {error}"
        except OSError as error:  # of a file that the input names, as when the name is too long; the command line reports it
            outcome = "refused" if error.filename is not None else f"failure: OSError: {error} at " + _place()
        except _Late:
            outcome = f"failure: longer than {SECONDS} s: " + _place()
        except BaseException as error:
            outcome = f"failure: {type(error).__name__}: {str(error)[:300]} at " + _place()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if (folder / "canary").exists():
            outcome = "failure: code of the input was executed"
            (folder / "canary").rmdir()
        os.write(connection, f"={number} {outcome[:900]!r}\n".encode())


def _late(*_: object) -> None:
    raise _Late


def _place() -> str:
    """The innermost lines of kdx in the traceback of the exception that is handled."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    ours = [frame for frame in frames if "/kdx/" in frame.filename or "/export/" in frame.filename][-2:] + frames[-1:]
    return " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def run_chunk(kind: str, first: int, last: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """The number of inputs per outcome, and the failures. An input that ends the process is a failure, and a new process continues."""
    counts, failures = {"read": 0, "refused": 0, "failed": 0}, []
    while first < last:
        with tempfile.TemporaryDirectory() as folder:
            reader, writer = os.pipe()
            child = os.fork()
            if not child:
                os.close(reader)
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, 1)
                os.dup2(null, 2)
                try:
                    attempts(kind, first, last, seed, Path(folder), writer)
                finally:
                    os._exit(0)
            os.close(writer)
            with os.fdopen(reader) as lines:
                begun, ended = first, first
                end = threading_timer(child, 20 * SECONDS + 2 * (last - first))
                for line in lines:
                    if line.startswith("="):
                        number, _, outcome = line[1:].strip().partition(" ")
                        ended = int(number) + 1
                        name = outcome.strip("'\"")
                        counts[name if name in counts else "failed"] += 1
                        if name not in counts:
                            failures.append(f"{kind} {number}: {outcome}")
                    else:
                        begun = int(line)
                end.cancel()
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            if code or ended < last:
                counts["failed"] += 1
                failures.append(f"{kind} {begun}: the process ended with {code}")
                first = begun + 1
            else:
                first = last
    return counts, failures


def threading_timer(child: int, seconds: float) -> Any:
    """A timer that kills a process which does not return from native code."""
    import threading

    timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    timer.daemon = True
    timer.start()
    return timer


def run(counts: dict[str, int], seed: int, seconds: float = float("inf")) -> dict[str, Any]:
    """Read ``counts`` inputs of each kind, and repeat this with further seeds until the time is over. Returns counts and failures."""
    start, totals, failures = time.monotonic(), {kind: {"read": 0, "refused": 0, "failed": 0} for kind in counts}, list[str]()
    while True:
        for kind, count in counts.items():
            for first in range(0, count, CHUNK):
                outcomes, failed = run_chunk(kind, first, min(first + CHUNK, count), seed)
                failures += failed
                for failure in failed:
                    print(failure, file=sys.stderr, flush=True)
                for name, number in outcomes.items():
                    totals[kind][name] += number
                if time.monotonic() - start > seconds:
                    return _result(totals, failures, start)
        if seconds == float("inf"):
            return _result(totals, failures, start)
        seed += 1


def _result(totals: dict[str, dict[str, int]], failures: list[str], start: float) -> dict[str, Any]:
    total = sum(sum(outcomes.values()) for outcomes in totals.values())
    return {"total": total, "seconds": round(time.monotonic() - start), "kinds": totals, "failures": failures}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="share of the usual number of inputs per kind")
    parser.add_argument("--minutes", type=float, default=None, help="continue with further seeds for this many minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=sorted(fuzzed_inputs.TARGETS))
    options = parser.parse_args(arguments)
    faulthandler.disable()
    with contextlib.redirect_stdout(sys.stderr):  # the progress of the run that is damaged
        fuzzed_inputs.prepare()
    kinds = options.kind or list(fuzzed_inputs.COUNTS)
    counts = {kind: max(1, round(fuzzed_inputs.COUNTS[kind] * options.share)) for kind in kinds}
    result = run(counts, options.seed, float("inf") if options.minutes is None else 60 * options.minutes)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
