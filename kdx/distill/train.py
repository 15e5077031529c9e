"""Trains teacher, base and student, and writes them with a models file. Stops and resumes without a trace in the weights.

Base and student start from the same weights and see the same batches: what differs between them is the teacher's doing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdx import models, progress
from kdx.data.batches import class_balanced_sample, split
from kdx.data.dataset import Dataset, Indices, open_data
from kdx.data.images import load_images
from kdx.distill import checkpoints
from kdx.distill.losses import METHODS, Outputs
from kdx.distill.settings import Progress, Report, Settings
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph, Preprocessing, find_layer
from kdx.models import models_file
from kdx.models.feature_layers import parse_layers
from kdx.models.reference import ModelReference

_CACHE_BYTES = 1_000_000_000
_WARM_UP = 0.1  # share of the steps over which the learning rate rises


def distill(
    data: str,
    *,
    teacher: str,
    student: str,
    out: Path | str,
    settings: Settings = Settings(),
    layers: Sequence[str] | None = None,
    base: Path | str | None = None,
    device: str = "auto",
    report: Report | None = None,
) -> Path:
    """Train teacher, base (the student's architecture, labels only) and student, and return the path of OUT/models.toml.

    A teacher whose reference has ``@weights``, or is a trained network by itself (``hf:``, ``.pt2``), is taken as it is. ``base`` takes
    a base checkpoint of another run, which must be of the same recipe. The weights kept are the best on the validation split; the
    accuracy on the test split is measured at the end and recorded. ``layers`` are the pairs that feature losses match and that the
    models file names: ``layer3``, or ``student_layer=teacher_layer``; by default those that both networks have. Images are resized for
    all three as the teacher's preprocessing says, or to ``settings.image_size``. ``report`` is called after every epoch; by default a
    terminal shows bars and anything else gets lines.

    After each epoch OUT/NAME.state.pt holds what is needed to go on: the same call after an interruption gives the weights that an
    uninterrupted one gives. Finished networks are kept.

    Raises KdxError for references, layers and devices that do not work, for networks that do not have the data's classes or hold
    numbers that are not finite, for an OUT that holds networks of another configuration, and when training diverges.
    """
    run = _Run.prepare(data, Path(out), settings, _device(device), teacher, student)
    told = report is not None or _tell_unreadable(run)
    with ExitStack() as stack:
        show = report or stack.enter_context(_console())
        pairs = _pairs(run, layers)
        _check_outputs(run)
        _teacher(run, show)
        _base(run, base, show)
        _student(run, pairs, show)
    path = _write(run, pairs)
    if not told:  # images that are decoded anew in every epoch are found while training
        _tell_unreadable(run)
    return path


@dataclass(frozen=True)
class _Run:
    """What the training of the three networks shares."""

    out: Path
    settings: Settings
    device: torch.device
    dataset: Dataset
    images: Mapping[str, _Split]
    preprocessing: Preprocessing
    teacher: ModelReference
    student: ModelReference
    given: bool
    """Whether the teacher is taken as it is."""

    @classmethod
    def prepare(cls, data: str, out: Path, settings: Settings, device: torch.device, teacher: str, student: str) -> _Run:
        dataset = open_data(data)
        # Local folders and files are written in full: a models file finds them from wherever it is.
        references = [models.parse_reference(reference).located().with_classes(len(dataset.classes)) for reference in (teacher, student)]
        if references[1].source == "pt2":
            raise KdxError(f"{student} is a program for inference, which does not train.", "Name the student's architecture instead.")
        master = models.load(str(references[0]))
        given = references[0].weights is not None or (references[0].source in ("hf", "pt2") and master.trained)
        preprocessing = _preprocessing(master, settings)
        splits = split(dataset, settings.seed)
        some = splits["train"]
        if settings.student_images is not None:
            some = some[class_balanced_sample(dataset.labels[some], settings.student_images, settings.seed)]
        out.mkdir(parents=True, exist_ok=True)
        images = {name: _Split(dataset, indices, preprocessing.size or (0, 0)) for name, indices in (splits | {"student": some}).items()}
        for name, held in images.items():
            if len(held) < 2:
                raise KdxError(f"The {name} split of {data} has {len(held)} readable images.", "Give more images; every split needs some.")
        return cls(out, settings, device, dataset, images, preprocessing, references[0], references[1], given)

    def path(self, name: str) -> Path:
        return self.out / f"{name}.safetensors"

    def network(self, name: str) -> nn.Module:
        """The network of a role with the weights it starts from; base and student start alike."""
        reference = self.teacher if name == "teacher" else self.student
        with _seeded(self.device, self.settings.seed, int(name == "teacher")):
            module = models.load(str(reference)).module
        return module.to(self.device)

    def finished(self, name: str) -> nn.Module:
        """The network of a role with the weights it ended with, to evaluate."""
        reference = self.teacher if name == "teacher" else self.student
        module = models.load(str(reference.with_weights(f"{name}.safetensors")), folder=self.out).module
        return module.to(self.device).requires_grad_(False)

    def graph(self, module: nn.Module, layers: Sequence[str] = ()) -> FeatureGraph:
        """Images are decoded at their size, so the graph need not resize them."""
        return FeatureGraph(module, layers, replace(self.preprocessing, size=None)).to(self.device)

    def recipe(self, name: str) -> dict[str, Any]:
        """All that the weights of teacher or base depend on."""
        settings = self.settings
        reference = self.teacher if name == "teacher" else self.student
        common = ("batch", "optimizer", "learning_rate", "weight_decay", "seed", "augment", "flip")
        return {
            "data": self.dataset.fingerprint,
            "architecture": str(reference.with_weights(None)),
            "initial": models.weights_hash(self.network(name)) if reference.is_trained else None,
            "epochs": self.epochs(name),
            "images": None if name == "teacher" else settings.student_images,
            "size": list(self.preprocessing.size or ()),
            "mean": list(self.preprocessing.mean),
            "std": list(self.preprocessing.std),
            **{key: getattr(settings, key) for key in common},
        }

    def epochs(self, name: str) -> int:
        return self.settings.teacher_epochs or self.settings.epochs if name == "teacher" else self.settings.epochs


def _preprocessing(teacher: models.Network, settings: Settings) -> Preprocessing:
    size = settings.image_size or teacher.preprocessing.size
    if size is None:
        raise KdxError(f"{teacher.reference} does not say the size of its images.", "Give the image size.")
    return replace(teacher.preprocessing, size=size)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise KdxError(f"The device {name!r} cannot be used here.", "Give cpu, or auto; kdx doctor shows what this machine has.") from error
    return device


def _pairs(run: _Run, layers: Sequence[str] | None) -> list[tuple[str, str]]:
    """The student's and the teacher's layer of each pair."""
    student, teacher = run.network("student"), run.network("teacher")
    if layers is not None:
        pairs = list(parse_layers(layers).items())
        for ours, theirs in pairs:
            find_layer(student, ours)
            find_layer(teacher, theirs)
        return pairs
    size = run.preprocessing.size
    own, known = models.layers(student, size), models.layers(teacher, size)
    common = [(name, name) for name in own if name in known]
    return common or list(zip(own[-1:], known[-1:], strict=False))


def _check_outputs(run: _Run) -> None:
    """What would be found only when the networks meet, after hours of training."""
    widths = {}
    for name in ("teacher", "student"):
        module = run.network(name)
        for key, tensor in module.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise KdxError(
                    f"The weights of the {name} are not finite numbers: {key}.", "Give weights from a training that did not diverge."
                )
        graph = run.graph(module).eval()
        with torch.no_grad():
            logits = graph(run.images["validation"].read(np.arange(2))[0].to(run.device))[0]
        if not torch.isfinite(logits).all():
            raise KdxError(
                f"The {name}'s logits are not finite numbers.", "Give sound weights, and the preprocessing they were trained with."
            )
        widths[name] = logits.shape[1]
        if logits.shape[1] < len(run.dataset.classes):
            raise KdxError(
                f"The {name} has {logits.shape[1]} classes, the data {len(run.dataset.classes)}.", "Give the network the data's classes."
            )
    if widths["teacher"] != widths["student"]:
        raise KdxError(
            f"The teacher has {widths['teacher']} classes and the student {widths['student']}.",
            f"Both need the {len(run.dataset.classes)} classes of the data.",
        )


def _teacher(run: _Run, report: Report) -> None:
    path = run.path("teacher")
    if not run.given:
        _train(run, "teacher", "train", run.recipe("teacher"), _labels_only(run, "teacher"), report)
        return
    given = run.network("teacher")
    recipe = {"given": models.weights_hash(given)}
    if not checkpoints.finished(path, recipe):
        checkpoints.save(path, given.state_dict(), recipe)
    report(Progress("teacher", 1, 1))


def _base(run: _Run, checkpoint: Path | str | None, report: Report) -> None:
    path, recipe = run.path("base"), run.recipe("base")
    if checkpoint is not None and not checkpoints.finished(path, recipe):
        if not checkpoints.finished(Path(checkpoint), recipe):
            raise KdxError(f"There is no base checkpoint {checkpoint}.", "Give the base.safetensors that another run of kdx distill wrote.")
        module = run.network("base")
        models.load_weights(module, Path(checkpoint))
        checkpoints.save(path, module.state_dict(), recipe)
    _train(run, "base", "student", recipe, _labels_only(run, "base"), report)


def _student(run: _Run, pairs: Sequence[tuple[str, str]], report: Report) -> None:
    settings, method = run.settings, METHODS[run.settings.method]
    matched = list(pairs) if method.uses_features else []
    if method.uses_features and not matched:
        raise KdxError(
            f"The method {settings.method} matches features, and there is no pair of layers.", "Name them: student_layer=teacher_layer."
        )
    teacher = run.finished("teacher")
    recipe = run.recipe("base") | {
        "teacher": models.weights_hash(teacher),
        "method": settings.method,
        "layers": [list(pair) for pair in matched],
        **{key: getattr(settings, key) for key in ("temperature", "alpha", "beta")},
    }
    guide = run.graph(teacher, [theirs for _, theirs in matched])
    graph = run.graph(run.network("student"), [ours for ours, _ in matched])

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = _outputs(guide, images)
        return method.loss(_outputs(graph, images), target, labels, settings)

    _train(run, "student", "student", recipe, (graph, loss), report)


Trained = tuple[FeatureGraph, Callable[[Tensor, Tensor], Tensor]]
"""A network in its graph, and the loss of a batch (images [n, 3, H, W] in [0, 1], labels [n]) that trains it."""


def _labels_only(run: _Run, name: str) -> Trained:
    graph = run.graph(run.network(name))

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(graph(images)[0], labels)

    return graph, loss


def _outputs(graph: FeatureGraph, images: Tensor) -> Outputs:
    logits, *features = graph(images)
    return Outputs(logits, tuple(features))


def _write(run: _Run, pairs: Sequence[tuple[str, str]]) -> Path:
    accuracies = {
        f"{name}_accuracy": round(_evaluate(run, run.graph(run.finished(name)), "test")[0], 6) for name in ("teacher", "base", "student")
    }
    settings = run.settings
    path = run.out / "models.toml"
    models_file.write_models(
        path,
        teacher=str(run.teacher.with_weights("teacher.safetensors")),
        base=str(run.student.with_weights("base.safetensors")),
        student=str(run.student.with_weights("student.safetensors")),
        layers=[pair[0] if pair[0] == pair[1] else "=".join(pair) for pair in pairs],
        classes=run.dataset.classes,
        preprocessing=run.preprocessing,
        data=run.dataset.reference,
        seed=settings.seed,
        training={
            **{key: value for key, value in vars(settings).items() if key not in ("seed", "image_size") and value is not None},
            **accuracies,
            "test_images": len(run.images["test"]),
            "unreadable_images": len(_unreadable(run)),
            "data_fingerprint": run.dataset.fingerprint,
        },
    )
    return path


def _unreadable(run: _Run) -> dict[str, str]:
    return {name: reason for held in run.images.values() for name, reason in held.unreadable.items()}


def _tell_unreadable(run: _Run) -> bool:
    """A line on the images that are left out, where there are any; whether there are."""
    unreadable = _unreadable(run)
    if unreadable:
        name, reason = next(iter(unreadable.items()))
        count = "1 image is" if len(unreadable) == 1 else f"{len(unreadable)} images are"
        progress.console().print(f"{count} left out because unreadable, first {name}: {reason}", markup=False, soft_wrap=True)
    return bool(unreadable)


def _train(run: _Run, name: str, split: str, recipe: Mapping[str, Any], trained: Trained, report: Report) -> None:
    """Train until ``path(name)`` holds the best weights; go on from a state file, keep finished weights."""
    path, state_path, epochs = run.path(name), run.out / f"{name}.state.pt", run.epochs(name)
    if checkpoints.finished(path, recipe):
        state_path.unlink(missing_ok=True)
        report(Progress(name, epochs, epochs))
        return
    graph, loss = trained
    optimizer = _optimizer(graph, run.settings)
    state = checkpoints.resume(state_path, recipe, graph.network, optimizer)
    for epoch in range(state["epoch"], epochs):
        mean = _epoch(run, split, epoch, epochs, graph, loss, optimizer)
        accuracy, validation = _evaluate(run, graph, "validation")
        if not math.isfinite(mean) or not math.isfinite(validation):
            raise KdxError(f"The training of the {name} diverged in epoch {epoch + 1}: its loss is {mean}.", "Give a lower learning rate.")
        if [accuracy, -validation] >= state["best_score"]:
            best = {key: value.detach().cpu().clone() for key, value in graph.network.state_dict().items()}
            state |= {"best_score": [accuracy, -validation], "best": best}
        state |= {"epoch": epoch + 1, "model": graph.network.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoints.save_state(state_path, state)
        report(Progress(name, epoch + 1, epochs, mean, accuracy))
    checkpoints.save(path, state["best"], recipe)
    state_path.unlink()


def _epoch(
    run: _Run,
    split: str,
    epoch: int,
    epochs: int,
    graph: FeatureGraph,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
) -> float:
    """One pass over a split; everything random in it follows from (seed, epoch). The mean loss."""
    settings, images = run.settings, run.images[split]
    generator = np.random.default_rng([settings.seed, epoch])
    batches = np.array_split(generator.permutation(len(images)), math.ceil(len(images) / settings.batch))
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    graph.train()
    with _seeded(run.device, settings.seed, epoch):  # dropout
        for step, positions in enumerate(batches):
            pixels, labels = images.read(positions)
            pixels = _augmented(pixels, settings, generator)
            value = loss(pixels.to(run.device), labels.to(run.device))
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule((epoch * len(batches) + step + 1) / (epochs * len(batches)))
            optimizer.zero_grad()
            torch.autograd.backward(value)
            optimizer.step()
            total += value.detach() * len(labels) / len(images)
    return float(total)


def _evaluate(run: _Run, graph: FeatureGraph, split: str) -> tuple[float, float]:
    """Accuracy and mean cross entropy on a split."""
    images = run.images[split]
    right = entropy = 0.0
    graph.eval()
    with torch.no_grad():
        for positions in np.array_split(np.arange(len(images)), math.ceil(len(images) / 256)):
            pixels, labels = images.read(positions)
            logits = graph(pixels.to(run.device))[0].float().cpu()
            right += float((logits.argmax(1) == labels).sum())
            entropy += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return right / len(images), entropy / len(images)


def _optimizer(graph: FeatureGraph, settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(graph.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.SGD(graph.parameters(), settings.learning_rate, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay)


def _schedule(progress: float) -> float:
    """The learning rate's factor at a share of the steps in (0, 1]: a linear rise, then half a cosine down to 0."""
    if progress < _WARM_UP:
        return progress / _WARM_UP
    return (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP))) / 2


def _augmented(pixels: Tensor, settings: Settings, generator: np.random.Generator) -> Tensor:
    """Each image shifted (its edge repeated) and mirrored as the settings say, [n, 3, H, W]."""
    count, _, height, width = pixels.shape
    if settings.augment:
        reach = max(1, min(height, width) // 12)
        padded = nn.functional.pad(pixels, (reach, reach, reach, reach), mode="replicate")
        tops, lefts = generator.integers(0, 2 * reach + 1, (2, count))
        pixels = torch.stack([padded[i, :, tops[i] : tops[i] + height, lefts[i] : lefts[i] + width] for i in range(count)])
    if settings.flip:
        mirrored = torch.from_numpy(generator.random(count) < 0.5)
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
    return pixels


class _Split:
    """The images of a split: decoded once into memory where they fit, else when they are read."""

    def __init__(self, dataset: Dataset, indices: Indices, size: tuple[int, int]) -> None:
        self.dataset, self.indices, self.size = dataset, indices, size
        self.unreadable: dict[str, str] = {}  # why, by id
        self.pixels: Tensor | None = None  # uint8 [n, 3, H, W]
        if len(indices) * size[0] * size[1] * 3 < _CACHE_BYTES:
            loaded = [load_images(dataset, part, size) for part in np.array_split(indices, len(indices) // 512 + 1)]
            self.pixels = torch.cat([images.pixels.mul(255).round().byte() for images in loaded])
            self.indices = np.concatenate([images.kept for images in loaded])
            self.unreadable = {name: reason for images in loaded for name, reason in images.unreadable}

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, positions: Indices) -> tuple[Tensor, Tensor]:
        """Images [n, 3, H, W] in [0, 1] and labels [n]; an image that cannot be read is left out."""
        if self.pixels is not None:
            return self.pixels[torch.from_numpy(positions)].float().div(255), torch.from_numpy(self.dataset.labels[self.indices[positions]])
        images = load_images(self.dataset, self.indices[positions], self.size)
        self.unreadable |= dict(images.unreadable)
        return images.pixels, torch.from_numpy(self.dataset.labels[images.kept])


@contextmanager
def _seeded(device: torch.device, seed: int, which: int) -> Iterator[None]:
    """PyTorch's own random numbers follow from (seed, which) inside, and are as before after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {which}".encode()).digest()[:7]))
        yield


@contextmanager
def _console() -> Iterator[Report]:
    with progress.progress() as show:
        yield lambda progress: show(progress.network, progress.epoch, progress.epochs, _line(progress))


def _line(progress: Progress) -> str:
    if progress.loss is None or progress.accuracy is None:
        return "already there"
    return f"epochs, loss {progress.loss:.3f}, validation accuracy {progress.accuracy:.1%}"
