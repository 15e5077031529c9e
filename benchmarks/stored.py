"""The stored results of the suite: read them, replace one, and find what has become slower."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from benchmarks.record import RESULTS

SUITE = RESULTS / "suite.jsonl"

WORSE = 1.1
"""A ratio is worse if its quartiles and the stored quartiles are apart by this factor."""


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The newest stored record of each case."""
    if not path.exists():
        return {}
    records = (json.loads(line) for line in path.read_text().splitlines())
    return {record["case"]: record for record in records}


def store(record: Mapping[str, Any]) -> None:
    """Replace the case's stored record by this one."""
    records = read(SUITE) | {record["case"]: record}
    names = [case.name for case in CASES]
    SUITE.parent.mkdir(exist_ok=True)
    part = SUITE.with_suffix(".part")
    part.write_text("".join(json.dumps(records[name]) + "\n" for name in names if name in records))
    part.replace(SUITE)


def worse(record: Mapping[str, Any], stored: Mapping[str, Any]) -> Iterator[str]:
    """A line for each change to the worse.

    These are: a variant of kdx that no longer runs; a variant of kdx whose ratio rose by `WORSE`, quartiles apart; and another
    variant whose ratio to a variant of kdx fell by `WORSE`.
    """
    baseline, kdx_variants = record["over"], tuple(record["ours"])
    for variant in stored["samples"]:
        if variant.startswith(kdx_variants) and variant not in record["samples"]:
            yield f"{record['case']}: {variant} does not run: {record['missing'].get(variant, 'it was removed')}"
    for variant, (stored_low, stored_median, stored_high) in stored["ratios"].items():
        if variant not in record["ratios"]:
            continue
        low, median, high = record["ratios"][variant]
        slower = variant.startswith(kdx_variants) and low > stored_high * WORSE
        if slower or (not variant.startswith(kdx_variants) and baseline.startswith(kdx_variants) and high * WORSE < stored_low):
            yield f"{record['case']}: {variant} over {baseline} was {stored_median:.3g} and is {median:.3g}"
