"""Files of finished weights and of unfinished trainings. Each stores its recipe: everything that its numbers depend on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdx.disk import parse_json, replacing
from kdx.errors import KdxError
from kdx.models.checkpoint_files import read_recipe

TRAINED_ON = "trained_on"
"""The entry of a recipe for the training data of weights that were not trained here (the fields of `TrainingData`)."""


@dataclass(frozen=True)
class Recipe:
    """Everything that the numbers of a file depend on.

    TRAINED_ON is also an entry for weights that kdx trained elsewhere; these depend on it through their hash, so it is not compared.
    fingerprint_of_0_1_0: returns the fingerprint that kdx 0.1.0 stored as the entry ``data``, by which its files are recognised. It
    stored no ``split_seed``, because its training seed was also that of the split.
    """

    entries: Mapping[str, Any]
    fingerprint_of_0_1_0: Callable[[], str] | None = None

    def with_entries(self, entries: Mapping[str, Any]) -> Recipe:
        """The recipe with further entries."""
        return Recipe({**self.entries, **entries}, self.fingerprint_of_0_1_0)

    def to_json(self) -> str:
        return json.dumps(self.entries, sort_keys=True)

    def differences(self, stored: str) -> list[str]:
        """The names of the entries in which a stored recipe differs. Raises ValueError if it is damaged."""
        if stored == self.to_json():
            return []
        theirs, ours = parse_json(stored), dict(self.entries)
        if not isinstance(theirs, dict):
            raise ValueError("a recipe is a JSON object")
        if "seed" in theirs and "split_seed" not in theirs and self.fingerprint_of_0_1_0 is not None:
            theirs |= {"split_seed": theirs["seed"]}
            ours |= {"data": self.fingerprint_of_0_1_0()}
        return [key for key in {**ours, **theirs} if key != TRAINED_ON and theirs.get(key) != ours.get(key)]


@dataclass(frozen=True)
class TrainingData:
    """The data that a network was trained on, by fingerprint, and the seed of their split. of_0_1_0: both are those of kdx 0.1.0."""

    fingerprint: str
    split_seed: int
    of_0_1_0: bool = False


class Resumable(Protocol):
    """A part of a training with a state: a module, an optimizer, a scaler."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


def resume(
    path: Path,
    recipe: Recipe,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    others: Mapping[str, Resumable] = MappingProxyType({}),
) -> dict[str, Any]:
    """Load the state file at ``path`` into network, optimizer and ``others``, and return the state; without a file, that of epoch 0.

    Raises KdxError for a file that cannot be read or that belongs to another recipe.
    """
    if not path.exists():
        return {"recipe": recipe.to_json(), "epoch": 0, "best_score": [-math.inf, -math.inf]}
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        _check_recipe(path, state["recipe"], recipe)
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for name, part in others.items():
            part.load_state_dict(state[name])
    except KdxError:
        raise
    except Exception as error:  # kdx writes it atomically, so another program has changed it
        raise KdxError(f"The state file {path} cannot be read.", "Remove it to train this network from the start.") from error
    return state


def on_processor(value: Any, *, copy: bool = False) -> Any:
    """Nested dictionaries and lists with their tensors on the processor. The copies wait for a GPU once, not once per tensor.

    copy: whether tensors that are already on the processor are copied too.
    """
    devices: set[torch.device] = set()

    def moved(part: Any) -> Any:
        if isinstance(part, Tensor):
            devices.add(part.device)
            return part.detach().to("cpu", non_blocking=True, copy=copy)
        if isinstance(part, Mapping):
            return {key: moved(entry) for key, entry in part.items()}
        return [moved(entry) for entry in part] if isinstance(part, list) else part

    result = moved(value)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return result


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state file atomically."""
    content = on_processor(state)
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # PyTorch wraps the error of a full disk
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def is_finished(path: Path, recipe: Recipe) -> bool:
    """Whether ``path`` contains weights of this recipe. Raises KdxError if they belong to another one."""
    if not path.is_file():
        return False
    _check_recipe(path, _metadata(path).get("recipe", "{}"), recipe)
    return True


def _metadata(path: Path) -> dict[str, str]:
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise KdxError(f"{path} cannot be read as safetensors.", "Remove it to train this network again.") from error


def _check_recipe(path: Path, stored: str, recipe: Recipe) -> None:
    try:
        differing = recipe.differences(stored)
    except ValueError as error:
        raise KdxError(f"The recipe in {path} is damaged.", "Remove the file to train this network again.") from error
    if differing:
        raise KdxError(
            f"{path} belongs to another configuration: {', '.join(differing)} differ{'s' if len(differing) == 1 else ''}.",
            "Choose another output folder, or give the same data, references and settings as before.",
        )


def save_weights(path: Path, state: Mapping[str, Tensor], recipe: Recipe) -> None:
    """Write finished weights with their recipe as safetensors, atomically."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with replacing(path) as temporary:  # one entry of metadata, because safetensors writes several in random order
        temporary.write_bytes(save(tensors, metadata={"recipe": recipe.to_json()}))


def read_training_data(path: Path) -> TrainingData | None:
    """The data that the weights in ``path`` were trained on; None if kdx did not train them."""
    recipe = read_recipe(path)
    try:
        if TRAINED_ON in recipe:
            return TrainingData(**recipe[TRAINED_ON])
        return TrainingData(str(recipe["data"]), int(recipe.get("split_seed", recipe["seed"])), "split_seed" not in recipe)
    except (KeyError, TypeError, ValueError, AttributeError):  # another program wrote the metadata, or the recipe does not name the data
        return None
