"""Maps: UniCAM, Grad-CAM, HiResCAM and salient images."""
