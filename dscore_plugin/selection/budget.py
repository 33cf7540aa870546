"""Meet a compute budget: bisect along a family of allocations, then take single channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dscore_plugin.errors import BudgetError
from dscore_plugin.groups import ScoredGroup
from dscore_plugin.selection.allocation import Counts, Limits, Path, total

Measure = Callable[[Counts], float]  # what is left of the dense network, 1.0 for nothing removed


def check_fraction(name: str, value: float) -> None:
    """Refuse a ratio or a budget outside (0, 1)."""
    if not 0 < value < 1:
        raise BudgetError(f"{name} must lie between 0 and 1 (exclusive), got {value:g}")


def meet(
    path: Path,
    measure: Measure,
    target: float,
    scored: Sequence[ScoredGroup],
    limits: Limits,
    name: str = "target_macs",
) -> Counts:
    """Find the allocation on ``path`` that meets a budget from below.

    Bisection finds two neighbours on the path, one above the budget and one below; between them single units
    leave, the lowest score first, until the budget is met. The result is therefore within one unit of it.

    Args:
        path: the family of allocations.
        measure: what an allocation leaves, as a fraction of the dense network; falls as more leaves.
        target: the fraction to keep, in (0, 1).
        scored: the groups, for the order of the single units.
        limits: what no allocation may do.
        name: of the budget, for messages.

    Returns:
        The units that leave each group.

    Raises:
        BudgetError: if the target is out of range or cannot be reached; the message names the nearest.
    """
    check_fraction(name, target)
    low, high = 0.0, 1.0
    least = measure(path.at(high))
    if least > target:
        raise BudgetError(
            f"{name} {target:g} cannot be reached: at most {1 - least:.1%} can go with these layers, min_channels and "
            f"round_to; {_nearest(least)}"
        )
    while total(path.at(low)) < total(path.at(high)) and high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if measure(path.at(middle)) <= target else (middle, high)
    return _single_steps(path.at(low), path.at(high), measure, target, scored, limits)


def meet_latency(
    path: Path, measure: Measure, target: float, tolerance: float = 0.05, tries: int = 12
) -> Counts:
    """Find the allocation on ``path`` whose measured latency is nearest to a target.

    Latency is measured, so it is noisy and falls in steps: bisection stops as soon as a measurement lies within
    the tolerance, and never takes more than ``tries`` of them.

    Args:
        path: the family of allocations.
        measure: the latency of an allocation, as a fraction of the dense network's.
        target: the fraction to keep, in (0, 1).
        tolerance: relative to the target.
        tries: measurements at most.

    Returns:
        The units that leave each group.

    Raises:
        BudgetError: if the target is out of range, or the measurement nearest to it is further than the tolerance
            away; the message names that one.
    """
    check_fraction("target_latency", target)
    low, high, seen = 0.0, 1.0, {}
    for _ in range(tries):
        middle = (low + high) / 2
        counts = path.at(middle)
        key = tuple(counts.values())
        if key not in seen:
            seen[key] = measure(counts)
        latency = seen[key]
        if abs(latency / target - 1) <= tolerance:
            return counts
        low, high = (middle, high) if latency > target else (low, middle)
    nearest = min(seen.values(), key=lambda latency: abs(latency - target))
    raise BudgetError(
        f"target_latency {target:g} cannot be reached within {tolerance:.0%} on this machine; the nearest that was "
        f"measured is {nearest:.3g}"
    )


def _single_steps(
    counts: Counts,
    most: Counts,
    measure: Measure,
    target: float,
    scored: Sequence[ScoredGroup],
    limits: Limits,
) -> Counts:
    counts = dict(counts)
    while measure(counts) > target:
        steps = {name: limits.step(name, count, most[name]) for name, count in counts.items()}
        open_ = [item for item in scored if steps[item.group.name] > counts[item.group.name]]
        if not open_:
            return dict(most)
        name = min(open_, key=lambda item: _next_score(item, counts)).group.name
        counts[name] = steps[name]
    return counts


def _next_score(item: ScoredGroup, counts: Counts) -> float:
    """Return the score of the unit that would leave next."""
    return float(item.scores[item.order[counts[item.group.name]]])


def _nearest(least: float) -> str:
    above = int(least * 1000 + 1) / 1000
    return f"the nearest is {above:g}" if above < 1 else "no more than 0.1 % can"
