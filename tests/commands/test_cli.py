"""Every command: its help, what its options set, its errors, and how Ctrl-C stops it."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main

import kdx.distill
import kdx.explain
from kdx.choices import Resizing
from kdx.cli.commands import app
from kdx.cli.panels import PANELS
from kdx.commands import doctor
from kdx.distill import TrainingSettings
from kdx.errors import KdxError, Stopped, resumable
from kdx.export import onnx_file
from kdx.export.description import describe
from kdx.export.parity import Difference, ParityReport
from kdx.report import page, terminal
from kdx.runs.run import RunOptions
from tests.command_line import Run

KDX = Path(sys.executable).parent / "kdx"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TINY = "kdx:resnet,width=2,depth=1,stages=1"
PARITY = ParityReport({"logits": Difference(1e-7, 1e-8, 1e-7, 2.0, 1.0)}, 1e-4, (3,))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "models.toml"
    roles = "".join(f'{role} = "{TINY}"\n' for role in ("teacher", "base", "student"))
    path.write_text(roles + f'classes = {list("0123456789")}\nlayers = ["layer1"]\n')
    return path


# ---- help ----


def test_the_version_is_that_of_the_package(run: Run) -> None:
    assert run("--version") == (0, f"kdx {kdx.__version__}\n", "")


def test_the_help_lists_every_command(run: Run) -> None:
    assert " ".join(COMMANDS) == "demo distill export explain plan study similarity evaluate report layers doctor"
    for status, out, err in (run("--help"), run("-h")):
        assert status == 0 and err == ""
        assert all(name in out for name in COMMANDS)
    assert "COMMAND [ARGS]" in "".join(run()[1:])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option_and_argument(name: str, run: Run) -> None:
    status, out, err = run(name, "--help")
    assert status == 0 and err == ""
    options = [option for parameter in COMMANDS[name].params for option in parameter.opts if option.startswith("-")]
    assert all(option in out for option in options)
    assert inspect.getdoc(COMMANDS[name].callback).split(":")[0] in out  # type: ignore[union-attr]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_help_text_is_read_as_markup(name: str) -> None:
    """A text in square brackets would be missing on the help page."""
    for parameter in COMMANDS[name].params:
        assert "[" not in (getattr(parameter, "help", None) or ""), parameter.name


@pytest.mark.parametrize("name", PANELS)
def test_help_shows_the_options_in_panels(name: str, run: Run) -> None:
    out = run(name, "--help")[1]
    starts = [out.index(f"─ {panel} ─") for panel in PANELS[name]]
    assert starts == sorted(starts) and out.index("─ Options ─") < starts[0]
    options = {parameter.name: parameter.opts for parameter in COMMANDS[name].params}
    for (panel, names), start in zip(PANELS[name].items(), starts, strict=True):
        end = min((other for other in starts if other > start), default=len(out))
        for option in names:
            assert any(f"{spelling} " in out[start:end] for spelling in options[option]), (panel, option)


# ---- what a command hands on ----


def test_every_option_of_explain_reaches_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def explain(*positional: Any, **keywords: Any) -> Path:
        seen.append((positional, keywords))
        return Path("R/report.html")

    monkeypatch.setattr("kdx.commands.explain.run", explain)
    monkeypatch.setattr(terminal, "scores_table", lambda _: "the table")
    chosen = RunOptions(
        batch=31, chunk=7, runtime="eager", device="cpu", objective="uniqueness", weighting="elementwise", reference_images=12, split="all",
        precision="bfloat16", permutations=5, confidence=0.9, max_unreadable=0.5, seed=3, features="salient", keep=0.25, noise=0.1,
        workers=0, geometry="batch", stored_precision="float16", keep_features=True, project=8, max_disk=1.5, max_minutes=7.0,
        decoder="torchvision-cuda", gallery=5, gallery_order="wrong", gallery_images=("a.png", "b/c.png"),
        salient_class="true", salient_score="probability", salient_image="published", ratios="mean", pooled=True,
            random_baseline=True, base="none",
        target="t.npy", resize="squash", interpolation="bilinear", groups="weather", groups_file=Path("g.csv"), max_classes=7,
    )  # fmt: skip
    default = RunOptions()
    assert not {field for field in vars(default) if getattr(chosen, field) == getattr(default, field)}
    names = {"reference_images": "reference", "stored_precision": "store", "gallery_order": "order", "gallery_images": "images"}
    flags = {key: f"--{names.get(key, key).replace('_', '-')}" for key in vars(chosen)}
    values = {key: [] if getattr(chosen, key) is True else [getattr(chosen, key)] for key in flags}  # a switch has no value
    values["gallery_images"] = ["a.png, b/c.png"]
    options = [text for key, flag in flags.items() for text in (flag, *values[key])]
    status, out, _ = run("explain", "D", "--models", "m.toml", "--out", "R", "-l", "a", "--layer", "b=c", *options)
    assert status == 0 and "the table" in out and "The page: R/report.html" in out
    assert run("explain", "D", "--models", "m.toml", "--out", "R")[0] == 0
    (first, keywords), (plain, _) = seen
    assert first == ("D", Path("m.toml"), Path("R"), ["a", "b=c"], chosen)
    assert keywords["command"][:3] == ["kdx", "explain", "D"]
    assert plain == ("D", Path("m.toml"), Path("R"), (), default)


def test_every_option_of_distill_reaches_the_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def distill(data: str, **keywords: Any) -> Path:
        seen.append(keywords)
        return Path("[o]/models.toml")

    monkeypatch.setattr(kdx.distill, "distill", distill)
    command = (
        "distill digits --teacher t --student s --out o --method at --layer a=b --epochs 2 --batch 9 --lr 0.5 --temperature 2 "
        "--alpha 0.25 --beta 10 --image-size 8 --augment --flip --student-images 40 --seed 6 --split-seed 4 --device cpu "
        "--teacher-epochs 3 --optimizer adamw --weight-decay 0.2 --momentum 0.8 --no-nesterov --schedule step --warm-up 0.3 --milestone 1 "
        "--milestone 2 --gamma 0.4 --label-smoothing 0.1 --clip 5 --accumulate 3 --ema 0.99 --select loss --patience 7 --random-crop 0.4 "
        "--colour-jitter 0.2 --rand-augment 9 --mixup 0.3 --cutmix 0.7 --precision bfloat16 --channels-last --compile --save-minutes 2 "
        "--max-unreadable 0.5 --resize squash --interpolation bilinear --base none --teacher-cache c --log csv --log wandb --probe 64"
    )
    status, out, _ = run(*command.split())
    assert status == 0 and "kdx explain digits --models '[o]/models.toml' --out RUN" in out
    expected = TrainingSettings(
        method="at", epochs=2, batch=9, learning_rate=0.5, temperature=2.0, alpha=0.25, beta=10.0, seed=6, split_seed=4,
        augment=True, flip=True, student_images=40, image_size=(8, 8), teacher_epochs=3, optimizer="adamw", weight_decay=0.2,
        momentum=0.8, nesterov=False, schedule="step", warm_up=0.3, milestones=(1, 2), gamma=0.4, label_smoothing=0.1, clip=5.0,
        accumulate=3, ema=0.99, select="loss", patience=7, random_crop=0.4, colour_jitter=0.2, rand_augment=9, mixup=0.3, cutmix=0.7,
        precision="bfloat16", channels_last=True, compile=True, save_minutes=2.0, max_unreadable=0.5,
        resizing=Resizing("squash", "bilinear"),
    )  # fmt: skip
    assert seen[0]["settings"] == expected
    assert all(value != getattr(TrainingSettings(), name) for name, value in vars(expected).items())  # so every setting has an option
    assert {key: seen[0][key] for key in ("teacher", "student", "base", "out", "layers", "teacher_cache", "log", "probe", "device")} == {
        "teacher": "t", "student": "s", "base": "none", "out": Path("o"), "layers": ["a=b"], "teacher_cache": Path("c"),
        "log": ["csv", "wandb"], "probe": 64, "device": "cpu",
    }  # fmt: skip
    assert run("distill", "digits", "--teacher", "t", "--student", "s", "--out", "o")[0] == 0
    assert seen[1]["settings"] == TrainingSettings()
    preset = "distill digits --teacher t --student s --out o --preset asirra --batch 64 --lr 0.1"  # given options win, also as defaults
    assert run(*preset.split())[0] == 0
    assert seen[2]["settings"] == TrainingSettings(image_size=(224, 224), epochs=25, batch=64, learning_rate=0.1)


@pytest.mark.slow
def test_export_writes_a_checked_file_and_describes_it(run: Run, tmp_path: Path) -> None:
    status, out, err = run("export", f"{TINY},classes=5", "--layer", "layer1", "-l", "conv1", "--out", tmp_path / "files")
    assert (status, err) == (0, "")
    (path,) = (tmp_path / "files").glob("*.onnx")
    assert path.name == "resnet.features.onnx" and str(path) in out
    assert "layer1 [batch, 2, 32, 32]" in out and "largest error" in out
    actual = describe(path)
    assert (actual.layers, actual.kind, actual.networks["network"].preprocessing.size) == (("layer1", "conv1"), "features", (32, 32))
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.parity.json"]


@pytest.mark.parametrize("out", ["there/net.onnx", "there"])
def test_export_of_a_role_of_a_models_file(out: str, run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def write(graph: Any, path: Path, **keywords: Any) -> ParityReport:
        seen.append((path, graph.layers, keywords))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(300_000))
        return PARITY

    monkeypatch.setattr(onnx_file, "write", write)
    shapes = {"inputs": {"images": ("batch", 3, "height", "width")}, "outputs": {"logits": ("batch", 10)}}
    monkeypatch.setattr("kdx.commands.export.describe", lambda _: SimpleNamespace(**shapes))
    status, message, _ = run("export", f"{models}:student", "-l", "layer1", "--out", out)
    assert status == 0 and "0.3 MB" in message and PARITY.summary() in message and "images [batch, 3, height, width]" in message
    path, layers, keywords = seen[0]
    assert path == (Path(out) if out.endswith(".onnx") else Path(out) / "resnet.features.onnx")
    assert layers == ("layer1",) and keywords["classes"] == tuple("0123456789") and keywords["image_size"] == (32, 32)


def test_doctor_lists_every_probe_with_a_hint_for_the_broken(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise RuntimeError("[red]no such thing[/red]")

    monkeypatch.setattr(
        doctor, "_PROBES", doctor._PROBES | {"CUDA compiler: nvcc": (broken, "hint [it]"), "Thing": (lambda: "one [two]", "unseen")}
    )
    status, out, err = run("doctor")
    assert (status, err) == (0, "")
    rows = {name: next(line for line in out.splitlines() if name in line) for name in doctor._PROBES}
    assert (
        rows["Python"].startswith("yes")
        and "[red]no such thing[/red]" in rows["CUDA compiler: nvcc"]
        and "hint [it]" in rows["CUDA compiler: nvcc"]
    )
    assert rows["CUDA compiler: nvcc"].startswith("no") and "one [two]" in rows["Thing"] and "unseen" not in rows["Thing"]


# ---- mistakes ----


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("explain digits --models none.toml --out R", "none.toml"),
        ("explain no/such/folder --models models.toml --out R", "no/such/folder"),
        ("explain digits --models models.toml --out R --layer layer7", "layer7"),
        ("explain digits --models models.toml --out R --layer a=b=c", "b=c"),
        ("explain digits --models models.toml --out R --split half", "half"),
        ("explain digits --models models.toml --out R --device tpu", "tpu"),
        ("explain digits --models models.toml --out models.toml --permutations 0", "models.toml"),
        ("explain digits --models models.toml --out R --features salient --keep 0", "share 0.0 of pixels"),
        ("explain digits --models models.toml --out R --features salient --keep 1.5", "share 1.5 of pixels"),
        ("explain digits --models models.toml --out R --features salient --noise -1", "noise -1.0"),
        ("explain digits --models models.toml --out R --keep 0.3", "apply only to salient features"),
        ("distill no/such/folder --teacher TINY --student TINY --out R", "no/such/folder"),
        ("distill digits --teacher kdx:resnot --student TINY --out R", "resnot"),
        ("distill digits --teacher TINY --student nothing --out R", "nothing"),
        ("distill digits --teacher TINY --student TINY --out R --method guess", "guess"),
        ("distill digits --teacher TINY --student TINY --out R --device tpu", "tpu"),
        ("distill digits --teacher TINY@none.pt --student TINY --out R", "none.pt"),
        ("export TINY", "No layer was named"),
        ("export TINY --layer layer9", "layer9"),
        ("export kdx:resnot --layer layer1", "resnot"),
        ("export models.toml:pupil --layer layer1", "pupil"),
        ("export none.toml:student --layer layer1", "none.toml"),
        ("export kdx.models.resnet:resnet,width=2 --layer layer1", "does not specify an image size"),
        ("export --layer layer1", "contains one network"),
        ("export TINY --student TINY --layer layer1", "contains one network"),
        ("export TINY --teacher TINY --layer layer1", "contains one network"),
        ("export TINY --explainer --student TINY --base TINY --layer layer1", "contains a student, and optionally"),
        ("export TINY --explainer --layer layer1", "contains a student, and optionally"),
        ("export --explainer --base TINY --teacher TINY --layer layer1", "contains a student, and optionally"),
        ("export --explainer --layer layer1", "contains a student, and optionally"),
        ("export --explainer --student models.toml:student --base models.toml:base", "No layer was named"),
        ("export --explainer --student models.toml:student --base models.toml:base --layer layer1 --at layer1", "has no cotangent"),
        ("export TINY --layer layer1 --at layer1", "has no cotangent"),
        ("export TINY --layer layer1 --kind gradients --at layer1", "are both at layer 'layer1'"),
        ("export TINY --layer layer1 --kind gradients --at layer8", "layer8"),
        ("export TINY --layer layer1 --kind gradients --at conv1", "does not depend on layer 'layer1'"),
        ("export TINY --layer layer1 --batch many", "'many' is not a range of batches"),
        ("export TINY --layer layer1 --batch 1:2", "'1:2' is not a range of batches"),
        ("export TINY --layer layer1 --to tensorrt --for sm_86 --batch 9:3:1", "from 9 to 1, best 3"),
        ("export TINY --layer layer1 --to tensorrt --for sm_86 --batch 0", "from 0 to 0"),
        ("export TINY --layer layer1 --to tensorrt --for sm_99", "does not build for 'sm_99'"),
        ("export none.onnx --to tensorrt --for sm_86", "There is no file none.onnx"),
        ("export none.onnx", "is already an ONNX file"),
        ("export none.onnx --to tensorrt --for sm_86 --layer layer1", "are fixed"),
        ("explain digits --models none.onnx --out R", "There is no file none.onnx"),
        ("report R --table csv --gallery 3", "A table does not depend on the images of the page"),
        ("report R --images a.png --order wrong", "--images names all images of the page"),
        ("report R --data D", "shows the same images as before"),
        ("report no/such/run", "no/such/run"),
    ],
)
def test_a_mistake_is_two_lines_and_status_2(command: str, message: str, run: Run, models: Path) -> None:
    status, _, err = run(*command.replace("TINY", TINY).split())
    lines = err.splitlines()
    assert status == 2 and len(lines) == 2, err
    assert lines[0].startswith("Error: ") and message in err and lines[1]
    assert not list(models.parent.rglob("*.onnx*")) and not list(models.parent.rglob("*.partial"))
    assert models.parent.joinpath("R").exists() is False or not list(models.parent.joinpath("R").rglob("*.html"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("explain digits --models m --out R --batch -3", "--batch"),
        ("explain digits --models m --out R --batch many", "--batch"),
        ("explain digits --models m --out R --runtime tensor", "--runtime"),
        ("explain digits --models m --out R --objective fame", "--objective"),
        ("explain digits --models m --out R --weighting none", "--weighting"),
        ("explain digits --models m --out R --confidence 1", "--confidence"),
        ("explain digits --models m --out R --features cooked", "--features"),
        ("explain digits --models m --out R --keep half", "--keep"),
        ("explain digits --models m --out R --reference -1", "--reference"),
        ("explain digits --models m", "--out"),
        ("explain --models m --out R", "data"),
        ("explain digits --models m --out R --colour red", "--colour"),
        ("distill digits --teacher t --student s --out R --epochs 0", "--epochs"),
        ("distill digits --teacher t --student s --out R --alpha 2", "--alpha"),
        ("export TINY --kind maps", "--kind"),
        ("export TINY --precision int8", "--precision"),
        ("export TINY --to tflite", "--to"),
        ("export TINY --image-size 0", "--image-size"),
        ("demo --seed -1", "--seed"),
        ("paint", "paint"),
    ],
)
def test_a_wrong_option_is_named_with_status_2(command: str, message: str, run: Run) -> None:
    status, out, err = run(*command.split())
    assert status == 2 and out == ""
    assert message in err and "Traceback" not in err and "-h" in err


def test_an_error_is_printed_without_markup_or_wrapping(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Path) -> None:
        raise KdxError("[red]no[/red] " + "long " * 60 + "line.", "Fix [/it].")

    monkeypatch.setattr(page, "write_page", fails)
    status, _, err = run("report", "R")
    assert status == 2 and err == "Error: [red]no[/red] " + "long " * 60 + "line.\nFix [/it].\n"


def test_a_bug_propagates(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Path) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(page, "write_page", fails)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("report", "R")


# ---- Ctrl-C ----


INTERRUPTED = [
    ("demo", "kdx.commands.demo.run"),
    ("distill D --teacher t --student s --out O", "kdx.distill.distill"),
    ("explain D --models m --out R", "kdx.commands.explain.run"),
    ("export t --layer a", "kdx.commands.export.export"),
    ("report R", "kdx.report.page.write_page"),
    ("doctor", "kdx.commands.doctor.probe"),
]


@pytest.mark.parametrize(("command", "function"), INTERRUPTED)
@pytest.mark.parametrize(
    ("interrupt", "message"), [(KeyboardInterrupt, "Stopped."), (Stopped, "Stopped. Run the same command again to resume.")]
)
def test_an_interrupt_is_status_130_and_promises_no_more_than_the_command_keeps(
    command: str, function: str, interrupt: type[KeyboardInterrupt], message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise interrupt

    monkeypatch.setattr(function, interrupted)
    status, _, err = run(*command.split())
    assert (status, err) == (130, f"{message}\n")


@pytest.mark.parametrize("stored", [False, True])
def test_ctrl_c_promises_to_resume_only_what_was_stored(stored: bool) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, resumable(lambda: stored):
        raise KeyboardInterrupt
    assert isinstance(caught.value, Stopped) == stored


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_in_training_leaves_a_state_to_resume_from(tmp_path: Path) -> None:
    command = f"distill digits --teacher {TINY} --student {TINY} --out O --epochs 500 --image-size 8 --batch 400"
    process = subprocess.Popen(
        [KDX, *command.split()],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a suite in the background ignores it
    )
    state = tmp_path / "O" / "teacher.state.pt"
    deadline = time.monotonic() + 60
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "Stopped. Run the same command again to resume.\n"
    assert state.exists() and not (tmp_path / "O" / "models.toml").exists()
