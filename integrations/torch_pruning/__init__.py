"""Torch-Pruning: DepGraph's groups, the importance classes and the removal of channels."""
