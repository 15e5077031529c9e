"""Files of finished weights and of unfinished trainings. Each stores its recipe: everything that its numbers depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdx.disk import replacing
from kdx.errors import KdxError


def resume(path: Path, recipe: Mapping[str, Any], network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the state file at ``path`` into network and optimizer, and return the state; without a file, the state of epoch 0.

    Raises KdxError for a file that cannot be read or that belongs to another recipe.
    """
    if not path.exists():
        return {"recipe": _to_json(recipe), "epoch": 0, "best_score": [-1.0, 0.0]}
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # kdx writes it atomically, so another program has changed it
        raise KdxError(f"The state file {path} cannot be read.", "Remove it to train this network from the start.") from error
    _check_recipe(path, state["recipe"], recipe)
    network.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state file atomically."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def is_finished(path: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether ``path`` contains weights of this recipe. Raises KdxError if they belong to another one."""
    import safetensors

    if not path.is_file():
        return False
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise KdxError(f"{path} cannot be read as safetensors.", "Remove it to train this network again.") from error
    _check_recipe(path, metadata.get("recipe", "{}"), recipe)
    return True


def _check_recipe(path: Path, stored: str, recipe: Mapping[str, Any]) -> None:
    if stored == _to_json(recipe):
        return
    stored_recipe = json.loads(stored)
    differing = [key for key in {**recipe, **stored_recipe} if stored_recipe.get(key) != recipe.get(key)]
    raise KdxError(
        f"{path} belongs to another configuration: {', '.join(differing)} differ{'s' if len(differing) == 1 else ''}.",
        "Choose another output folder, or give the same data, references and settings as before.",
    )


def _to_json(recipe: Mapping[str, Any]) -> str:
    return json.dumps(recipe, sort_keys=True)


def save_weights(path: Path, state: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> None:
    """Write finished weights with their recipe as safetensors, atomically."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"recipe": _to_json(recipe)})
