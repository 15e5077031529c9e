"""What a new process is told about its threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kdx import threads


def test_the_command_line_sets_the_environment_before_pytorch_is_loaded(tmp_path: Path) -> None:
    """The variables reach the C library, from which OpenMP reads them, and the processes that a command starts."""
    code = """
import ctypes, sys
import kdx.cli.commands
kdx.threads.quota = lambda: 1
kdx.cli.commands.app = lambda: print("torch" in sys.modules, ctypes.CDLL(None).getenv(b"OMP_NUM_THREADS") != 0)
kdx.cli.main()
"""
    clean = {name: value for name, value in os.environ.items() if name not in threads.COUNTS}
    output = subprocess.run([sys.executable, "-c", code], env=clean, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "True"]
