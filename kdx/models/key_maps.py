"""Where training programs put a network's weights in a checkpoint: entries of the file, and prefixes of the names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class KeyMap:
    """The layout of one program's checkpoints.

    program: its name. files: the names of its files. entries: the entries that contain the weights; the first one that exists is taken.
    averaged: entries of averaged weights (EMA), which come before the others. prefixes: what the names of the network's weights begin
    with. others: the prefixes of other networks and of losses in the same entry, which are left out.
    """

    program: str
    files: str
    entries: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


KEY_MAPS = (
    KeyMap("timm", "`*.pth.tar`", ("state_dict",), ("state_dict_ema",)),
    KeyMap("torchdistill", "`*.pt`", ("model",)),
    KeyMap("mdistiller, everything", "`latest`, `best`, `epoch_*`", ("model",), (), ("module.student.",), ("module.teacher.",)),
    KeyMap("mdistiller, the student", "`student_latest`, `student_best`, `student_*`", ("model",)),
    KeyMap("RepDistiller", "`*_best.pth`, `*_last.pth`, `ckpt_epoch_*.pth`", ("model",)),
    KeyMap(
        "PyTorch Lightning",
        "`*.ckpt`",
        ("state_dict",),
        (),
        ("model.", "net.", "student.", "network.", "backbone."),
        ("teacher.", "criterion.", "loss."),
    ),
    KeyMap("torchvision's reference scripts, DeiT", "`model_*.pth`, `checkpoint.pth`", ("model",), ("model_ema",), ("module.",)),
    KeyMap("Hugging Face Trainer", "`model.safetensors`, `pytorch_model.bin`"),
    KeyMap(
        "plain loops",
        "any",
        ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params"),
        ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema"),
        ("module.", "model.", "net.", "student."),
        ("teacher.",),
    ),
)
"""The layouts that kdx knows. docs/checkpoints.md shows them as a table."""


def _distinct(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in groups for name in group))


AVERAGED_ENTRIES = _distinct(layout.averaged for layout in KEY_MAPS)
ENTRIES = _distinct((*(layout.averaged for layout in KEY_MAPS), *(layout.entries for layout in KEY_MAPS)))
"""The entries that are taken without being named, first to last. As timm does, averaged weights come before the others."""
PREFIXES = _distinct(layout.prefixes for layout in KEY_MAPS)
OTHERS = _distinct(layout.others for layout in KEY_MAPS)


def table() -> str:
    """The layouts as a table in Markdown."""
    rows = ["| program | files | entry | names begin with | not the network |", "| --- | --- | --- | --- | --- |"]
    for layout in KEY_MAPS:
        cells = [_code((*layout.averaged, *layout.entries)), _code(layout.prefixes), _code(layout.others)]
        rows.append(f"| {' | '.join((layout.program, layout.files, *cells))} |")
    return "\n".join(rows)


def _code(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)
