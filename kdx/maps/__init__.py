"""Maps over images: UniCAM, Grad-CAM and HiResCAM; salient images."""
