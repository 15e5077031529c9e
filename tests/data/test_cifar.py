"""CIFAR in both published versions: files that are written byte by byte as the published ones, and pickles that would run code."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kdx.data.dataset import open_data
from kdx.data.sources.pickled_arrays import read_pickled_dictionary
from kdx.errors import KdxError

_FINE = [f"fine_{number:02d}" for number in range(100)]


def _string(text: str | bytes) -> bytes:
    """A text of Python 2, which is a string of bytes."""
    content = text.encode() if isinstance(text, str) else text
    return b"U" + bytes([len(content)]) + content if len(content) < 256 else b"T" + struct.pack("<i", len(content)) + content


def _list(items: list[bytes]) -> bytes:
    return b"](" + b"".join(items) + b"e"


def _array(levels: NDArray[np.uint8], module: str = "numpy.core.multiarray") -> bytes:
    """An array as NumPy 1 wrote it under Python 2."""
    shape = b"(" + b"".join(b"J" + struct.pack("<i", length) for length in levels.shape) + b"t"
    empty = f"c{module}\n_reconstruct\n".encode() + b"cnumpy\nndarray\n" + b"K\x00\x85" + _string("b") + b"\x87R"
    kind = (
        b"cnumpy\ndtype\n" + _string("u1") + b"K\x00K\x01\x87R" + b"(K\x03" + _string("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    return empty + b"(K\x01" + shape + kind + b"I00\n" + _string(levels.tobytes()) + b"tb"


def _published(entries: dict[str, bytes]) -> bytes:
    """A pickled dictionary in protocol 2, as Python 2 wrote it."""
    return b"\x80\x02}(" + b"".join(_string(key) + value for key, value in entries.items()) + b"u."


def _integers(values: list[int]) -> bytes:
    return _list([b"K" + bytes([value]) for value in values])


def _names(values: list[str]) -> bytes:
    return _list([_string(value) for value in values])


def _drawn(count: int, classes: int, seed: int) -> tuple[NDArray[np.uint8], list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), rng.integers(0, classes, count).tolist()


def write_cifar10(folder: Path, version: str, repeats: int = 1) -> tuple[NDArray[np.uint8], list[int]]:
    """Two training batches and the test batch, of 3, 2 and 2 images times ``repeats``."""
    folder.mkdir(parents=True)
    pixels, labels = _drawn(7 * repeats, 10, 0)
    a, b = 3 * repeats, 5 * repeats
    for name, part in (("data_batch_1", slice(0, a)), ("data_batch_2", slice(a, b)), ("test_batch", slice(b, None))):
        if version == "python":
            entries = {
                "batch_label": _string("a batch"),
                "labels": _integers(labels[part]),
                "data": _array(pixels[part]),
                "filenames": _names([f"{name}_{row}.png" for row in range(len(labels[part]))]),
            }
            (folder / name).write_bytes(_published(entries))
        else:
            records = np.concatenate([np.array(labels[part], np.uint8)[:, None], pixels[part]], axis=1)
            records.tofile(folder / f"{name}.bin")
    if version == "python":
        (folder / "batches.meta").write_bytes(_published({"num_cases_per_batch": b"K\x03"}))
    return pixels, labels


def write_cifar100(folder: Path, version: str) -> tuple[NDArray[np.uint8], list[int]]:
    folder.mkdir(parents=True)
    pixels, labels = _drawn(6, 100, 1)
    coarse = [label // 5 for label in labels]
    for name, part in (("train", slice(0, 4)), ("test", slice(4, 6))):
        if version == "python":
            entries = {
                "filenames": _names(["x"] * len(labels[part])),
                "batch_label": _string("a batch"),
                "fine_labels": _integers(labels[part]),
                "coarse_labels": _integers(coarse[part]),
                "data": _array(pixels[part]),
            }
            (folder / name).write_bytes(_published(entries))
        else:
            columns = [np.array(values[part], np.uint8)[:, None] for values in (coarse, labels)]
            np.concatenate([*columns, pixels[part]], axis=1).tofile(folder / f"{name}.bin")
    if version == "python":
        (folder / "meta").write_bytes(_published({"fine_label_names": _names(_FINE), "coarse_label_names": _names(["c"] * 20)}))
    else:
        (folder / "fine_label_names.txt").write_text("\n".join(_FINE) + "\n\n")
    return pixels, labels


@pytest.mark.parametrize("version", ["binary", "python"])
@pytest.mark.parametrize(
    ("source", "write", "archives"),
    [
        ("cifar10", write_cifar10, {"binary": "cifar-10-batches-bin", "python": "cifar-10-batches-py"}),
        ("cifar100", write_cifar100, {"binary": "cifar-100-binary", "python": "cifar-100-python"}),
    ],
)
def test_both_versions_are_the_same_images(
    tmp_path: Path, version: str, source: str, write: Callable[[Path, str], tuple[NDArray[np.uint8], list[int]]], archives: dict[str, str]
) -> None:
    folder = tmp_path / archives[version]
    pixels, labels = write(folder, version)
    for place in (folder, tmp_path):
        dataset = open_data(f"{source}:{place}")
        assert dataset.labels.tolist() == labels
        test = len(labels) - 2
        assert dataset.splits["test"].tolist() == [test, test + 1] and dataset.splits["train"].tolist() == list(range(test))
        for index in range(len(labels)):
            np.testing.assert_array_equal(np.asarray(dataset.read(index)), pixels[index].reshape(3, 32, 32).transpose(1, 2, 0))
        suffix = ".bin" if version == "binary" else ""
        assert dataset.ids[-1] == f"{'test_batch' if source == 'cifar10' else 'test'}{suffix}/00001"
        assert dataset.classes[9] == ("fine_09" if source == "cifar100" else "truck")
        assert len(set(dataset.ids)) == len(dataset) and dataset.fingerprint == open_data(f"{source}:{folder}").fingerprint


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_this_numpy_are_read(tmp_path: Path, protocol: int) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (3, 4), dtype=np.uint8)
    content = {b"data": levels, "turned": np.asfortranarray(levels), "labels": [1, 2], "names": [b"a", "b"]}
    (tmp_path / "x").write_bytes(pickle.dumps(content, protocol))
    if protocol == 5:  # arrays are written in another way, which the published files do not use
        with pytest.raises(KdxError, match="_frombuffer"):
            read_pickled_dictionary(tmp_path / "x")
        return
    read = read_pickled_dictionary(tmp_path / "x")
    np.testing.assert_array_equal(read["data"], levels)
    np.testing.assert_array_equal(read["turned"], levels)
    assert read["labels"] == [1, 2] and read["names"] == ["a", "b"]


class _Calls:
    """An object whose pickle calls a function with arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("kind", ["os.system", "eval", "subprocess", "getattr", "numpy.load", "inside an array"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, kind: str, protocol: int) -> None:
    proof = tmp_path / "proof"
    command = f"touch {proof}"
    attack = {
        "os.system": _Calls(os.system, command),
        "eval": _Calls(eval, f"__import__('os').system({command!r})"),
        "subprocess": _Calls(subprocess.getoutput, command),
        "getattr": _Calls(getattr, _Calls(__import__, "os"), "system"),
        "numpy.load": _Calls(np.load, str(tmp_path / "other.npy"), None, True),
        "inside an array": np.array([_Calls(os.system, command)], dtype=object),
    }[kind]
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"labels": [1], b"data": attack}, protocol))
    with pytest.raises(KdxError, match="is refused: it") as caught:
        open_data(f"cifar10:{tmp_path}")
    assert not proof.exists() and "Unpack" in caught.value.hint
    if kind not in ("getattr", "numpy.load", "inside an array"):  # the attack is real: Python's own reader runs it
        pickle.loads(pickle.dumps(attack, protocol))
        assert proof.exists()


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        (b"\x80\x02cnumpy\nndarray\nK\x01\x85R.", "calls numpy.ndarray"),
        (b"\x80\x02cnumpy\ndtype\n}U\x01aK\x01sb.", "changes a function"),
        (b"\x80\x02cnumpy\ndtype\nU\x01O\x85R.", "the type O, not uint8"),
        (b"\x80\x02cnumpy\ndtype\n)\x81.", "cannot be read"),  # NEWOBJ, which would skip the check of the type
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "encodes something other"),
        (b"\x80\x02cnumpy.core.multiarray\nscalar\n.", "numpy.core.multiarray.scalar"),
        (b"\x80\x02cbuiltins\nexec\n.", "builtins.exec"),
        (b"\x80\x02U\x01aQ.", "cannot be read"),  # a persistent identifier
        (b"\x80\x02\x82\x01.", "cannot be read"),  # an extension code
        (b"\x80\x02K\x01.", "does not contain a dictionary"),
        (b"\x80\x02}K\x01K\x02s.", "does not contain a dictionary"),
        (b"", "cannot be read"),
        (b"\x80\x02}(U\x04da", "cannot be read"),
    ],
)
def test_other_programs_are_refused(tmp_path: Path, program: bytes, problem: str) -> None:
    (tmp_path / "x").write_bytes(program)
    with pytest.raises(KdxError, match=problem):
        read_pickled_dictionary(tmp_path / "x")


def test_a_list_that_contains_itself_is_no_batch(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02}(U\x06labels]q\x00h\x00aU\x04data]h\x00au.")
    with pytest.raises(KdxError, match="not a batch"):
        open_data(f"cifar10:{tmp_path}")


def test_an_array_whose_size_is_not_that_of_its_data_is_refused(tmp_path: Path) -> None:
    levels = np.zeros((2, 300), np.uint8)
    content = _published({"data": _array(levels)})
    (tmp_path / "x").write_bytes(content)
    assert read_pickled_dictionary(tmp_path / "x")["data"].shape == (2, 300)
    written = struct.pack("<i", 2) + b"J" + struct.pack("<i", 300)
    assert content.count(written) == 1
    for rows, columns in ((3, 300), (-2, -300)):
        (tmp_path / "x").write_bytes(content.replace(written, struct.pack("<i", rows) + b"J" + struct.pack("<i", columns)))
        with pytest.raises(KdxError, match="size of an array"):
            read_pickled_dictionary(tmp_path / "x")


@pytest.mark.parametrize(
    "entries",
    [
        {"labels": _integers([1])},
        {"data": _array(np.zeros((1, 3072), np.uint8))},
        {"labels": _integers([1, 2]), "data": _array(np.zeros((1, 3072), np.uint8))},
        {"labels": _integers([1]), "data": _array(np.zeros((1, 3000), np.uint8))},
        {"labels": _integers([10]), "data": _array(np.zeros((1, 3072), np.uint8))},
        {"labels": _names(["cat"]), "data": _array(np.zeros((1, 3072), np.uint8))},
        {"fine_labels": _integers([1]), "data": _array(np.zeros((1, 3072), np.uint8))},
    ],
)
def test_pickles_that_are_no_batches_are_refused(tmp_path: Path, entries: dict[str, bytes]) -> None:
    (tmp_path / "data_batch_1").write_bytes(_published(entries))
    with pytest.raises(KdxError, match=r"not a batch of CIFAR-10|label 10, which"):
        open_data(f"cifar10:{tmp_path}")


def test_cifar100_needs_its_class_names(tmp_path: Path) -> None:
    write_cifar100(tmp_path / "c", "python")
    (tmp_path / "c" / "meta").unlink()
    with pytest.raises(KdxError, match="does not have the names"):
        open_data(f"cifar100:{tmp_path / 'c'}")
    (tmp_path / "c" / "fine_label_names.txt").write_text("one\ntwo\n")
    with pytest.raises(KdxError, match="does not name the 100"):
        open_data(f"cifar100:{tmp_path / 'c'}")
    with pytest.raises(KdxError, match=r"no files of CIFAR-100 in .*none"):
        open_data(f"cifar100:{tmp_path / 'none'}")
