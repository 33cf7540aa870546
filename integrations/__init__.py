"""The tools this package plugs into: Torch-Pruning, NNI and timm."""
