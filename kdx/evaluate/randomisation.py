"""The randomisation tests: a map that explains a network must change when the network's weights, or the labels, become random.

Source: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdx.evaluate.ranking import NamedMaps, rank_correlation, structural_similarity
from kdx.maps.scaling import scaled

_CONTAINERS = nn.Sequential, nn.ModuleList, nn.ModuleDict


@dataclass(frozen=True, eq=False)
class Randomisation:
    """How similar the maps of n images are before and after each of P randomisations.

    steps: the name of each step; in a cascade, the part of the network that became random at this step, in addition to those before it.
    rank_correlation [P, n]: Spearman's correlation over positions, NaN where a map is constant. ssim [P, n]: the structural similarity of
    the maps at the size of the images.

    Near 1 means that the maps do not depend on what became random. A low value does not show that the map is right: noise has it as well.
    """

    steps: tuple[str, ...]
    rank_correlation: Tensor
    ssim: Tensor


def network_parts(network: nn.Module) -> tuple[str, ...]:
    """The parts of a network that have parameters or buffers, from the output to the input.

    A part is a child of the network; a container (Sequential, ModuleList, ModuleDict) is divided into its own children. The order is the
    reverse of the order in which modules are defined, which is the order of execution in timm's, torchvision's and kdx's networks.
    """
    return tuple(reversed([name for name, module in _divided(network, "") if module.state_dict()]))


def cascade(network: nn.Module, untrained: nn.Module, parts: Sequence[str] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Copies of a network in which one part more has the weights of its untrained twin, from the output to the input.

    Yields (part, copy); the copy of part k has random weights and statistics in the parts 0 to k. parts: by default `network_parts`, with
    the parameters of no part in the last step, so that the last copy equals the untrained network.

    Raises ValueError if the two networks do not have the same parameters, and for a part without any.
    """
    state, random = dict(network.state_dict()), untrained.state_dict()
    if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in random.items()}:
        raise ValueError("the untrained network does not have the parameters of the network")
    chosen = network_parts(network) if parts is None else tuple(parts)
    for number, part in enumerate(chosen):
        names = [name for name in state if name.startswith(f"{part}.")]
        if not names:
            raise ValueError(f"the network has no part {part!r} with parameters")
        whole = parts is None and number == len(chosen) - 1
        state.update({name: random[name] for name in (state if whole else names)})
        changed = copy.deepcopy(network)
        changed.load_state_dict(state)
        yield part, changed


def model_randomisation(
    maps_of: Callable[[Mapping[str, nn.Module]], NamedMaps],
    networks: Mapping[str, nn.Module],
    untrained: Mapping[str, nn.Module],
    size: tuple[int, int],
    parts: Sequence[str] | None = None,
) -> dict[str, Randomisation]:
    """Recompute maps with networks that become random part by part, from the output to the input (cascading randomisation).

    maps_of: maps [n, H, W] by name, always of the same images, from networks by role. untrained: the twin with random weights of each
    role that is to be randomised, usually of the student alone; with several roles, their parts become random together. size: the size (h,
    w) of the images, at which SSIM is taken. parts: as in `cascade`. Returns the result of each name.

    A map of the features of a layer does not depend on the parts behind that layer, so its correlation is exactly 1 until the cascade
    arrives there. The test finds maps that ignore the network, such as the output of an edge detector. It does not find maps that depend
    on the network and are wrong.

    Raises ValueError for no untrained network, and for roles with different parts.
    """
    if not untrained:
        raise ValueError("give the untrained twin of at least one role")
    before = maps_of(networks)
    steps, after = [], []
    cascades = [cascade(networks[role], twin, parts) for role, twin in untrained.items()]
    for copies in zip(*cascades, strict=True):
        names = {part for part, _ in copies}
        if len(names) > 1:
            raise ValueError(f"the networks do not have the same parts: {', '.join(sorted(names))}")
        steps.append(names.pop())
        changed = {role: network for role, (_, network) in zip(untrained, copies, strict=True)}
        after.append(maps_of({**networks, **changed}))
    return _compared(steps, before, after, size)


def label_randomisation(
    maps_of: Callable[[Tensor], NamedMaps], labels: Tensor, size: tuple[int, int], *, permutations: int = 5, seed: int = 0
) -> dict[str, Randomisation]:
    """Recompute maps with permuted labels, and compare them with those of the true labels.

    maps_of: maps [n, H, W] by name from labels [n]. permutations: how many random orders of the labels are drawn with ``seed``. size: as
    in `model_randomisation`. Returns the result of each name.

    A map of relevance should change, because the labels are its target; a map that does not read the labels (FSS) keeps a correlation of
    1. Class maps then show other classes. This is not the data test of Adebayo et al., who train a network on permuted labels: here the
    networks stay the same. If you have trained such a student, compare its maps with those of the true one by `rank_correlation`.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(labels), generator=generator) for _ in range(permutations)]
    after = [maps_of(labels[order.to(labels.device)]) for order in orders]
    return _compared([f"permutation {number + 1}" for number in range(permutations)], maps_of(labels), after, size)


def _compared(steps: Sequence[str], before: NamedMaps, after: Sequence[NamedMaps], size: tuple[int, int]) -> dict[str, Randomisation]:
    result = {}
    for name, maps in before.items():
        at_size = scaled(maps.double(), size)
        correlations = [rank_correlation(maps, changed[name]) for changed in after]
        similarities = [structural_similarity(at_size, scaled(changed[name].double(), size)) for changed in after]
        result[name] = Randomisation(tuple(steps), torch.stack(correlations), torch.stack(similarities))
    return result


def _divided(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, _CONTAINERS):
            yield from _divided(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child
