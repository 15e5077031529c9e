"""Further checks of the GPU benchmark: the tests that use a GPU, and the decoder on the GPU against Pillow."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kdx.data.dataset import open_data
from kdx.data.gpu_decoder import open_gpu_decoder
from kdx.data.images import load_images
from kdx.errors import KdxError

ROOT = Path(__file__).parents[1]
TESTS = (
    *("tests/cam", "tests/explain", "tests/maps", "tests/runtimes", "tests/scores"),
    *("tests/data/test_gpu_decoder.py", "tests/distill/test_on_a_gpu.py", "tests/runs/test_batches.py"),
)
"""The tests that use a GPU where there is one."""

TEST_SECONDS = 180


def run_tests(paths: Sequence[str | Path], seconds: float = TEST_SECONDS, options: Sequence[str] = ()) -> dict[str, Any]:
    """Run tests in another process, for at most ``seconds``.

    The result contains the numbers of passed and skipped tests, the names of failed tests, the seconds, and whether the time ran out. If it
    did, the numbers are zero.
    """
    parallel = ("-n", "auto", "--dist", "loadfile") if importlib.util.find_spec("xdist") else ()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *parallel, f"--junitxml={report}", *options, *map(str, paths)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return {"passed": 0, "skipped": 0, "failed": [], "seconds": time.perf_counter() - start, "timed out": True}
        if not report.exists():
            raise KdxError(
                f"The tests do not run: {done.stdout.strip().splitlines()[-1]}.", "Install pytest and the packages of the tests."
            )
        cases = list(xml.etree.ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = sorted(f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}" for case in failed)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": names,
        "seconds": time.perf_counter() - start,
        "timed out": False,
    }


def compare_decoders(device: torch.device, images: int, seed: int) -> dict[str, Any]:
    """Differences between the decoder on the GPU and Pillow, in levels of 8 bits, over drawn JPEGs that are resized to 224 x 224.

    If the decoder does not run here, the result contains only the key ``reason``.
    """
    try:
        decoder = open_gpu_decoder(device)
    except KdxError as error:
        return {"reason": error.problem}
    with tempfile.TemporaryDirectory() as name:
        draw_jpegs(Path(name), images, seed)
        dataset = open_data(name)
        ours, theirs = (
            load_images(data, range(len(dataset)), (224, 224)).pixels.cpu() for data in (replace(dataset, decoder=decoder), dataset)
        )
    levels = (ours - theirs).abs().mul(255).round().flatten().numpy()
    return {
        "images": images,
        "mean": float(levels.mean()),
        "99.9%": float(np.quantile(levels, 0.999)),
        "largest": float(levels.max()),
    }


def draw_jpegs(folder: Path, images: int, seed: int) -> None:
    """Pictures with coarse and fine structure, at several qualities and with colours at full and half resolution."""
    generator = np.random.default_rng(seed)
    for number in range(images):
        coarse = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((512, 384), Image.Resampling.BICUBIC), dtype=np.float64)
        noisy = np.clip(picture + generator.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
        path = folder / "ab"[number % 2] / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=(75, 85, 95)[number % 3], subsampling=(0, 2)[number % 2])
