"""A pruned model as a folder: safetensors for the weights, JSON for the structure, never pickle."""

from dscore_plugin.artifact.saving import METRICS, load_pruned, read_structure, save_pruned
from dscore_plugin.artifact.structure import STRUCTURE, WEIGHTS

__all__ = ["METRICS", "STRUCTURE", "WEIGHTS", "load_pruned", "read_structure", "save_pruned"]
