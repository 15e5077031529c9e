"""Damaged and malicious inputs of every kind are read or end with a KdxError. None crashes kdx, hangs, exhausts memory or is executed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kdx.disk import parse_json, parse_toml
from kdx.errors import KdxError
from kdx.models.models_file import read_models
from kdx.study.design import read_design
from tests.hostile.fuzzed_inputs import COUNTS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limits of memory and the forks are those of Linux")
def test_damaged_inputs(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.hostile.fuzzing"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    result: dict[str, Any] = json.loads(process.stdout)
    assert result["failures"] == []
    assert result["total"] == sum(COUNTS.values()) >= 10_000
    executable = [kind for kind, outcomes in result["kinds"].items() if not outcomes["refused"] and kind not in ("image", "names", "page")]
    assert executable == []  # each kind has inputs that kdx notices to be damaged
    assert [kind for kind, outcomes in result["kinds"].items() if not outcomes["read"]] == []  # and none is refused for a reason of its own


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "{a=" * 100_000])
def test_toml_that_is_nested_too_deeply(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.toml"
    path.write_text(text)
    for read in (read_models, read_design):
        with pytest.raises(KdxError, match="nested too deeply"):
            read(path)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_toml(text)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_json_that_is_nested_too_deeply(text: str) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(text)
