"""Weights of a network from a file: which entry of the file they are, and which names they have there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Size, Tensor, nn

from kdx.errors import KdxError
from kdx.models.checkpoint_files import TORCH_SUFFIXES, left_out, read_checkpoint
from kdx.models.key_maps import AVERAGED_ENTRIES, ENTRIES, OTHERS, PREFIXES

_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""What torch.compile, activation checkpointing and FSDP insert into names."""

_NOT_WEIGHTS = re.compile(r"(?:^|\.)(?:n_averaged|total_ops|total_params|num_batches_tracked|_extra_state)$")
"""Entries of averaging, of counters of operations, and of batch normalisation, that no prediction uses."""

_EMA_PREFIX = re.compile(r"(?:^|[._])ema(?:[._]|$)")


@dataclass
class _State:
    """Tensors by name, and how they were obtained: the entry of the file, the prefix that was removed, the names that are not used."""

    tensors: dict[str, Tensor]
    entry: str = ""
    prefixes: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def split_key(weights: str | Path) -> tuple[Path, str | None]:
    """The file and the key of ``FILE#KEY``. The key is None without a ``#``, and for a file whose name contains it and that exists."""
    path = Path(weights).expanduser()
    file, sign, key = str(path).partition("#")
    if sign and not Path(file).suffix and Path(file).is_file() and not path.is_file():  # mdistiller's files have no suffix
        return Path(file), key
    while sign and key and not file.endswith((".safetensors", *TORCH_SUFFIXES)):
        more, sign, key = key.partition("#")
        file = f"{file}#{more}"
    return (path, None) if path.is_file() or not sign else (Path(file), key)


def load_weights(module: nn.Module, path: Path | str, *, new_head: bool = False) -> str:
    """Copy the weights of ``FILE`` or ``FILE#KEY`` into ``module``; returns one line about choices that were made, or "".

    The file contains tensors by name, in itself or in an entry: averaged weights (``state_dict_ema``, ``model_ema``) before others
    (``state_dict``, ``model``, ``net``, ``weights`` and more). KEY names another entry, or the beginning of the names (``student`` for
    ``student.conv1.weight``); ``a/b`` is KEY b inside a. A prefix of all names, such as ``module.``, is removed if the names then match.
    Entries outside the prefix, and those that are no weights, are not used. new_head: leave the last layer as it is if the file does not
    have it or has it for other classes.

    Raises KdxError if the file is missing, unreadable, contains several networks, or belongs to another network.
    """
    file, key = split_key(path)
    content = read_checkpoint(file)
    if not isinstance(content, Mapping):
        content = {"": content}
    expected = {_WRAPPERS.sub("", name): (name, tensor) for name, tensor in module.state_dict().items()}
    shapes = {name: tensor.shape for name, (_, tensor) in expected.items()}
    state = _select(file, content, key, shapes)
    _match_names(file, state, shapes)
    skipped = _check(file, state, shapes, new_head=new_head)
    module.load_state_dict({expected[name][0]: tensor for name, tensor in state.tensors.items() if name not in skipped}, strict=False)
    return _note(file, content, state, skipped)


def _select(file: Path, content: Mapping[Any, Any], key: str | None, shapes: Mapping[str, Size]) -> _State:
    """The tensors of one network in a file."""
    if key is None:
        return _descend(file, content, shapes, "")
    entry = ""
    for part in key.split("/"):
        if isinstance(content.get(part), Mapping):
            content, entry = content[part], f"{entry}/{part}" if entry else part
            continue
        try:
            state = _descend(file, content, shapes, entry)
        except KdxError:  # several networks, or none
            state = _State({})
        inner = _below(state.tensors, part)
        if not inner:
            keys = {*(str(name) for name, value in content.items() if _has_tensors(value)), *(name.split(".")[0] for name in state.tensors)}
            raise KdxError(f"{file} has no entry {part!r}.", f"After the #, give one of: {', '.join(sorted(keys)[:12])}.")
        content, entry = inner, f"{entry}/{part}" if entry else part
    return _descend(file, content, shapes, entry)


def _below(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``part.``, or with a known prefix and ``part.``, without it."""
    for prefix in (f"{wrapper}{part}." for wrapper in ("", *PREFIXES)):
        inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if inner:
            return inner
    return {}


def _descend(file: Path, content: Mapping[Any, Any], shapes: Mapping[str, Size], entry: str) -> _State:
    """The tensors in ``content`` itself, or in the entry that is meant."""
    while True:
        inner = {str(key): value for key, value in content.items() if _has_tensors(value)}
        tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
        if not inner or _covers(tensors, shapes):
            break
        known = [name for name in ENTRIES if name in inner]  # an entry may also contain nothing but the decay of an average
        fitting = [name for name in known if _contains(inner[name], shapes)]
        chosen = next(iter(fitting or known), None) or _only_entry(file, inner, shapes)
        content, entry = inner[chosen], f"{entry}/{chosen}" if entry else chosen
    if not tensors:
        types = list(dict.fromkeys(left_out(content)))
        contents = f"contains {', '.join(types[:3])} objects, and no tensors by name" if types else "does not contain a state dict"
        raise KdxError(f"{file} {contents}.", "Save the network's state_dict(), by itself or under the key state_dict or model.")
    others = [str(name) for name in content if name not in tensors]
    return _State({_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}, entry, _wrappers(tensors), others)


def _wrappers(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(match for name in names for match in _WRAPPERS.findall(name)))


def _has_tensors(value: object) -> bool:
    """Whether a value is a mapping that contains tensors by name, at any depth."""
    return isinstance(value, Mapping) and any(
        (isinstance(key, str) and isinstance(item, Tensor)) or _has_tensors(item) for key, item in value.items()
    )


def _only_entry(file: Path, inner: Mapping[str, Mapping[Any, Any]], shapes: Mapping[str, Size]) -> str:
    """The one entry that fits the network. KdxError if there are several."""
    fitting = [key for key, value in inner.items() if _covers([name for name in value if isinstance(name, str)], shapes)] or list(inner)
    if len(fitting) > 1:
        raise KdxError(
            f"{file} contains the weights of several networks: {', '.join(fitting)}.", f"Name one of them: @{file.name}#{fitting[0]}."
        )
    return fitting[0]


def _prefix_counts(names: Iterable[str], known: Collection[str]) -> Counter[str]:
    """The number of names that are in ``known`` without a prefix, by prefix."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for depth in range(len(parts)):
            if ".".join(parts[depth:]) in known:
                counts["".join(f"{part}." for part in parts[:depth])] += 1
    return counts


def _covers(names: Iterable[str], shapes: Mapping[str, Size]) -> bool:
    """Whether the names, without a common prefix, are most of the network's names."""
    counts = _prefix_counts((_WRAPPERS.sub("", name) for name in names), shapes)
    return max(counts.values(), default=0) > len(shapes) / 2


def _contains(value: Mapping[Any, Any], shapes: Mapping[str, Size]) -> bool:
    """Whether a mapping, or one inside it, `_covers` the network's names."""
    parts = (item for item in value.values() if isinstance(item, Mapping))
    return _covers([name for name in value if isinstance(name, str)], shapes) or any(_contains(part, shapes) for part in parts)


def _match_names(file: Path, state: _State, shapes: Mapping[str, Size]) -> None:
    """Change the names in ``state`` to those of the network, by removing or adding a prefix if they then match."""
    counts = _prefix_counts(state.tensors, shapes)
    if max(counts.values(), default=0) > len(shapes) / 2:
        prefix = _best_prefix(file, state, counts, shapes)
        state.ignored += [name for name in state.tensors if not name.startswith(prefix)]
        state.tensors = {name.removeprefix(prefix): tensor for name, tensor in state.tensors.items() if name.startswith(prefix)}
        state.prefixes += [prefix] if prefix else []
    else:  # the network may be inside a module of its own, which the file is not
        missing, count = max(_prefix_counts(shapes, state.tensors).items(), key=lambda item: item[1], default=("", 0))
        if missing and count > len(shapes) / 2:
            state.tensors = {f"{missing}{name}": tensor for name, tensor in state.tensors.items()}
    unused = [name for name in state.tensors if name not in shapes and _is_other(name)]
    state.ignored += unused
    for name in unused:
        del state.tensors[name]


def _is_other(name: str) -> bool:
    """Whether a name that the network does not have may be left out: a counter, or a part of another network or of a loss."""
    return bool(_NOT_WEIGHTS.search(name)) or name.startswith(OTHERS)


def _best_prefix(file: Path, state: _State, counts: Counter[str], shapes: Mapping[str, Size]) -> str:
    """The prefix with which most names, and most shapes, are those of the network, and fewest names are others; that of averaged weights
    if there are several."""

    most = max(counts.values())
    candidates = [prefix for prefix, count in counts.items() if count == most]

    def fit(prefix: str) -> tuple[int, int, int]:
        inner = tuple(other for other in candidates if other != prefix and other.startswith(prefix))  # other networks, such as a teacher
        named = {name.removeprefix(prefix): tensor for name, tensor in state.tensors.items() if name.startswith(prefix)}
        named = {name: tensor for name, tensor in named.items() if not f"{prefix}{name}".startswith(inner)}
        equal = sum(name in named and named[name].shape == shape for name, shape in shapes.items())
        # A deep teacher has all names of a shallow student, and more.
        return counts[prefix], equal, -sum(name not in shapes and not _is_other(name) for name in named)

    fits = {prefix: fit(prefix) for prefix in candidates}
    best = [prefix for prefix, value in fits.items() if value == max(fits.values())]
    averaged = [prefix for prefix in best if _EMA_PREFIX.search(prefix)]
    if "" in best or len(best) == 1:
        return "" if "" in best else best[0]
    if len(averaged) == 1:
        return averaged[0]
    names = [prefix.rstrip(".") for prefix in best]
    raise KdxError(f"{file} contains the weights of several networks: {', '.join(names)}.", f"Name one of them: @{file.name}#{names[0]}.")


def _check(file: Path, state: _State, shapes: Mapping[str, Size], *, new_head: bool) -> set[str]:
    """KdxError if tensors are missing, unknown or of other shapes. Returns the names that are not loaded: those of a new head."""
    tensors = state.tensors
    # Old files lack the batch counters of BatchNorm, which no prediction uses.
    missing = [name for name in shapes if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in shapes]
    differing = [name for name, shape in shapes.items() if name in tensors and tensors[name].shape != shape]
    head = next(reversed(list(shapes)), "").rpartition(".")[0]
    if not unexpected and all(name.rpartition(".")[0] == head for name in (*missing, *differing)):
        if new_head:
            return {*missing, *differing}
        if differing and not missing:
            _refuse_head(file, head, tensors[differing[0]].shape, shapes[differing[0]])
    rows = [f"{name} is {list(tensors[name].shape)} in the file and {list(shapes[name])} in the network" for name in differing]
    faults = [_excerpt("it lacks", missing), _excerpt("it also has", unexpected), _excerpt("shapes differ:", rows)]
    if any(faults):
        raise KdxError(
            f"{file} does not contain this network's weights: {'; '.join(filter(None, faults))}.",
            "Name the architecture the weights were saved from, with its arguments (such as the number of classes).",
        )
    return set()


def _refuse_head(file: Path, head: str, stored: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise KdxError for weights that differ from the network only in the number of classes."""
    if list(stored[1:]) == list(wanted[1:]):
        raise KdxError(
            f"{file} fits the network except for the number of classes: {head} is for {stored[0]} in the file and for {wanted[0]} in the "
            f"network (shapes differ: {list(stored)} and {list(wanted)}).",
            "Add ,new_head=true before the @ to keep the other weights and start with a new, random head, which then needs training.",
        )


def _excerpt(heading: str, items: Sequence[str], count: int = 3) -> str:
    if not items:
        return ""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return f"{heading} {', '.join(items[:count])}{more}"


def _unused(names: Sequence[str]) -> str:
    """The names that are not used, or the numbers of them by network if there are many."""
    groups = Counter(name.removeprefix("module.").split(".")[0] for name in names)
    if len(names) <= 3 or len(groups) == len(names):
        return _excerpt("not used:", names)
    return _excerpt("not used:", [f"{group} ({count} {'entry' if count == 1 else 'entries'})" for group, count in groups.items()])


def _note(file: Path, content: Mapping[Any, Any], state: _State, skipped: Collection[str]) -> str:
    """One line about the entry, the prefix and what was not used."""
    parts = []
    top = state.entry.split("/")[0]
    if state.entry and top not in ("state_dict", "model"):
        others = [name for name in ENTRIES if name != top and _has_tensors(content.get(name))]
        kind = "the averaged weights (EMA)" if top in AVERAGED_ENTRIES else "the entry"
        parts.append(f"{kind} {state.entry}" + (f" instead of {', '.join(others)}" if others else ""))
    if state.prefixes:
        averaged = " (EMA)" if any(map(_EMA_PREFIX.search, state.prefixes)) else ""
        parts.append(f"names without {' and '.join(map(repr, dict.fromkeys(state.prefixes)))}{averaged}")
    if state.ignored:
        parts.append(_unused(state.ignored))
    if skipped:
        parts.append(f"a new head: {', '.join(sorted(skipped))}")
    return f"Weights of {file.name}: {'; '.join(parts)}." if parts else ""
