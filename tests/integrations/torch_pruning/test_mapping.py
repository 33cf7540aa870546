from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.integrations.torch_pruning.mapping import BarrierError, Place, reshaped


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Two shapes of as many elements: neighbouring factors joined in two ways; and a dimension of the first."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 4]), min_size=1, max_size=5))

    def joined() -> tuple[int, ...]:
        shape = [factors[0]]
        for factor in factors[1:]:
            if draw(st.booleans()):
                shape[-1] *= factor
            else:
                shape.append(factor)
        return tuple(shape)

    before, after = joined(), joined()
    return before, after, draw(st.integers(0, len(before) - 1))


@settings(max_examples=150, deadline=None)
@given(reshapes())
def test_a_reshape_moves_channels_as_it_moves_elements(
    case: tuple[tuple[int, ...], tuple[int, ...], int],
) -> None:
    before, after, dim = case
    line = np.arange(before[dim])
    whole = np.broadcast_to(np.moveaxis(line.reshape(-1, *[1] * (len(before) - 1)), 0, dim), before).reshape(
        after
    )
    varying = [axis for axis in range(len(after)) if (whole != whole.take([0], axis)).any()]
    try:
        found = reshaped(before, after, Place(False, 0, dim, line))
    except BarrierError:
        found = None
    if found is None:
        assert len(varying) > 1
        return
    if not found:  # a dimension of size 1 that is gone
        assert before[dim] == 1
        return
    ((axis, labels),) = found
    assert varying in ([axis], [])
    shape = [1] * len(after)
    shape[axis] = -1
    assert (np.broadcast_to(labels.reshape(shape), after) == whole).all()


class Through(nn.Module):
    """A layer, an operation on tokens ``(B, 6, 8)``, and a layer that reads its last dimension."""

    def __init__(self, operation: object, width: int = 8) -> None:
        super().__init__()
        self.first, self.last, self.operation = nn.Linear(5, 8), nn.Linear(width, 4), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self.first(x)))


def member_of(operation: object, width: int = 8) -> tuple[str, list[list[int]]]:
    graph = PruningGraph(Through(operation, width), (torch.zeros(1, 6, 5),))
    group = next(group for group in graph.groups if group.name == "first")
    places = [[m.index.tolist(), m.unit.tolist()] for m in group.members if m.module == "last"]
    return group.protected, places[0] if places else []


KEEP = [list(range(8)), list(range(8))]


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.transpose(1, 2).transpose(1, 2),
        lambda x: x.view(1, 2, 3, 8).permute(0, 2, 1, 3).reshape(1, 6, 8),  # windows
        lambda x: torch.cat([x[:, :1], x], 1),  # a token before the others
        lambda x: torch.roll(x, 2, 1).flip(1),
        lambda x: x[:, torch.tensor([3, 1, 2])],
        lambda x: x.mean(1, keepdim=True) * x.softmax(1),
        lambda x: torch.stack([x, x], 1).sum(1),
        lambda x: x.unsqueeze(0).expand(3, 1, 6, 8)[1],
        lambda x: torch.nn.functional.pad(x, (0, 0, 1, 2)),
        lambda x: torch.eye(6).requires_grad_() @ x,
        lambda x: x.unbind(1)[2][None],
    ],
)
def test_what_moves_tokens_leaves_channels_in_place(operation: object) -> None:
    assert member_of(operation) == ("", KEEP)


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda x: x.softmax(-1), "'softmax'"),
        (lambda x: x - x.mean(-1, keepdim=True), "'mean' runs over its channels"),
        (lambda x: x @ x.transpose(1, 2) @ x, "sums over its channels"),
        (lambda x: x.view(1, 6, 4, 2).transpose(2, 3).reshape(1, 6, 8), "spread over several dimensions"),
        (lambda x: x[..., 2:].repeat(1, 1, 2)[..., :8], "split, at places that pruning would move"),
        (lambda x: x.sort(-1)[0], "'sort', an operation without a rule"),
    ],
)
def test_what_mixes_channels_protects_them(operation: object, reason: str) -> None:
    assert reason in member_of(operation)[0]


def test_channels_repeated_and_joined() -> None:
    assert member_of(lambda x: torch.cat([x, x], -1), 16)[1] == [
        [c for pair in zip(range(8), range(8, 16), strict=True) for c in pair],
        [c // 2 for c in range(16)],
    ]
    assert sorted(member_of(lambda x: x.repeat(1, 1, 2), 16)[1][0]) == list(range(16))
