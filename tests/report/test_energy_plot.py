from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from dscore_plugin.errors import PlanError
from dscore_plugin.plan import LayerRemoval, LayerRow, Plan
from dscore_plugin.report.energy_plot import plot_energy


def plan(scores: list[float | None], clusters: list[int] | None) -> Plan:
    names = [f"layer{place // 3 + 1}.{place % 3}" for place in range(len(scores))]
    rows = tuple(
        LayerRow(name, 1, score, score, None, 0, "layers") for name, score in zip(names, scores, strict=True)
    )
    made_by = {"measure": "energy", "standardize": True} | (
        {} if clusters is None else {"clusters": clusters}
    )
    return Plan("", (3, 32, 32), (LayerRemoval("layer1.1"),), rows, made_by=made_by)


@pytest.mark.parametrize("scores", [[0.1, 0.2, 0.3, 4.0], [-0.1, 0.0, 0.2, 0.3]])
def test_every_branch_is_there_with_the_number_of_its_cluster(scores, tmp_path):
    png, svg = plot_energy(plan(scores, [0, 0, 1, 2]), tmp_path / "energy")
    assert png.read_bytes().startswith(b"\x89PNG")
    namespace = "{http://www.w3.org/2000/svg}"
    texts = ["".join(node.itertext()) for node in ElementTree.parse(svg).iter(f"{namespace}text")]
    assert {"layer1.0", "layer1.1", "layer1.2", "layer2.0", "1", "2", "3"} <= set(texts)
    assert "energy scores in 3 clusters (numbered); 3 of 4 branches stay (filled)" in texts
    colours = {line.split("stroke: ")[1][:7] for line in svg.read_text().splitlines() if "stroke: #" in line}
    assert {"#1f77b4", "#ff7f0e", "#2ca02c"} <= colours


@pytest.mark.parametrize(
    ("scores", "clusters", "message"),
    [
        ([None, None], None, "no energy scores"),
        ([], [], "no energy scores"),
        ([0.1, 0.2], [0], "2 layers but clusters of 1"),
    ],
)
def test_plans_without_scores(scores, clusters, message, tmp_path: Path):
    with pytest.raises(PlanError, match=message):
        plot_energy(plan(scores, clusters), tmp_path / "energy")
