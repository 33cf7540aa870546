"""The table and the report: right numbers, right ratios, dashes where nothing was measured."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from dscore_plugin.report.tables import metrics_table, print_metrics, report_markdown

DENSE = {
    "top1": 93.31,
    "macs": 126_600_000,
    "params": 853_018,
    "latency_ms": {"1": {"median": 8.0, "iqr": 0.4}, "64": {"median": 200.0, "iqr": 3.0}},
}
PRUNED = {
    "top1": 70.5,
    "macs": 63_300_000,
    "params": 426_509,
    "latency_ms": {"1": {"median": 5.0, "iqr": 0.25}, "64": {"median": 100.0, "iqr": 2.0}},
}
METRICS: dict[str, Any] = {
    "dense": DENSE,
    "pruned": PRUNED,
    "recalibrated": None,
    "finetuned": PRUNED | {"top1": 92.0, "latency_ms": None},
}
STRUCTURE: dict[str, Any] = {
    "format_version": 1,
    "architecture": "cifar_resnet56",
    "model_args": {"num_classes": 10},
    "input_shape": [3, 32, 32],
    "modules": {
        "layer1.0.conv1": {
            "class": "Conv2d",
            "attributes": {"out_channels": 8},
            "shapes": {"weight": [8, 16, 3, 3]},
        },
        "": {"class": "Net", "attributes": {}, "shapes": {"pos_embed": [1, 5, 8]}},
    },
    "criterion": "d_score",
    "plan": {
        "made_by": {"criterion": "d_score", "target_macs": 0.5},
        "removals": [{"layer": "layer1.0.conv1", "channels": [1, 2, 3]}, {"layer": "other", "channels": [0]}],
        "rows": [{"layer": "layer1.0.conv1", "channels": 16}],
    },
    "numbers": {
        "before": {"macs": 126_600_000, "params": 853_018},
        "after": {"macs": 63_300_000, "params": 426_509},
    },
    "versions": {"torch": "2.15.0"},
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def section(report: str, title: str) -> str:
    return report.split(f"## {title}\n\n")[1].split("\n\n## ")[0]


def rendered(metrics: dict[str, Any]) -> str:
    text = io.StringIO()
    print_metrics(metrics, "cifar_resnet56", Console(file=text, width=200))
    return text.getvalue()


def test_numbers_and_their_ratios_to_the_dense_network() -> None:
    head, _, dense, pruned, recalibrated, finetuned = section(
        report_markdown(STRUCTURE, METRICS), "Numbers"
    ).splitlines()[:6]
    assert cells(head)[1:] == [
        "top-1 (%)",
        "MACs",
        "params",
        "latency, batch 1 (ms)",
        "latency, batch 64 (ms)",
    ]
    assert cells(dense) == ["dense", "93.31", "126.6 M", "853 k", "8 ± 0.4", "200 ± 3"]
    assert cells(pruned) == [
        "pruned",
        "70.50 (-22.81)",
        "63.3 M (50.0 %)",
        "426.5 k (50.0 %)",
        "5 ± 0.25 (1.60x)",
        "100 ± 2 (2.00x)",
    ]
    assert cells(recalibrated) == ["pruned, batch norm recalibrated", *["–"] * 5]
    assert cells(finetuned)[1] == "92.00 (-1.31)"
    assert cells(finetuned)[4:] == ["–", "–"]


def test_a_sensitivity_measured_on_test_images_is_said_to_be() -> None:
    def plan(protocol: str) -> str:
        made_by = {"allocation": "sensitivity", "sensitivity": {"images": 2000, "protocol": protocol}}
        return section(report_markdown(STRUCTURE | {"plan": {"made_by": made_by}}, METRICS), "Plan")

    assert "- sensitivity: measured on 2000 test images, which the ratios therefore know" in plan("test")
    assert plan("validation").endswith("- sensitivity: measured on 2000 validation images")


def test_latencies_that_were_disturbed_are_said_to_be() -> None:
    def both(iqr: float) -> tuple[str, str]:
        metrics = METRICS | {"pruned": PRUNED | {"latency_ms": {"1": {"median": 3.0, "iqr": iqr}}}}
        text = rendered(metrics)
        return " ".join(text.split()), section(report_markdown(STRUCTURE, metrics), "Numbers")

    for text in both(0.91):
        assert "scatter by more than 30 % of their median" in text
    for text in both(0.89):
        assert "scatter" not in text


def test_terminal_table_has_the_same_cells() -> None:
    text = rendered(METRICS)
    for expected in ("cifar_resnet56", "70.50 (-22.81)", "63.3 M (50.0 %)", "2.00x", "126.6 M"):
        assert expected in text
    assert metrics_table(METRICS).row_count == 4


def test_table_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    print_metrics(METRICS)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "126.6 M" in captured.err


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        dict.fromkeys(METRICS),
        {"dense": {"top1": None, "macs": None, "params": None, "latency_ms": None}},
        {"dense": None, "pruned": PRUNED},
        {"dense": DENSE, "pruned": {"macs": 1}},
        {"dense": DENSE | {"latency_ms": {"1": {"median": 8.0, "iqr": 0.4}}}, "pruned": PRUNED},
    ],
)
def test_nulls_are_dashes(metrics: dict[str, Any]) -> None:
    assert "None" not in rendered(metrics)
    report = report_markdown(STRUCTURE | {"plan": None, "numbers": None}, metrics)
    assert "None" not in report.replace("None were measured", "")


def test_without_a_dense_network_there_are_no_ratios() -> None:
    numbers = section(report_markdown(STRUCTURE, {"pruned": PRUNED}), "Numbers")
    assert "| 70.50 | 63.3 M | 426.5 k | 5 ± 0.25 | 100 ± 2 |" in numbers


def test_without_metrics_the_counts_before_and_after_remain() -> None:
    numbers = section(report_markdown(STRUCTURE, {}), "Numbers")
    assert "| macs | 126.6 M | 63.3 M (50.0 %) |" in numbers
    assert section(report_markdown(STRUCTURE | {"numbers": None}, {}), "Numbers") == "None were measured."


def test_report_says_what_was_pruned_and_how() -> None:
    report = report_markdown(
        STRUCTURE,
        METRICS,
        sizes={"model.safetensors": 1_720_000, "metrics.json": 512},
        dense_bytes=3_430_000,
        command="dscore prune --model cifar_resnet56 --target-macs 0.5",
        folder="runs/r56",
    )
    assert report.startswith("# cifar_resnet56, pruned\n")
    assert "- criterion: `d_score`" in report
    assert "- input: 3 x 32 x 32" in report
    assert "num_classes=10" in report
    assert "- target_macs: 0.5" in section(report, "Plan")
    assert "| `layer1.0.conv1` | 16 → 13 | 3 |" in section(report, "Plan")
    assert "| `other` | – | 1 |" in section(report, "Plan")
    assert "| `layer1.0.conv1` | Conv2d | out_channels = 8 |" in section(report, "Layers")
    assert "| (the model) | Net | pos_embed = 1 x 5 x 8 |" in section(report, "Layers")
    assert "| `model.safetensors` | 1.72 MB |" in section(report, "Files")
    assert "| `metrics.json` | 512 bytes |" in section(report, "Files")
    assert "| weights of the dense network | 3.43 MB |" in section(report, "Files")
    assert "dscore prune --model cifar_resnet56 --target-macs 0.5" in section(report, "Command")
    assert 'load_pruned("runs/r56")' in section(report, "Load it again")
    assert "- torch: 2.15.0" in section(report, "Versions")
    assert report.endswith("\n")


def test_report_of_a_custom_model_says_to_give_the_dense_one() -> None:
    report = report_markdown(STRUCTURE | {"architecture": "custom"}, {})
    assert 'load_pruned("FOLDER", model=dense_model)' in report


def test_empty_parts_are_left_out() -> None:
    bare = STRUCTURE | {"modules": {}, "plan": None, "criterion": None, "input_shape": None, "numbers": None}
    report = report_markdown(bare, {})
    assert "- criterion: not recorded" in report
    assert not any(f"## {title}" in report for title in ("Plan", "Layers", "Files", "Command"))
    assert "\n\n\n" not in report


def test_pipes_do_not_break_the_tables() -> None:
    modules = {"a|b": {"class": "Conv2d", "attributes": {"groups": 2}, "shapes": {}}}
    assert "| `a\\|b` | Conv2d | groups = 2 |" in report_markdown(STRUCTURE | {"modules": modules}, {})


def test_long_times_have_no_exponent() -> None:
    slow = DENSE | {"latency_ms": {"64": {"median": 102912.4, "iqr": 1234.5}}}
    fast = PRUNED | {"latency_ms": {"64": {"median": 0.012345, "iqr": 0.001}}}
    text = report_markdown(
        STRUCTURE,
        {"dense": slow, "pruned": fast, "recalibrated": None, "finetuned": None},
        sizes={},
        command="",
        folder="x",
    )
    assert "102912 ± 1234" in text
    assert "0.0123 ± 0.001" in text
