"""Feature maps of any modules over many images, in bounded memory.

All maps at once rarely fit: 5,184 images and the 27 branches of a CIFAR ResNet-56 make 5.4 GB. So the network runs
over the images several times, as few times as the limit allows, and each pass keeps an equal part of the elements, in
the order of the modules; a map that does not fit into what is left of a pass is cut and goes on in the next.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dscore_plugin.errors import CriterionError, ModelError
from dscore_plugin.modes import in_eval_mode
from dscore_plugin.training.evaluation import check_logits, require_images
from dscore_plugin.training.progress import NoProgress, Progress

if TYPE_CHECKING:
    from dscore_plugin.datasets import ImageSet

MEMORY_LIMIT = 2**31  # 2 GiB
_BYTES = 4  # of a float32


@dataclass(frozen=True)
class Slice:
    """Some elements of a module's flattened feature map: ``start`` to ``stop`` of ``size``."""

    module: str
    start: int
    stop: int
    size: int

    @property
    def is_last(self) -> bool:
        """Whether the map ends here."""
        return self.stop == self.size


@dataclass(frozen=True)
class FeatureMaps:
    """A slice of a module's feature maps, over all images.

    Attributes:
        place: which slice.
        values: shape ``(n, stop - start)``, float32, on the network's device.
        predicted: the class that the network gives each image, int64, shape ``(n,)``, on the CPU.
    """

    place: Slice
    values: Tensor
    predicted: Tensor


def feature_map_sizes(
    model: nn.Module, example_inputs: tuple[Any, ...], modules: Sequence[str]
) -> dict[str, int]:
    """Return how many elements the outputs of ``modules`` have for one image; the network is left as it was.

    Raises:
        ModelError: if the network does not run, or a module is not called exactly once or gives no tensor.
    """
    sizes: dict[str, int] = {}

    def note(name: str, output: Tensor) -> None:
        if name in sizes:
            raise ModelError(f"{name!r} is called more than once; its feature map is not defined")
        sizes[name] = output.numel() // len(output)

    with torch.no_grad(), in_eval_mode(model), _hooked(model, modules, note):
        try:
            model(*example_inputs)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{type(model).__name__} does not run: {error}") from error
    missing = next((name for name in modules if name not in sizes), None)
    if missing is not None:
        raise ModelError(f"{missing!r} is not called in forward(); its feature map is not defined")
    return {name: sizes[name] for name in modules}


def divide(sizes: Mapping[str, int], images: int, memory_limit: int = MEMORY_LIMIT) -> list[list[Slice]]:
    """Divide feature maps among passes, as few as can be.

    Args:
        sizes: elements of each module's map for one image.
        images: how many.
        memory_limit: bytes that the maps of one pass may take.

    Returns:
        For each pass its slices; a module's slices follow each other.

    Raises:
        CriterionError: if the limit has no room for a single element of all images.
    """
    room = memory_limit // (_BYTES * images)
    if room < 1:
        raise CriterionError(
            f"memory_limit {memory_limit} has no room for one element of {images} images; give "
            f"{_BYTES * images} bytes or more"
        )
    total = sum(sizes.values())
    room = math.ceil(total / max(1, math.ceil(total / room)))  # no pass fuller than it needs to be
    passes: list[list[Slice]] = [[]]
    left = room
    for module, size in sizes.items():
        start = 0
        while start < size:
            if not left:
                passes.append([])
                left = room
            stop = min(size, start + left)
            passes[-1].append(Slice(module, start, stop, size))
            left -= stop - start
            start = stop
    return passes if passes[0] else []


def feature_maps(
    model: nn.Module,
    images: ImageSet,
    sizes: Mapping[str, int],
    *,
    memory_limit: int = MEMORY_LIMIT,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> Iterator[FeatureMaps]:
    """Run a network over images, in eval mode and float32, and give the outputs of some of its modules.

    At most ``memory_limit`` bytes of feature maps are held at a time, on the network's device, if the caller lets go
    of each before it asks for the next; besides them one batch and what the network needs for it. Hooks are set for
    the length of a pass only, and removed also when an exception passes through.

    Args:
        model: a classifier; its modes are restored after each pass. Weights of other types are run as a float32 copy.
        images: in the order of the result; an augmented set must be drawn as it is for all passes to agree.
        sizes: the modules and the elements of their maps, from :func:`feature_map_sizes`.
        memory_limit: bytes; a larger limit needs fewer passes.
        batch_size: images at a time.
        progress: shows a bar.

    Yields:
        Slices in the order of the modules.

    Raises:
        DataError: if there are no images.
        ModelError: if the network gives no logits for the labels.
        CriterionError: if the memory limit is too small.
    """
    require_images(images)
    model = _in_float32(model)
    passes = divide(sizes, len(images), memory_limit)
    loader = images.loader(batch_size)
    with (progress or NoProgress()).task("feature maps", len(passes) * len(loader)) as advance:
        for slices in passes:
            kept, predicted = _run_pass(model, images, slices, loader, advance)
            for place in slices:
                yield FeatureMaps(place, kept.pop(place.module), predicted)


def _in_float32(model: nn.Module) -> nn.Module:
    """Return the network itself, or a copy where it computes in another type."""
    numbers = (t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    return model if all(dtype == torch.float32 for dtype in numbers) else copy.deepcopy(model).float()


def _run_pass(
    model: nn.Module, images: ImageSet, slices: Sequence[Slice], loader: Any, advance: Callable[..., None]
) -> tuple[dict[str, Tensor], Tensor]:
    """Keep the slices of one pass, and the predicted classes."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    places = {place.module: place for place in slices}  # a pass holds one slice of a module at most
    kept = {
        name: torch.empty(len(images), place.stop - place.start, device=device)
        for name, place in places.items()
    }
    predicted, row = [], 0

    def keep(name: str, output: Tensor) -> None:
        place = places[name]
        flat = output.flatten(1)[:, place.start : place.stop]
        kept[name][row : row + len(output)] = flat

    precise = torch.autocast(device.type, enabled=False)
    with torch.inference_mode(), precise, in_eval_mode(model), _hooked(model, list(places), keep):
        for inputs, labels in loader:
            logits = check_logits(model(inputs.to(device)), labels)
            predicted.append(logits.argmax(dim=1).cpu())
            row += len(inputs)
            advance(1)
    return kept, torch.cat(predicted).clone()


@contextmanager
def _hooked(model: nn.Module, modules: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show the output of each module to ``see`` while the context lasts."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def show(_: nn.Module, __: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise ModelError(f"{name!r} gives a {type(output).__name__}; expected a tensor")
            see(name, output)

        return show

    with ExitStack() as stack:
        for name in modules:
            stack.callback(model.get_submodule(name).register_forward_hook(hook(name)).remove)
        yield
