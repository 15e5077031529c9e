"""KdxError: its two sentences, its deprecated name, and the helpers that write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdx.errors import KdxError, first_line, import_optional, missing_package, near_names, printable


def test_an_error_has_a_problem_and_a_hint() -> None:
    error = KdxError("The batch is empty.", "Give at least one image.")
    assert (error.problem, error.hint) == ("The batch is empty.", "Give at least one image.")
    assert error.args == ("The batch is empty.", "Give at least one image.")
    assert str(error) == "The batch is empty.\nGive at least one image."


def test_the_old_name_of_the_hint_works_and_warns() -> None:
    error = KdxError("The batch is empty.", "Give at least one image.")
    with pytest.warns(DeprecationWarning, match=r"KdxError\.mend is now KdxError\.hint") as warnings:
        assert error.mend == error.hint
    assert warnings[0].filename == __file__, "the warning points at the caller"


def test_a_missing_package_names_its_extra() -> None:
    error = missing_package("onnxruntime", "cpu", "The runtime onnx")
    assert error.problem == "The runtime onnx needs the package onnxruntime, which is not installed."
    assert error.hint == "Install it with: pip install 'kdx[cpu]'"


@pytest.mark.parametrize(
    ("message", "line"),
    [("one line", "one line"), ("\n first.\nsecond", "first"), ("", "ValueError"), (" \n ", "ValueError"), ("ends...", "ends")],
)
def test_the_first_line_of_another_librarys_message(message: str, line: str) -> None:
    assert first_line(ValueError(message)) == line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("Grüße, 猫 👩‍🔬\n\tnext", "Grüße, 猫 👩‍🔬\n\tnext"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[H\x1b]0;title\x07a\x1b]8;;http://x\x1b\\b\x1b(0c", "abc"),
        ("one\rtwo\x00\x07\x9b31m", r"one\rtwo\x00\x07\x9b31m"),
        ("photo\u202egpj.exe", r"photo\u202egpj.exe"),
        ("bad\udcffname\u2028x", r"bad\udcffname\u2028x"),
        ("\x1b\n", "\\x1b\n"),
    ],
)
def test_quoted_text_gives_a_terminal_no_commands(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown
    error = KdxError(f"{text} is wrong.", f"Fix {text}.")
    assert (error.problem, error.hint, error.args) == (f"{shown} is wrong.", f"Fix {shown}.", (error.problem, error.hint))
    assert first_line(ValueError(f"{text}.")) == shown.split("\n", maxsplit=1)[0]


def test_a_package_that_is_missing_or_whose_import_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that itself needs a missing one is installed, so the hint must not say to install it."""
    (tmp_path / "broken_operators.py").write_text("raise RuntimeError('operator vision::nms does not exist')")
    (tmp_path / "needs_another.py").write_text("import no_such_package_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_optional("json", "models", "This").dumps([1]) == "[1]"
    for package, problem, hint in (
        ("no_such_package", "not installed", "pip install 'kdx"),
        ("no_such_package.part", "no_such_package, which is not installed", "pip install 'kdx"),
        ("broken_operators", "import fails: operator vision::nms does not exist.", "belong to this PyTorch"),
        ("needs_another", "import fails: No module named 'no_such_package_at_all'", "belong to this PyTorch"),
    ):
        with pytest.raises(KdxError) as caught:
            import_optional(package, "models", "This")
        assert problem in caught.value.problem and hint in caught.value.hint


def test_names_like_a_misspelt_one_or_the_first() -> None:
    assert near_names("laier3", ["layer3", "conv1"], ["conv1"]) == "layer3"
    assert near_names("cow", ["heron", "astronaut"], iter("abcdefgh")) == "a, b, c, d, e, f"
