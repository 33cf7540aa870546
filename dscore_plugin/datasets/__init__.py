"""Data sets by name: digits, CIFAR, SVHN and folders of images, split into training, validation and test.

Small images are decoded once and kept as bytes; a batch is cut, flipped and normalised in one go.
Augmentation is a pure function of seed, epoch and image, so that neither the batch size nor the number of
processes changes what a network is shown.
"""

from dscore_plugin.datasets.by_name import load_data
from dscore_plugin.datasets.image_set import ImageData, ImageSet, ImageSource
from dscore_plugin.datasets.packed import DIGITS_MEAN, DIGITS_STD, IMAGENET_MEAN, IMAGENET_STD

__all__ = [
    "DIGITS_MEAN",
    "DIGITS_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ImageData",
    "ImageSet",
    "ImageSource",
    "load_data",
]
