"""Image classifiers of Hugging Face transformers, from a folder that ``save_pretrained`` wrote or by a name on the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdx.errors import KdxError, first_line, import_optional
from kdx.export.graphs import Preprocessing

_KNOWN_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


def load_classifier(name: str, arguments: Mapping[str, Any], *, pretrained: bool) -> tuple[nn.Module, Preprocessing, bool]:
    """The network of a name or folder (an absolute path), its preprocessing, and whether all its weights are trained.

    ``arguments`` change the configuration; ``revision`` names a version on the hub. Weights are read from safetensors only, and no
    code from a repository is executed. A head that the checkpoint lacks, or has for another number of classes, is new and random;
    without ``pretrained`` all weights are. Raises KdxError for a network that is missing, unreadable, or not an image classifier.
    """
    transformers = import_optional("transformers", "models", f"The model reference 'hf:{name}'")
    arguments = dict(arguments)
    version = {"revision": str(arguments.pop("revision"))} if "revision" in arguments else {}
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise KdxError(f"There is no folder {name}.", "Give a folder that save_pretrained wrote, or a name on the Hugging Face hub.")
    with _quiet(), _explained(name):
        try:  # the cache first, so that a cached model needs no internet connection
            config, unused = _config(transformers, name, arguments, local_files_only=True, **version)
        except OSError:
            config, unused = _config(transformers, name, arguments, **version)
        if unused:
            raise KdxError(
                f"The configuration of hf:{name} has no {', '.join(unused)}.", "Leave it out; num_labels and revision are common arguments."
            )
        auto = transformers.AutoModelForImageClassification
        if not pretrained:
            module, trained = auto.from_config(config, dtype=torch.float32, trust_remote_code=False), False
        else:
            module, report = auto.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **version,
            )
            trained = not _new_weights(name, module, report)
        return module, _preprocessing(transformers, name, config, version), trained


def _config(transformers: Any, name: str, arguments: Mapping[str, Any], **version: Any) -> tuple[Any, Mapping[str, Any]]:
    config, unused = transformers.AutoConfig.from_pretrained(
        name, return_unused_kwargs=True, trust_remote_code=False, **arguments, **version
    )
    return config, {key: value for key, value in unused.items() if key in arguments}


def _new_weights(name: str, module: nn.Module, report: Mapping[str, Any]) -> list[str]:
    """The parameters that are not from the checkpoint; KdxError if any of them is outside the head."""
    absent = [key for key in report["missing_keys"] if not key.endswith("num_batches_tracked")]
    new = sorted({*absent, *(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])})
    backbone = [key for key in new if key.startswith(f"{getattr(module, 'base_model_prefix', '')}.")]
    if backbone:
        raise KdxError(
            f"The weights of hf:{name} do not fit its configuration: {len(backbone)} are missing or reshaped, such as {backbone[0]}.",
            "Save the network again with save_pretrained.",
        )
    return new


def _preprocessing(transformers: Any, name: str, config: Any, version: Mapping[str, Any]) -> Preprocessing:
    from transformers.utils.hub import cached_file

    if not cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False, **version):
        side = getattr(config, "image_size", None)
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        return Preprocessing((height, width) if height and width else None)
    processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **version)
    return _processor_preprocessing(name, processor.to_dict())


def _processor_preprocessing(name: str, steps: Mapping[str, Any]) -> Preprocessing:
    """The ``Preprocessing`` of images in [0, 1] that equals an image processor's steps; KdxError for steps that it does not have.

    The processor's pixels are 0 to 255, so its rescale factor is undone. As for every source, images are resized to the final size,
    so the border that a crop after a larger resize would cut off remains.
    """
    unknown = [key for key, value in steps.items() if key.startswith("do_") and value and key not in _KNOWN_STEPS]
    crops = bool(steps.get("do_center_crop"))
    if unknown or (crops and not steps.get("do_resize")):
        raise KdxError(
            f"The image processor of hf:{name} has a step that kdx does not have: {(unknown or ['a crop without a resize'])[0]}.",
            "Give a factory of your own whose network contains the step.",
        )
    scale = 255 * float(steps["rescale_factor"]) if steps.get("do_rescale") else 255.0
    offset = float(bool(steps.get("do_rescale")) and bool(steps.get("rescale_offset")))  # EfficientNet's pixels are -1 to 1
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    if steps.get("do_normalize"):
        mean, std = _channels(steps["image_mean"]), _channels(steps["image_std"])
        if steps.get("include_top"):  # EfficientNet divides by the deviation twice
            std = tuple(value * value for value in std)
    size = None
    if steps.get("do_resize"):
        size = _size(name, steps["crop_size"] if crops else steps["size"])
    return Preprocessing(size, tuple((value + offset) / scale for value in mean), tuple(value / scale for value in std))


def _channels(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values) if isinstance(values, (list, tuple)) else (float(values),)


def _size(name: str, size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        sides = {key: value for key, value in size.items() if value is not None}
        if set(sides) == {"height", "width"}:
            return int(sides["height"]), int(sides["width"])
        if set(sides) == {"shortest_edge"}:
            return int(sides["shortest_edge"]), int(sides["shortest_edge"])
    elif isinstance(size, int):
        return size, size
    raise KdxError(
        f"The image processor of hf:{name} does not state a single size: {size}.", "Set its height and width, or only its shortest_edge."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library's progress bars and load reports. kdx raises an error for everything in them that matters."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn the library's exceptions into KdxError."""
    try:
        yield
    except KdxError:
        raise
    except OSError as error:
        raise KdxError(
            f"hf:{name} cannot be read: {first_line(error)}.",
            "Give a folder with config.json and model.safetensors, as save_pretrained writes it; "
            "without an internet connection a name works only if its files are in the cache.",
        ) from error
    except ImportError as error:  # the library names its own module; the reason is at the end of the chain of causes
        cause: BaseException = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__ or cause
        raise KdxError(
            f"hf:{name} needs a package that cannot be imported: {first_line(cause)}.",
            "Reinstall it; torchvision must be built for the PyTorch that runs here.",
        ) from error
    except Exception as error:  # code of another package runs here; the cause stays attached
        raise KdxError(
            f"hf:{name} could not be built: {first_line(error)}.",
            "Name an image classifier of transformers, with arguments of its configuration.",
        ) from error
