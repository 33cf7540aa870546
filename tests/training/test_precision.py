from __future__ import annotations

import pytest
import torch
from torch import nn

from dscore_plugin.errors import TrainingError
from dscore_plugin.training import precision as room
from dscore_plugin.training.precision import choose_device, choose_precision, has_bfloat16, set_memory_format

CPU = torch.device("cpu")


def test_auto_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported in (True, False):
        monkeypatch.setattr(room, "has_bfloat16", lambda device, supported=supported: supported)
        assert choose_precision("auto", CPU).bfloat16 is supported
        assert not choose_precision("float32", CPU).bfloat16


def test_one_process_computes_where_the_user_says_and_several_where_the_launcher_does() -> None:
    gpu, first, second = (torch.device(name) for name in ("cuda", "cuda:0", "cuda:1"))
    assert choose_device(None, second, 2) == choose_device(gpu, second, 2) == second
    assert choose_device(CPU, first, 1) == CPU
    for wanted in (CPU, first):
        with pytest.raises(TrainingError, match="2 processes, of which this one has 'cuda:1'"):
            choose_device(wanted, second, 2)


def test_bfloat16_is_refused_where_it_does_not_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "has_bfloat16", lambda device: False)
    with pytest.raises(TrainingError, match="precision='bfloat16' needs"):
        choose_precision("bfloat16", CPU)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx512_f": True}, False)],
)
def test_a_cpu_needs_instructions_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_bfloat16(CPU) is expected


def test_a_gpu_does_not_count_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not has_bfloat16(torch.device("cuda"))
    assert not has_bfloat16(torch.device("mps"))


def test_memory_format_goes_there_and_back_and_leaves_other_ranks_alone() -> None:
    model = nn.ModuleList([nn.Conv2d(4, 6, 3), nn.Conv3d(4, 6, 3), nn.Linear(3, 2)])
    before = [parameter.detach().clone() for parameter in model.parameters()]
    set_memory_format(model, torch.channels_last)
    assert not model[0].weight.is_contiguous()
    set_memory_format(model, torch.contiguous_format)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert parameter.is_contiguous()
        assert parameter.equal(value)


def test_images_that_are_no_images_are_not_laid_out_anew() -> None:
    vectors = torch.randn(4, 7)
    assert choose_precision("float32", CPU).place(vectors) is vectors
