"""What the networks of this package share: the classifier head as timm expects to find it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin.errors import ModelError


class ImageClassifier(nn.Module):
    """A convolutional network with global average pooling and one linear classifier.

    Subclasses build their layers, then call :meth:`reset_classifier`; they write :meth:`forward_features`.

    Attributes:
        classifier_name: the attribute that holds the classifier.
        num_features: width of the pooled embedding of the network as built.
        num_classes: outputs of the classifier; 0 means that the network returns the embedding.
        drop_rate: dropout in front of the classifier.
    """

    classifier_name: ClassVar[str] = "classifier"

    def __init__(self, num_features: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.num_features = num_features
        self.drop_rate = drop_rate

    def get_classifier(self) -> nn.Module:
        """Return the classifier: a linear layer, or an identity where there are no classes."""
        return getattr(self, self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one that fits the network as it is now, pruned or not.

        Args:
            num_classes: outputs; 0 removes the classifier.
            global_pool: timm's argument; only ``"avg"`` (or None) is to be had.

        Raises:
            ModelError: if ``num_classes`` is negative or another pooling is asked for.
        """
        if num_classes < 0:
            raise ModelError(f"num_classes is {num_classes}; expected 0 (no classifier) or more")
        if global_pool not in (None, "avg"):
            raise ModelError(f"global_pool {global_pool!r} is not to be had here; expected 'avg'")
        current = getattr(self, self.classifier_name, None)
        if isinstance(current, nn.Linear):
            self.num_features = current.in_features
        self.num_classes = num_classes
        fresh = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        setattr(self, self.classifier_name, fresh)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last feature map, ``(B, C, H, W)`` images to ``(B, num_features', h, w)``."""
        raise NotImplementedError

    def embed(self, features: Tensor) -> Tensor:
        """Turn the last feature map into the embedding, ``(B, num_features)``."""
        return functional.adaptive_avg_pool2d(features, 1).flatten(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute the logits ``(B, num_classes)`` of a feature map, or its embedding if ``pre_logits``."""
        x = self.embed(x)
        if pre_logits:
            return x
        return self.get_classifier()(functional.dropout(x, self.drop_rate, self.training))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits ``(B, num_classes)`` of images ``(B, C, H, W)``."""
        return self.forward_head(self.forward_features(x))


def pretrained_cfg(
    input_size: tuple[int, int, int],
    num_classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    first_conv: str,
    classifier: str,
) -> dict[str, Any]:
    """Describe a network to timm: what it takes, how its input is normalised, where its ends are."""
    return {
        "input_size": input_size,
        "num_classes": num_classes,
        "mean": mean,
        "std": std,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "first_conv": first_conv,
        "classifier": classifier,
    }
