"""What a sparsity regulariser must offer to the training loop."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn


class Regularizer(Protocol):
    """Something that acts on the gradients of every step, and looks at the weights once per epoch.

    Under several processes every process calls it with the same weights and the same (averaged) gradients,
    so it must be a pure function of them and of its own state.
    """

    def after_backward(self, model: nn.Module) -> None:
        """Change gradients in place; called between the backward pass and the optimiser's step."""
        ...

    def end_epoch(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """Close an epoch, before it is evaluated and saved.

        Args:
            model: the model with the weights of the epoch's last step; may be changed in place.
            epoch: counted from 0.

        Returns:
            Numbers for the history, by name.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs: finite numbers, text, lists, and dictionaries with text keys."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        ...
