"""Networks: model references, weights, layers worth explaining, and the models file."""

from kdx.models.models_file import ModelsFile, read_models, write_models
from kdx.models.network import Network, as_network, layers, load, weights_hash
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
    "weights_hash",
    "write_models",
]
