"""The usual calls of pytorch-grad-cam: GradCAM, HiResCAM, LayerCAM, GradCAM++ and UniCAM, called as ``cam(input_tensor, targets)``.

A program that uses pytorch-grad-cam needs another import and nothing else. docs/from-grad-cam.md lists the equivalents and the
differences. The maps are those of `kdx.maps`; this folder adds the calls, the sizes and the smoothing.
"""

from kdx.cam.methods import ClassifierOutputTarget, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, UniCAM
from kdx.cam.picture import show_cam_on_image

__all__ = ["ClassifierOutputTarget", "GradCAM", "GradCAMPlusPlus", "HiResCAM", "LayerCAM", "UniCAM", "show_cam_on_image"]
