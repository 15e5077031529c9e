"""The Explainer: compares a student with its base and its teacher on any images, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.choices import (
    NO_BASE,
    Features,
    GeometryName,
    ObjectiveName,
    Precision,
    RuntimeName,
    SalientClass,
    SalientImage,
    SalientScore,
    Weighting,
)
from kdx.data import inputs
from kdx.data.class_embeddings import ClassEmbeddings
from kdx.data.inputs import Batches, Pictures
from kdx.errors import KdxError
from kdx.explain.batch_target import BatchTarget
from kdx.explain.class_targets import explainer_target, rows_of
from kdx.explain.explainer_file import ExplainerFile
from kdx.explain.layer import LayerMeasurement, PendingMeasurement
from kdx.explain.map_statistics import stability
from kdx.explain.network_set import NetworkRecord, NetworkSet
from kdx.explain.networks import NetworkLike, NetworkRunners, networks_of
from kdx.explain.results import Explanation, LayerResult
from kdx.explain.settings import Settings
from kdx.explain.shared_features import SharedFeatures
from kdx.features import arrays
from kdx.features.arrays import Array, ArrayT, Labels
from kdx.features.score_maps import terms
from kdx.features.target import ClassNames
from kdx.kernels import ambient
from kdx.maps.decomposition import Decomposition
from kdx.maps.unicam import Maps
from kdx.models.layer_pairs import LayerNamesLike, layer_names
from kdx.models.models_file import ModelsFile, read_models
from kdx.roles import BASELINE, TARGET, ScoreMap, roles_among, score_maps_among
from kdx.runtimes.choice import Choice
from kdx.runtimes.transfers import Transfers
from kdx.scores.pool import pooled_scores


class Explainer:
    """Explains images with one, two or three networks: ``explainer(images, labels) -> Explanation``.

    models: a models file (`kdx.models.read_models`, or its path), which names the networks of all roles; its layers are the default.
    student, base, teacher: instead, each role's network: a model reference, ``MODELS.toml:ROLE``, the path of a file that ``kdx export``
    wrote, a `kdx.models.Network`, or a PyTorch module (used as it is, without preprocessing). Base and teacher are optional, and
    ``base="none"`` leaves out the base of a models file. The maps,
    scores and contrasts are those whose roles exist: a student and a teacher have *missed*, *new*, FSS(S,T) and their RS; a student alone
    has the map *alone* and RS(S).
    random: the student's architecture with random weights (`kdx.models.untrained`), at the student's layers. It adds FSS(R,T), beside which
    FSS(S,T) is read, and their difference. It needs a teacher.
    layers: names that all networks share, or a list in which an entry may name each role's layer: ``"student_layer=teacher_layer"``,
    ``"student=layer4,teacher=blocks.9"`` or ``{"student": "layer4", "teacher": "blocks.9"}``; roles that are not named have the student's.
    A mapping is from the student's and base's layer to the teacher's.
    runtime: ``auto``, ``eager``, ``onnx``, ``openvino`` or ``tensorrt``. The last three export the networks once, into ``folder`` or a
    temporary folder. Files in ``folder`` and in the cache are used again, except for PyTorch modules, whose code no reference identifies.
    Without a GPU, ``auto`` runs in PyTorch until an export would have saved time for the images so far, and then exports; results of the
    two runtimes agree to about 1e-5, so name one where equal digits matter.
    device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    precision: the number format of the networks. ``tf32`` lets a GPU round the factors of products and convolutions to ten bits, in the
    runtimes eager and onnx. ``bfloat16`` needs the runtime openvino and a CPU that supports it. Features then
    keep two to three digits; maps and scores are computed from them in float32.
    geometry: the images that an image is compared with. ``whole`` and ``batch`` both stand for all images of one call, so give a set in
    one call; ``kdx explain`` is for sets that do not fit in memory. ``reference`` stands for the images of `use_references`, which must be
    called first; UniCAM's maps are then compared with them, and scores and the maps that add up to them with the images of the call.
    ``auto`` is reference after `use_references`, and whole otherwise.
    objective, weighting, pooled: as in `kdx.unicam`. pooled also applies to the scores; there are then no maps that add up to them.
    chunk: images per pass of a network, by default all images of a call, or 64 for an engine. It does not change the results.
    permutations, confidence, seed: for the p-values and intervals of the scores.
    file: an explainer file. It replaces the networks, the objective and the weighting; its layers are the default.
    features: ``raw``, or ``salient`` for scores, contrasts and p-values of salient features. At each layer these are a network's features
    of its own salient images (`kdx.salient_images`), in which the share ``keep`` of the pixels is kept and the rest is imputed with
    ``noise``. salient_class: the class of which pixels are kept: the one that the network ``predicted``, or the ``true`` one.
    salient_score: whether the ``logit`` of that class or its ``probability`` (softmax) ranks the pixels; a probability of 1 has no
    gradient. salient_image: ``exact``, or ``published`` for the images of the authors' code (docs/published.md), with ``noise`` in units of
    normalised pixels. The maps are always those of the raw features. Salient features cost one additional backward pass per network, and
    one additional forward pass per network and layer. Exported files contain no gradients for them.

    Images are an array or tensor [n, 3, h, w] or [n, h, w, 3], in [0, 1] or as uint8; or Pillow images, paths of files, or a list of them,
    which are resized to the largest size that a network specifies (`kdx.data.as_pixels`). Pixels outside [0, 1] are refused, unless kdx
    normalises for none of the networks: PyTorch modules without preprocessing may take any range, and then images of any range are used
    as they are. Labels are integers or class names, in an array or a list, or an embedding [n, e]. Class names are those of the models
    file or the explainer file; where neither is given, any names may be used. If the models file has ``targets``, class embeddings, a label
    stands for the row of its class; if ``targets`` has a row per image, give the rows. A PyTorch ``DataLoader`` contains both: give it
    alone. All its images are then in memory. Results are tensors for a tensor of images, and NumPy arrays otherwise.

    The explainer is a context manager; `close` frees the networks. ``choice.why`` states in one line what ``auto`` chose and why. If a
    network cannot be exported, ``auto`` falls back to PyTorch and states it there; any other runtime raises KdxError.
    """

    _own_target: ClassEmbeddings | str | None

    def __init__(
        self,
        models: str | Path | ModelsFile | None = None,
        *,
        student: NetworkLike | None = None,
        base: NetworkLike | None = None,
        teacher: NetworkLike | None = None,
        random: NetworkLike | None = None,
        layers: LayerNamesLike = (),
        runtime: RuntimeName = "auto",
        device: str = "auto",
        precision: Precision = "float32",
        geometry: GeometryName = "auto",
        objective: ObjectiveName = "relevance",
        weighting: Weighting = "gap",
        pooled: bool = False,
        chunk: int | None = None,
        permutations: int = 999,
        confidence: float = 0.95,
        seed: int = 0,
        folder: Path | None = None,
        file: str | Path | None = None,
        features: Features = "raw",
        keep: float = 0.5,
        noise: float = 0.0,
        salient_class: SalientClass = "predicted",
        salient_score: SalientScore = "logit",
        salient_image: SalientImage = "exact",
    ) -> None:
        settings = Settings(
            runtime=runtime,
            device=device,
            precision=precision,
            geometry=geometry,
            objective=objective,
            weighting=weighting,
            pooled=pooled,
            chunk=chunk,
            permutations=permutations,
            confidence=confidence,
            seed=seed,
            features=features,
            keep=keep,
            noise=noise,
            salient_class=salient_class,
            salient_score=salient_score,
            salient_image=salient_image,
        )
        roles = {"teacher": teacher, "student": student, "base": None if base == NO_BASE else base, BASELINE: random}
        networks = {role: network for role, network in roles.items() if network is not None}
        classes: Sequence[str] = ()
        own_target: ClassEmbeddings | str | None = None
        if models is not None:
            if networks or file is not None:
                raise ValueError("a models file names all networks; do not give others as well")
            known = models if isinstance(models, ModelsFile) else read_models(models)
            known = known.with_base(base if base == NO_BASE else None)
            own_target = explainer_target(known)  # it may fail, before there are networks that would have to be closed
            networks, layers, classes = networks_of(known), layers or known.layers, known.classes
        self._set_up(networks, layers, settings, folder, None if file is None else Path(file), classes)
        self._own_target = own_target

    @classmethod
    def of(
        cls,
        networks: Mapping[str, NetworkLike],
        layers: LayerNamesLike,
        settings: Settings,
        *,
        folder: Path | None = None,
        file: Path | None = None,
        classes: Sequence[str] = (),
        shared: SharedFeatures | None = None,
    ) -> Self:
        """An explainer of networks by role, or of an explainer file, from one Settings object.

        classes: their names, if known. shared: stored outputs of all networks but the student, which an explainer file does not use.
        """
        explainer = cls.__new__(cls)
        explainer._set_up(networks, layers, settings, folder, file, classes, shared)
        return explainer

    def _set_up(
        self,
        networks: Mapping[str, NetworkLike],
        layers: LayerNamesLike,
        settings: Settings,
        folder: Path | None,
        file: Path | None,
        classes: Sequence[str],
        shared: SharedFeatures | None = None,
    ) -> None:
        names = layer_names(layers)
        self.settings = settings
        self._has_references = False
        self._own_target = None
        self._networks: NetworkSet
        if file is None:
            self._networks = NetworkRunners({role: networks[role] for role in roles_among(networks)}, names, settings, folder, shared)
        elif networks:
            raise ValueError(f"an explainer file contains its networks; do not give {', '.join(networks)} as well")
        else:
            self._networks = ExplainerFile(file, names, settings, folder)
        self.layers = {layer: names.teacher for layer, names in self._networks.layers.items()}
        self.roles = self._networks.roles
        known = classes or self._networks.classes
        self._classes = ClassNames(list(known), known=bool(known))

    @property
    def input_format(self) -> inputs.InputFormat:
        """The size to which pictures are resized, and whether pixels must be in [0, 1]."""
        return self._networks.input_format

    @property
    def choice(self) -> Choice:
        """The runtime and device, and the reason."""
        return self._networks.choice

    @ambient.neutral()
    def open(self, image_size: tuple[int, int], images: int | None = None, *, runtime: str | None = None, batch: int | None = None) -> None:
        """Prepare for images of this size; otherwise the first call does this. Every runtime except eager then exports the networks.

        images: how many will be explained. The runtime ``auto`` then exports only if this saves time. runtime: the runtime that has
        already computed a part of the results, which ``auto`` keeps. batch: the largest number of images in a call, for which TensorRT's
        engines are built.
        """
        self._networks.open(image_size, images, runtime, batch)

    @cached_property
    def transfers(self) -> Transfers:
        """The copies to and from the device of the networks."""
        return Transfers(self.choice.device)

    def networks(self) -> dict[str, NetworkRecord]:
        """The record of each role's network: its reference, hash, parameter count, preprocessing, image size and whether it is trained."""
        return self._networks.networks()

    @ambient.neutral()
    def use_references(self, images: Array | Pictures | Batches, labels: Labels | None = None) -> None:
        """Switch to reference mode: UniCAM maps every later image among these m images instead of the other images of the call.

        images [m, 3, h, w] and labels [m], or a ``DataLoader`` of both, in every form that the explainer takes. An explainer file has no
        reference mode and raises KdxError.
        """
        if self.settings.geometry in ("whole", "batch"):
            raise KdxError(
                f"The explainer has the geometry {self.settings.geometry}, which compares an image with the others of its call.",
                'Make it with geometry="reference" or "auto".',
            )
        batch, target = self._converted(images, labels, "reference labels", "reference images")
        self._has_references = True
        self._networks.use_references(batch, target)

    @ambient.neutral()
    def features(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Each role's logits [n, classes], and per layer each role's features [n, C, H, W], of images [n, 3, h, w] in [0, 1].

        Raises KdxError for an explainer file, which does not output features.
        """
        return self._networks.features(self._pixels(images))

    @ambient.neutral()
    def explain(
        self, images: Tensor, labels: Tensor, seed: int | Sequence[int] | None = None, *, classes: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, LayerMeasurement]]:
        """Each role's logits [n, classes] and one LayerMeasurement per layer, from images [n, 3, h, w] in [0, 1] and labels [n] or [n, e].

        seed: of the permutations for p-values and of the noise in salient images; by default the explainer's own. classes [n]: the true
        classes, for salient features of the true class where the labels are an embedding. Calling the explainer turns the same
        measurements into scores.
        """
        if isinstance(seed, Tensor):
            raise TypeError("explain makes its permutations itself: give only a seed")
        seed = self.settings.seed if seed is None else seed
        logits, pending = self.begin(images, BatchTarget.of(labels, self.settings.permutations, seed, classes))
        return logits, {layer: measurement.result() for layer, measurement in pending.items()}

    @ambient.neutral()
    def begin(self, images: Tensor, batch: BatchTarget) -> tuple[dict[str, Tensor], dict[str, PendingMeasurement]]:
        """`explain` for images whose labels and permutations are already known, without waiting for a GPU where the kernels run.

        Labels and permutations are copied to the device before the passes, and the images once for all networks.
        """
        return self._networks.begin(self._pixels(images), batch.moved(self.transfers.upload_together))

    def _pixels(self, images: Tensor) -> Tensor:
        """Pixels [n, 3, h, w] on the device, from images that are uploaded before they are converted."""
        return inputs.as_pixels(self.transfers.upload(images), self._networks.input_format)

    @overload
    def __call__(self, images: ArrayT, labels: Labels, *, classes: Array | None = None) -> Explanation[ArrayT]: ...
    @overload
    def __call__(
        self, images: Pictures | Batches, labels: Labels | None = None, *, classes: Array | None = None
    ) -> Explanation[NDArray[Any]]: ...
    @ambient.neutral()
    def __call__(self, images: Any, labels: Labels | None = None, *, classes: Array | None = None) -> Explanation[Any]:
        """Maps and scores of n images with labels [n] or an embedding [n, e], or of a ``DataLoader`` of both.

        classes [n]: as in `explain`.
        """
        batch, target = self._converted(images, labels, "labels or class embeddings", "images")
        arrays.check_images(len(batch))
        if self.settings.geometry == "reference" and not self._has_references:
            raise KdxError("The geometry reference needs reference images.", "Call use_references(images, labels) first.")
        true = None if classes is None else arrays.tensor(classes, "classes")
        logits, measurements = self.explain(batch, target, classes=true)
        layers = {layer: self._result(measurement, len(batch), images) for layer, measurement in measurements.items()}
        return Explanation(layers, {role: arrays.like(rows, images) for role, rows in logits.items()})

    def _converted(self, images: Any, labels: Any, labels_name: str, images_name: str) -> tuple[Tensor, Tensor]:
        """Pixels [n, 3, h, w], and labels [n] or an embedding [n, e], from what the user gave."""
        expected = self._networks.input_format
        if labels is None:
            if not inputs.has_labels(images):
                raise KdxError("The images have no labels.", "Give one label per image, or a DataLoader that yields (images, labels).")
            images, labels = inputs.labelled(images, expected)
        batch, target = inputs.as_pixels(images, expected), arrays.tensor(self._classes.target(labels), "target")
        arrays.check_same(len(target), len(batch), labels_name, images_name)
        return batch, rows_of(target, self._own_target)

    def _result(self, measurement: LayerMeasurement, n: int, images: ArrayT) -> LayerResult[ArrayT]:
        summary = pooled_scores(
            measurement.products,
            measurement.permuted,
            measurement.moments,
            n=n,
            confidence=self.settings.confidence,
            roles=self.roles,
        )
        maps = {
            name: Maps(arrays.like(value.maps, images), arrays.like(value.weights, images), value.score)
            for name, value in measurement.maps.items()
        }
        score_maps = {
            kind.symbol: self._decomposition(kind, measurement, images)
            for kind in score_maps_among(self.roles).values()
            if measurement.shares
        }
        return LayerResult(maps, score_maps, summary.scores, summary.contrasts)

    def _decomposition(self, kind: ScoreMap, measurement: LayerMeasurement, images: ArrayT) -> Decomposition[ArrayT]:
        parts = terms(kind, measurement.shares, measurement.products, (*self.roles, TARGET))  # [contexts, n, h, w]
        contexts = torch.stack(parts).sum(0)
        maps = contexts.sum(0)
        other = arrays.like(-parts[1].sum(0), images) if len(parts) == 2 else None
        known = arrays.like(stability(*contexts), images) if len(contexts) == 2 else None  # an explainer file gives one context
        return Decomposition(arrays.like(maps, images), arrays.like(parts[0].sum(0), images), other, float(maps.sum()), known)

    def close(self) -> None:
        self._networks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()
