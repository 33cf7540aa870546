"""Every backend gives what the masked dense network gives; the choice between them is never a loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import Tensor, nn

from dscore_plugin.errors import PlanError
from dscore_plugin.models import create_model
from dscore_plugin.surgery import native, sparse_execution
from dscore_plugin.surgery.kernels import kernel_masks, prune_kernels
from dscore_plugin.surgery.sparse_backends import BACKENDS, SparseConv2d, usable_backends
from dscore_plugin.surgery.sparse_execution import compile_sparse

pair = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 1, 3]), st.integers(1, 5), st.integers(1, 40), pair,
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)), st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(8, 21), st.integers(8, 40)), st.sampled_from([1, 2, 17]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_backends_agree_with_dense(
    groups: int, inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int], size: tuple[int, int], images: int, bias: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    convolution = nn.Conv2d(
        groups * inputs, groups * outputs, kernel, stride, padding, dilation, groups, bias=bias
    ).eval()
    mask = torch.rand(groups * outputs, inputs) < 0.3
    mask[0, 0], mask[-1, -1] = True, outputs * inputs == 1
    convolution.weight.data *= mask[..., None, None]
    x = torch.randn(images, groups * inputs, *size)
    with torch.no_grad():
        expected = convolution(x)
        for backend in usable_backends(convolution)[1:]:
            sparse = SparseConv2d(convolution, backend)
            for _ in range(2):  # the second call takes used memory
                y = sparse(x)
            assert y.is_contiguous(), backend
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4, msg=backend)


def test_the_compiled_backend_is_offered_where_there_is_a_compiler() -> None:
    convolution = nn.Conv2d(4, 4, 3)
    assert usable_backends(convolution) == ("dense",)  # no kernel is zero
    convolution.weight.data[1] = 0
    assert usable_backends(convolution)[:3] == ("dense", "gathered", "csr")
    assert ("native" in usable_backends(convolution)) == native.has_compiler()
    convolution.double()
    assert usable_backends(convolution) == ("dense",)
    assert usable_backends(nn.Conv2d(4, 4, 3, padding="same")) == ("dense",)


def test_subclasses_with_a_forward_of_their_own_stay_dense() -> None:
    model = nn.Sequential(Conv2dSame(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    model[0].weight.data[1] = 0
    assert usable_backends(model[0]) == ("dense",)
    assert usable_backends(prune_kernels(nn.Conv2d(4, 4, 3), {"": torch.eye(4).bool()}).eval())[1:]
    x = torch.randn(1, 3, 9, 9)
    compiled = compile_sparse(model, (x,), rounds=1)
    assert not compiled.choices
    assert torch.equal(compiled(x), model(x))


@pytest.fixture(params=BACKENDS[1:])
def layers(request: pytest.FixtureRequest) -> tuple[nn.Conv2d, SparseConv2d]:
    """A convolution, and the same on one of the backends; only the first of its eight inputs are read."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 6, 3, padding=1).eval().requires_grad_(False)
    convolution.weight[1], convolution.weight[:, 3:] = 0, 0
    if request.param not in usable_backends(convolution):
        pytest.skip("no C compiler")
    return convolution, SparseConv2d(convolution, request.param)


X = torch.randn(2, 8, 9, 9)
Layers = tuple[nn.Conv2d, SparseConv2d]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_they_compute_in_their_own_type(layers: Layers, dtype: torch.dtype) -> None:
    dense, sparse = layers
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse(X.to(dtype))
    assert y.dtype is torch.float32
    torch.testing.assert_close(y, dense(X.to(dtype).float()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_another_type_they_run_dense(layers: Layers, dtype: torch.dtype) -> None:
    dense, sparse = (layer.to(dtype) for layer in layers)
    torch.testing.assert_close(sparse(X.to(dtype)), dense(X.to(dtype)))
    torch.testing.assert_close(sparse.float()(X), dense.float()(X))


@pytest.mark.parametrize("x", [X[0], X[:0], X.mT], ids=["one image", "no image", "strided"])
def test_inputs_of_every_form_are_taken(layers: Layers, x: Tensor) -> None:
    dense, sparse = layers
    torch.testing.assert_close(sparse(x), dense(x))


@pytest.mark.parametrize("x", [X[:, :4], X.repeat(1, 2, 1, 1), X.double(), X.flatten(2), X.unsqueeze(2)])
def test_what_a_convolution_refuses_is_refused(layers: Layers, x: Tensor) -> None:
    for layer in layers:
        with pytest.raises(RuntimeError):
            layer(x)


def test_maps_smaller_than_the_kernel_are_refused(layers: Layers) -> None:
    convolution = nn.Conv2d(8, 6, 5).eval()
    convolution.weight.data[1] = 0
    with pytest.raises(RuntimeError, match="greater than actual input size"):
        SparseConv2d(convolution, layers[1].backend)(X[..., :4, :4])


def test_inference_mode_leaves_nothing_behind(layers: Layers) -> None:
    dense, sparse = layers
    with torch.inference_mode():
        sparse(X)
    torch.testing.assert_close(sparse(X), dense(X))


def test_a_machine_without_a_compiler_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    native._library.cache_clear()
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    try:
        assert not native.has_compiler()
        convolution = nn.Conv2d(4, 4, 3)
        convolution.weight.data[1] = 0
        assert "native" not in usable_backends(convolution)
    finally:
        native._library.cache_clear()


def sparse_resnet() -> nn.Module:
    torch.manual_seed(0)
    model = create_model("cifar_resnet20").eval()
    shapes = {
        n: m.weight.shape[:2] for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n != "conv1"
    }
    return prune_kernels(model, {name: torch.rand(shape) < 0.05 for name, shape in shapes.items()})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_network_gives_what_the_masked_one_gives(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "native" and not native.has_compiler():
        pytest.skip("no C compiler")
    # times as if the first backend beside dense were always the best
    monkeypatch.setattr(
        sparse_execution, "_measure", lambda calls, rounds: {n: 1.0 - 0.5 * i for i, n in enumerate(calls)}
    )
    model, x = sparse_resnet(), torch.randn(3, 3, 32, 32)
    compiled = compile_sparse(model, (x,), backends=(backend,))
    chosen = {choice.backend for choice in compiled.choices.values()}
    assert chosen == ({backend} if backend != "dense" else set())
    with torch.no_grad():
        for images in (x, torch.randn(1, 3, 32, 32), torch.randn(2, 3, 40, 24)):  # other sizes, too
            torch.testing.assert_close(compiled(images), model(images), atol=1e-4, rtol=1e-4)
    assert kernel_masks(model)  # the original is left as it was


def test_what_is_not_faster_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sparse_execution, "_measure", lambda calls, rounds: {n: 1.0 + i for i, n in enumerate(calls)}
    )
    model, x = sparse_resnet(), torch.randn(1, 3, 32, 32)
    compiled = compile_sparse(model, (x,), rounds=1)
    assert {choice.backend for choice in compiled.choices.values()} == {"dense"}
    assert not any(isinstance(module, SparseConv2d) for module in compiled.modules())


def test_a_choice_tells_the_times_and_the_share_of_live_kernels() -> None:
    model, x = sparse_resnet(), torch.randn(1, 3, 32, 32)
    compiled = compile_sparse(model, (x,), rounds=1)
    mask = kernel_masks(model)["layer3.0.conv2"]
    choice = compiled.choices["layer3.0.conv2"]
    assert choice.live == pytest.approx(float(mask.float().mean()))
    assert {"dense", "csr"} <= choice.milliseconds.keys()
    assert compiled.sparse_seconds <= compiled.dense_seconds


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(PlanError, match="'cuda' is unknown; expected some of dense, gathered, csr, native"):
        compile_sparse(nn.Conv2d(3, 4, 3), (torch.zeros(1, 3, 8, 8),), backends=("cuda",))
