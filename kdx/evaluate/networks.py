"""The networks of a run, loaded again."""

from __future__ import annotations

from pathlib import Path

from kdx.errors import KdxError
from kdx.models.layer_pairs import LayerNames
from kdx.models.models_file import ModelsFile, read_models
from kdx.models.network import Network
from kdx.remote import is_url
from kdx.roles import READING_ORDER
from kdx.runs.record import RunRecord
from kdx.runtimes.choice import is_file

_SEED = 1_000_003
"""Added to the seed of random weights, so that they are not those with which a training of a small seed began."""


def load_networks(run: RunRecord, models: Path | None) -> dict[str, Network]:
    """The networks of the run's roles, in eval mode, with the run's weights.

    models: the models file; by default the one that the run's manifest names. Raises KdxError where that is not known or not there, for
    networks in exported files, which have no gradients, and for other weights than those of the run.
    """
    file = read_models(_recorded_models(run) if models is None else models)
    networks = {}
    for role in run.roles:
        networks[role] = _load(file, role)
        if networks[role].weights_hash != run.manifest["configuration"]["models"][role]["sha256"]:
            raise KdxError(
                f"The {role} that {file.path} names has other weights than the run's.", "Give the models file of the run with --models."
            )
    return networks


def load_untrained(run: RunRecord, models: Path | None, role: str, seed: int) -> Network:
    """The architecture of a role with random weights (`kdx.models.untrained`); each role has its own. models: as in `load_networks`.

    Raises KdxError where kdx does not know how the architecture is initialised.
    """
    file = read_models(_recorded_models(run) if models is None else models)
    try:
        return file.untrained(_SEED + seed * len(READING_ORDER) + READING_ORDER.index(role), role)
    except KdxError as error:
        raise KdxError(f"There are no random weights for the {role}: {error.problem}", "Name other metrics with --metric.") from error


def layer_names(run: RunRecord) -> dict[str, LayerNames]:
    """The name that each role's network has for the layers of a run, by the student's."""
    base = run.manifest["configuration"].get("base_layers", {})
    return {layer: LayerNames(layer, base.get(layer, layer), teacher) for layer, teacher in run.layers.items()}


def _recorded_models(run: RunRecord) -> Path:
    """The models file that the manifest names, from the run's folder, or else the one in the run's command."""
    recorded = run.manifest.get("models_file")
    folder = Path() if is_url(run.folder) else run.folder  # a run at a URL records the absolute path
    if recorded is not None and (path := (folder.resolve() / recorded).resolve()).is_file():
        return path
    for word, value in zip(run.command, [*run.command[1:], ""], strict=True):
        name, equals, rest = word.partition("=")
        if name == "--models" and (rest or value):
            path = Path(rest if equals else value)
            if path.suffix == ".toml" and path.is_file():
                return path
            recorded = recorded or str(path)
    if recorded is None:
        raise KdxError("The run's manifest does not name its models file.", "Name it with --models.")
    raise KdxError(f"The run names {recorded}, which is not an existing models file (.toml).", "Name it with --models.")


def _load(file: ModelsFile, role: str) -> Network:
    if role in file.references and is_file(file.references[role]):
        raise KdxError(f"The {role} is an exported file, which has no gradients.", "Give a models file with the networks themselves.")
    return file.load(role)
