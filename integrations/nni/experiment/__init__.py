"""A search with NNI: which criterion, how the ratio is spread over the layers, and how much to remove.

``python -m dscore_plugin.integrations.nni.experiment --trials 12`` runs it on this machine. ``config.yml`` is the same
experiment for ``nnictl create``, and the place for NNI's other training services.
"""
