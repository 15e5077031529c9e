"""The design of a study: the axes of its grid, and how its networks are trained and explained. It is read from a TOML file and flags."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdx.data.dataset import source_of
from kdx.disk import parse_toml
from kdx.distill import TrainingSettings
from kdx.errors import KdxError, first_line
from kdx.models.reference import parse_reference
from kdx.runs.plan import RunOptions
from kdx.study.options import TrainingExtras, check_keys, run_options_of, training_of, value_of

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""A name of a network or a data set. It is a part of paths and keys."""

_KEYS = ("preset", "data", "images", "teachers", "assistants", "students", "methods", "seeds", "layers", "training", "explain")
_NETWORKS = ("teachers", "assistants", "students")
_DATA_KEYS = ("reference", "training", "explain")


@dataclass(frozen=True)
class DataSet:
    """A data set of a study: its reference, and the entries of [training] and [explain] that apply to it alone."""

    reference: str
    training: Mapping[str, Any] = field(default_factory=dict)
    explain: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Design:
    """What a study trains and explains: every teacher with every student, method, seed and data set.

    data, teachers, assistants, students: by name; networks are model references. methods: by name, as ``kdx distill --method`` takes
    them. An assistant stands between each teacher that has more parameters and each student that has fewer; these students are also
    trained without it. seeds: of the trainings. images: if it is not None, only this many images of each data set are used, balanced over
    the classes. layers: pairs of layers as ``--layer`` takes them; without any, `kdx.distill.distill` chooses them. training, explain:
    the tables of the file, with options by the names of `TrainingSettings` and `RunOptions`.
    """

    data: Mapping[str, DataSet]
    teachers: Mapping[str, str]
    students: Mapping[str, str]
    methods: Mapping[str, str]
    seeds: tuple[int, ...]
    assistants: Mapping[str, str] = field(default_factory=dict)
    images: int | None = None
    layers: tuple[str, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    explain: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every option, so that an error in the last cell does not appear after hours. Raises KdxError."""
        for axis in ("data", "teachers", "students", "methods", "seeds"):
            if not getattr(self, axis):
                raise KdxError(f"The study has no {axis}.", f"Give at least one: {_EXAMPLES[axis]}.")
        both = (self.teachers.keys() | self.students.keys()) & self.assistants.keys()
        for name in both:
            references = {group[name] for group in (self.teachers, self.students, self.assistants) if name in group}
            if len(references) > 1:
                raise KdxError(f"The name {name!r} stands for {len(references)} networks.", "Give each network a name of its own.")
        for data in self.data:
            for method in self.methods:
                self.training_of(data, method, self.seeds[0])
        if len({self.run_options_of(data).confidence for data in self.data}) > 1:
            raise KdxError("The data sets have different values of explain.confidence.", "Give one in [explain]; the page has one level.")

    def reference_of(self, data: str) -> str:
        """The data reference of the images that are used."""
        reference = self.data[data].reference
        return reference if self.images is None else f"sample:{self.images}:{reference}"

    def training_of(self, data: str, method: str | None, seed: int) -> tuple[TrainingSettings, TrainingExtras]:
        """How the networks of a cell are trained. method: the name in the study, or None where no student is trained."""
        where = f"data.{data}.training" if self.data[data].training else "training"
        table = {**self.training, **self.data[data].training}
        return training_of(table, None if method is None else self.methods[method], seed, where)

    def run_options_of(self, data: str) -> RunOptions:
        """How the cells of a data set are explained."""
        where = f"data.{data}.explain" if self.data[data].explain else "explain"
        extras = self.training_of(data, None, self.seeds[0])[1]
        return run_options_of({**self.explain, **self.data[data].explain}, extras.base, where)

    def as_table(self) -> dict[str, Any]:
        """The resolved contents of a study file, in the types of JSON. `design_of` makes an equal design from it."""
        return {
            "data": {
                name: {"reference": entry.reference, "training": dict(entry.training), "explain": dict(entry.explain)}
                for name, entry in self.data.items()
            },
            **({} if self.images is None else {"images": self.images}),
            **{group: dict(getattr(self, group)) for group in _NETWORKS},
            "methods": dict(self.methods),
            "seeds": list(self.seeds),
            "layers": list(self.layers),
            "training": dict(self.training),
            "explain": dict(self.explain),
        }


_EXAMPLES = {
    "data": "--data digits",
    "teachers": "--teacher large=timm:resnet50",
    "students": "--student small=timm:resnet18",
    "methods": "--method kd",
    "seeds": "--seeds 3",
}


def design_of(content: Mapping[str, Any]) -> Design:
    """The design in the contents of a study file.

    ``data``, ``methods`` and the networks are tables of names and references, or lists of references, which then get names. ``seeds`` is a
    list, or a number of seeds from 0 on. Raises KdxError for an unknown key, a wrong type, and a name or an option that is not valid.
    """
    check_keys(content, _KEYS, "")
    tables = {key: value_of_table(content.get(key, {}), key) for key in ("training", "explain")}
    return Design(
        data=_data_sets(content.get("data", {})),
        **{group: named(content.get(group, {}), group) for group in _NETWORKS},
        methods=named(content.get("methods", {}), "methods"),
        seeds=_seeds(content.get("seeds", 1)),
        images=None if "images" not in content else _images(content["images"]),
        layers=value_of(tuple[str, ...], content.get("layers", []), "layers"),
        **tables,
    )


def read_design(path: Path) -> dict[str, Any]:
    """The contents of a study file. Raises KdxError for a file that is missing or is not TOML."""
    try:
        return parse_toml(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise KdxError(f"The study file {path} cannot be read: {reason}.", "docs/studies.md has an example.") from error


def value_of_table(value: Any, name: str) -> dict[str, Any]:
    """The value if it is a table; otherwise KdxError."""
    if not isinstance(value, dict):
        raise KdxError(f"{name} cannot be {value!r}.", f"Write a table: [{name}], and its entries below.")
    return value


MAX_SEEDS = 10_000
"""The most seeds of a study. Without a limit, a mistyped number would take all memory."""


def _images(value: Any) -> int:
    images: int = value_of(int, value, "images")
    if images < 1:
        raise KdxError(f"images cannot be {images}.", "Give the number of images of each data set.")
    return images


def _seeds(value: Any) -> tuple[int, ...]:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if is_count and value > MAX_SEEDS:
        raise KdxError(f"A study cannot have {value} seeds.", f"Give at most {MAX_SEEDS}.")
    seeds = tuple(range(value)) if is_count else value_of(tuple[int, ...], value, "seeds")
    if len(set(seeds)) < len(seeds) or min(seeds, default=0) < 0 or max(seeds, default=0) >= 2**32:
        raise KdxError(f"seeds cannot be {value!r}.", "Give a number of seeds, or a list of different numbers from 0 to 4294967295.")
    return tuple(seeds)


def _data_sets(value: Any) -> dict[str, DataSet]:
    references = value if isinstance(value, dict) else named(value, "data")
    entries = {}
    for name, entry in references.items():
        _check_name(name, "data")
        if isinstance(entry, str):
            entries[name] = DataSet(entry)
            continue
        check_keys(value_of_table(entry, f"data.{name}"), _DATA_KEYS, f"data.{name}")
        if "reference" not in entry:
            raise KdxError(f"The data set {name} of the study has no reference.", f"Name it: --data {name}=FOLDER, or a key reference.")
        tables = [value_of_table(entry.get(key, {}), f"data.{name}.{key}") for key in ("training", "explain")]
        entries[name] = DataSet(value_of(str, entry["reference"], f"data.{name}.reference"), *tables)
    return entries


def named(value: Any, group: str) -> dict[str, str]:
    """The references of a table, or of a list, by name."""
    if isinstance(value, dict):
        for name, reference in value.items():
            _check_name(name, group)
            value_of(str, reference, f"{group}.{name}")
        return dict(value)
    references = value_of(tuple[str, ...], value, group)
    return with_names(((None, reference) for reference in references), group)


def _check_name(name: str, group: str) -> None:
    if not NAME.fullmatch(name) and not (group == "methods" and name):
        raise KdxError(
            f"{name!r} in {group} cannot be a name.", "Use letters, digits, '-', '_' and '.', and begin with a letter or a digit."
        )


def with_names(entries: Iterable[tuple[str | None, str]], group: str) -> dict[str, str]:
    """The references by name. One without a name gets a name from its reference. Raises KdxError for a name that occurs twice."""
    named: dict[str, str] = {}
    for given, reference in entries:
        name = given or default_name(reference, group)
        if name in named:
            raise KdxError(f"The name {name!r} occurs twice in {group}.", "Give each entry a name of its own: NAME=REFERENCE.")
        _check_name(name, group)
        named[name] = reference
    return named


def default_name(reference: str, group: str) -> str:
    """A name for a reference: the method itself, the source or the file of a data set, or the architecture of a network."""
    if group == "methods":
        return reference
    if group == "data":
        source = source_of(reference)
        if source == "sample":
            return default_name(reference.split(":", 2)[2], group)
        text = source if source in ("digits", "cifar10", "cifar100") else Path(reference.removeprefix(f"{source}:")).stem
    else:
        parsed = parse_reference(reference)
        arguments = "".join(f"-{key}{value}" for key, value in parsed.arguments.items() if key not in ("pretrained", "new_head"))
        text = (Path(parsed.name).stem if parsed.source in ("hf", "pt2") else parsed.name) + arguments
    return slug(text)


def split_name(text: str) -> tuple[str | None, str]:
    """``NAME=REFERENCE`` as its parts; the name is None where the text before the first = cannot be one, as in ``kdx:resnet,width=8``."""
    name, equals, reference = text.partition("=")
    return (name, reference) if equals and NAME.fullmatch(name) and reference else (None, text)


def slug(text: str) -> str:
    """The text with only characters that a folder's name may have on every system."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-.") or "unnamed"


def parse_setting(text: str) -> tuple[list[str], Any]:
    """``KEY.KEY=VALUE`` of the command line: the keys, and the value as TOML, or as text if it is not TOML. Raises KdxError without =."""
    name, equals, value = text.partition("=")
    keys = [
        key.strip().replace("-", "_") if place != 1 or name.split(".")[0] != "data" else key.strip()
        for place, key in enumerate(name.split("."))
    ]
    if not equals or not all(keys):
        raise KdxError(f"{text!r} is not a setting.", "Write KEY=VALUE, such as --set training.epochs=10.")
    try:
        return keys, parse_toml(f"value = {value}")["value"]
    except ValueError:
        return keys, value.strip()


def set_value(content: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set an entry of nested tables, which are created where they are missing."""
    for place, key in enumerate(keys[:-1]):
        content = value_of_table(content.setdefault(key, {}), ".".join(keys[: place + 1]))
    content[keys[-1]] = value
