"""Finished weights and the states of unfinished training, each with the recipe that all its numbers follow from."""

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
    """The state to go on from, copied into network and optimizer; a fresh one where there is no file."""
    if not path.exists():
        return {"recipe": _written(recipe), "epoch": 0, "best_score": [-1.0, 0.0]}
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # written whole or not at all, so anything else here is another program's doing
        raise KdxError(f"The state file {path} cannot be read.", "Remove it to train this network from the start.") from error
    _same_recipe(path, state["recipe"], recipe)
    network.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state file, whole or not at all."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def finished(path: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether ``path`` holds weights of this recipe; KdxError when they are of another."""
    import safetensors

    if not path.is_file():
        return False
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise KdxError(f"{path} cannot be read as safetensors.", "Remove it to train this network again.") from error
    _same_recipe(path, metadata.get("recipe", "{}"), recipe)
    return True


def _same_recipe(path: Path, held: str, recipe: Mapping[str, Any]) -> None:
    if held == _written(recipe):
        return
    before = json.loads(held)
    differing = [key for key in {**recipe, **before} if before.get(key) != recipe.get(key)]
    raise KdxError(
        f"{path} is of another configuration: {', '.join(differing)} differ{'s' if len(differing) == 1 else ''}.",
        "Give another output folder, or the same data, references and settings.",
    )


def _written(recipe: Mapping[str, Any]) -> str:
    return json.dumps(recipe, sort_keys=True)


def save(path: Path, state: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> None:
    """Write finished weights with their recipe, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"recipe": _written(recipe)})
