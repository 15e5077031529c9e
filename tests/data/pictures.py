"""Folders of small images for tests."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def picture(
    path: Path, colour: str | tuple[int, ...] = "red", size: tuple[int, int] = (12, 8), mode: str = "RGB", **options: object
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)  # type: ignore[arg-type]


def class_folders(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        for index in range(count):
            picture(root / name / f"{index}.png")
    return root
