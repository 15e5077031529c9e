"""The values that options accept. This module does not import PyTorch, so that the command line can list them quickly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

RuntimeName = Literal["auto", "eager", "onnx", "openvino", "tensorrt"]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)

Precision = Literal["float32", "tf32", "bfloat16"]
"""The number format in which a runtime computes a network. Inputs and outputs are always float32. tf32 is that of a GPU's products."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

FilePrecision = Literal["fp32", "fp16", "bf16"]
"""The number format of the networks in an exported file. Inputs, outputs and the geometry are float32."""

FileKind = Literal["features", "gradients", "explainer"]
FileFormat = Literal["onnx", "tensorrt"]

ObjectiveName = Literal["relevance", "uniqueness"]
"""The score whose gradient weights a UniCAM map: relevance to the target, or uniqueness, which is what only the explained network has."""

TargetKind = Literal["prototypes", "soft", "images"]
"""A target that depends on each image: class means of a network's outputs without the image, softened logits, or a file by image."""
TARGET_KINDS: tuple[TargetKind, ...] = get_args(TargetKind)

LABELS = "labels"
"""The value of an option ``target`` that stands for one-hot labels."""

NO_BASE = "none"
"""The value of an option ``base`` that leaves the base out."""

Weighting = Literal["gap", "elementwise"]
"""How a map weights features: ``gap`` has one weight per channel, ``elementwise`` one per position (HiRes)."""

Features = Literal["raw", "salient"]
"""The features that scores compare: each network's features of the images, or of its own salient images."""

SalientClass = Literal["predicted", "true"]
"""The class of which salient features keep the pixels: the one that each network predicts, or the image's label."""

SalientScore = Literal["logit", "probability"]
"""What the ranking of the pixels of a salient image differentiates: the logit of the class, or its softmax."""

SalientImage = Literal["exact", "published"]
"""How a salient image is made. exact: exactly the share of its pixels is kept, in each layer's own images. published: as in the authors'
code of December 2024, which `kdx.maps.published_images` describes."""

RatioName = Literal["summed", "mean"]
"""How the scores of several batches become one. summed: inner products are summed, and one ratio is taken at the end. mean: the mean of the
batches' ratios, which is biased."""

PresetName = Literal["published"]
"""A named set of options (`kdx.runs.presets`)."""

GeometryName = Literal["auto", "whole", "reference", "batch"]
"""The images that an image is compared with: the whole set, a fixed reference set, or the images of its batch."""

SimilarityGeometry = Literal["auto", "whole", "batch"]
"""The images with which `kdx similarity` compares an image: the whole set, or its batch."""

DecoderName = Literal["pillow", "pillow-draft", "torchvision-cuda"]
"""The decoders of image files. pillow-draft: Pillow, which decodes large JPEG files at an eighth, a quarter or a half of their size, but
not below twice the size that is needed. torchvision-cuda: nvJPEG on the GPU for JPEG files, and Pillow for others. The pixels of both
differ a little from those of pillow."""

ResizeMode = Literal["cover", "squash", "letterbox"]
"""How an image of other proportions is brought to a size. cover: resized until it covers the size, and cropped at its centre. squash:
resized to the size, without regard to its proportions. letterbox: resized until it fits into the size, with grey bars at two sides."""

Interpolation = Literal["bicubic", "bilinear"]
"""How the pixels of a resized image are computed: by Pillow, antialiased."""


@dataclass(frozen=True)
class Resizing:
    """How images are brought to the size of the networks."""

    mode: ResizeMode = "cover"
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        if self.mode not in get_args(ResizeMode) or self.interpolation not in get_args(Interpolation):
            raise ValueError(f"no resize mode {self.mode!r} or no interpolation {self.interpolation!r}")


COVER = Resizing()
"""The default: cover, bicubic."""

OptimizerName = Literal["sgd", "adamw"]
"""The optimizer of a training."""

ScheduleName = Literal["cosine", "step", "constant"]
"""The learning rate of a training after its warm-up."""

Selection = Literal["accuracy", "loss", "last"]
"""The epoch whose weights are kept: the highest accuracy or the lowest cross entropy on the validation split, or the last epoch."""

TrainingPresetName = Literal["asirra", "cifar10", "plants"]
"""A named set of training settings (`kdx.distill.presets`)."""

StudyPresetName = Literal["paper", "digits"]
"""The design of a study (`kdx.study.presets`)."""

DemoName = Literal["digits", "composites"]
"""The data of a demonstration (`kdx.distill.DEMOS`)."""

TrainingPrecision = Literal["float32", "bfloat16", "float16"]
"""The number format in which networks compute during training. Weights, their updates and losses are float32."""

StoredPrecision = Literal["float32", "float16"]
"""The number format of features on disk."""

TableFormat = Literal["csv", "latex", "markdown", "images"]
"""A table of a run: its scores in one of three formats, or the numbers of every image as CSV."""
GroupKind = Literal["class", "group"]
"""Whose scores a table has in place of those of all images: each class's, or each group's of images that share a value of a column."""

TABLE_FORMATS: tuple[TableFormat, ...] = get_args(TableFormat)

DATA_REFERENCES = {
    "FOLDER": "a folder of images: FOLDER/owl/1.jpg, FOLDER/train/owl/1.jpg, or owl.1.jpg in the folder itself",
    "folder:FOLDER": "the same, for a folder whose name could also be another reference",
    "FILE.csv": "a CSV file with the columns path, relative to the file, and label, and optionally split",
    "csv:FILE": "the same, for a file with another suffix",
    "FILE.npz": "a NumPy file with the arrays images and labels",
    "npz:FILE": "the same, for a file with another suffix",
    "cifar10:FOLDER": "CIFAR-10, binary or Python version",
    "cifar100:FOLDER": "CIFAR-100 with its fine labels, binary or Python version",
    "hfdata:NAME_OR_FOLDER": "a data set of the Hugging Face Hub, or a folder or file of its formats",
    "parquet:FILE_OR_FOLDER": "Parquet files with a column of images and one of labels, read by row group",
    "wds:PATTERN": "WebDataset shards, such as wds:shards/{0000..0099}.tar, read image by image",
    "digits": "scikit-learn's 1,797 handwritten digits, 8 x 8",
    "composites": "drawn images: an object with a known mask on a photograph",
    "composites:OPTIONS": "the same with options, such as composites:classes=shape,side=96,spurious=0.9",
    "sample:N:REFERENCE": "N images of another data set, balanced over the classes",
}
"""The references of data sets, with what they name. Help texts, errors and docs/data.md list them."""

DATA_KINDS = (
    "a folder of images, FILE.csv (columns path and label), FILE.npz, cifar10:FOLDER, cifar100:FOLDER, hfdata:NAME_OR_FOLDER, "
    "parquet:FILE_OR_FOLDER, wds:PATTERN, digits, composites, or sample:N:REFERENCE"
)
"""The references in one phrase."""
