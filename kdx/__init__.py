"""kdx shows what a student network learned from its teacher, and measures it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdx.distill.probe import Probe, ProbeScores, probe
    from kdx.errors import KdxError
    from kdx.explain.explainer import Explainer
    from kdx.explain.results import Explanation, LayerResult
    from kdx.maps.class_maps import ClassMaps, grad_cam, hires_cam
    from kdx.maps.decomposition import Decomposition, decompose
    from kdx.maps.earlier_layers import unicam_before
    from kdx.maps.figures import Drawable
    from kdx.maps.overlays import overlay
    from kdx.maps.salient_images import impute, salient_images, top_mask
    from kdx.maps.unicam import Maps, ReferenceSet, unicam
    from kdx.runs.opened import ImageLayer, OpenedRun, RunImage, open_run
    from kdx.scores.compare import compare
    from kdx.scores.groups import GroupContrast, GroupScores, class_scores, group_scores
    from kdx.scores.metrics import fss, partial_rs, rs
    from kdx.scores.pool import LayerScores
    from kdx.scores.score import Contrast, Score
    from kdx.scores.similarity import similarity
    from kdx.scores.similarity_result import Similarity

    __version__: str

__all__ = [
    "ClassMaps",
    "Contrast",
    "Decomposition",
    "Drawable",
    "Explainer",
    "Explanation",
    "GroupContrast",
    "GroupScores",
    "ImageLayer",
    "KdxError",
    "LayerResult",
    "LayerScores",
    "Maps",
    "OpenedRun",
    "Probe",
    "ProbeScores",
    "ReferenceSet",
    "RunImage",
    "Score",
    "Similarity",
    "class_scores",
    "compare",
    "decompose",
    "fss",
    "grad_cam",
    "group_scores",
    "hires_cam",
    "impute",
    "open_run",
    "overlay",
    "partial_rs",
    "probe",
    "rs",
    "salient_images",
    "similarity",
    "top_mask",
    "unicam",
    "unicam_before",
]

_HOMES = {
    "ClassMaps": "maps.class_maps",
    "Contrast": "scores.score",
    "Decomposition": "maps.decomposition",
    "Drawable": "maps.figures",
    "Explainer": "explain.explainer",
    "Explanation": "explain.results",
    "GroupContrast": "scores.groups",
    "GroupScores": "scores.groups",
    "ImageLayer": "runs.opened",
    "KdxError": "errors",
    "LayerResult": "explain.results",
    "LayerScores": "scores.pool",
    "Maps": "maps.unicam",
    "OpenedRun": "runs.opened",
    "Probe": "distill.probe",
    "ProbeScores": "distill.probe",
    "ReferenceSet": "maps.unicam",
    "RunImage": "runs.opened",
    "Score": "scores.score",
    "Similarity": "scores.similarity_result",
    "class_scores": "scores.groups",
    "compare": "scores.compare",
    "decompose": "maps.decomposition",
    "fss": "scores.metrics",
    "grad_cam": "maps.class_maps",
    "group_scores": "scores.groups",
    "hires_cam": "maps.class_maps",
    "impute": "maps.salient_images",
    "open_run": "runs.opened",
    "overlay": "maps.overlays",
    "partial_rs": "scores.metrics",
    "probe": "distill.probe",
    "rs": "scores.metrics",
    "salient_images": "maps.salient_images",
    "similarity": "scores.similarity",
    "top_mask": "maps.salient_images",
    "unicam": "maps.unicam",
    "unicam_before": "maps.earlier_layers",
}
"""The module of each public name. It is imported when the name is first used, since PyTorch takes seconds to load."""

_FOLDERS = (
    "callbacks",
    "cam",
    "data",
    "distill",
    "explain",
    "export",
    "features",
    "kernels",
    "losses",
    "maps",
    "models",
    "report",
    "runs",
    "runtimes",
    "scores",
)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"kdx.{_HOMES[name]}"), name)
    elif name in _FOLDERS:
        return import_module(f"kdx.{name}")
    elif name == "__version__":  # looked up on demand, since a checkout that is not installed has no version
        from importlib.metadata import version

        value = version("kdx")
    elif name == "Reference":
        import warnings

        warnings.warn("kdx.Reference is now kdx.ReferenceSet", DeprecationWarning, stacklevel=2)
        return import_module("kdx.maps.unicam").ReferenceSet
    else:
        raise AttributeError(f"module 'kdx' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
