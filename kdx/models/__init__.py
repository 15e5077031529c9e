"""Networks: model references, weights, layers worth explaining, and the models file."""

import warnings
from typing import TYPE_CHECKING

from kdx.models.models_file import ModelsFile, as_network, read_models, write_models
from kdx.models.network import Network, layers, load, untrained, weights_hash
from kdx.models.reference import ModelReference, file_name, parse_reference
from kdx.models.weights import load_weights

__all__ = [
    "ModelReference",
    "ModelsFile",
    "Network",
    "as_network",
    "file_name",
    "layers",
    "load",
    "load_weights",
    "parse_reference",
    "read_models",
    "untrained",
    "weights_hash",
    "write_models",
]

if not TYPE_CHECKING:  # type checkers would accept any name otherwise

    def __getattr__(name: str) -> object:
        """`ModelReference` under its old name."""
        if name != "Reference":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        warnings.warn("kdx.models.Reference is now kdx.models.ModelReference", DeprecationWarning, stacklevel=2)
        return ModelReference
