"""The papers' mathematics: tensors in, scores out; no model, no graph, no input or output."""
