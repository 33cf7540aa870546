"""Paper-faithful pruning criteria for Torch-Pruning, NNI and timm."""
