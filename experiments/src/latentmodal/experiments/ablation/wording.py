"""Numbers and verdicts of a comparison in words, the same in every place they are shown."""

from __future__ import annotations

from latentmodal.experiments.ablation.comparison import CellSummary, Comparison, MetricInfo
from latentmodal.experiments.ablation.statistics import Difference

MISSING = "–"


def shown(value: float | None, info: MetricInfo, *, signed: bool = False) -> str:
    """A metric's value, or with `signed` a difference of two; shares and scores 100-fold."""
    if value is None:
        return MISSING
    number = value * info.factor
    digits = 2 if info.factor > 1 else 3 if abs(number) < 10 else 1
    text = f"{number:+.{digits}f}" if signed else f"{number:.{digits}f}"
    return text.replace("-", "−")


def shown_mean(cell: CellSummary, info: MetricInfo) -> str:
    """The mean over seeds and its standard error."""
    finding = cell.findings[info.name]
    if finding.standard_error is None:
        return shown(finding.mean, info)
    return f"{shown(finding.mean, info)} ± {shown(finding.standard_error, info)}"


def shown_interval(difference: Difference, info: MetricInfo) -> str:
    """Both ends of the interval; a dash without one."""
    if difference.interval is None:
        return MISSING
    low, high = (shown(end, info, signed=True) for end in difference.interval)
    return f"{low} to {high}"


def shown_count(count: float | None) -> str:
    """12,345 as 12.3 k, and so on up."""
    if count is None:
        return MISSING
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def shown_seconds(seconds: float | None) -> str:
    """Seconds as milliseconds, seconds, minutes or hours."""
    if seconds is None:
        return MISSING
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def shown_bytes(count: float | None) -> str:
    """Bytes as MiB or GiB."""
    if count is None:
        return MISSING
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def headline(comparison: Comparison) -> str:
    """Which cell leads by the first metric, whether that is real, and at which budget."""
    info, ranked = comparison.first, comparison.ranked()
    if not ranked:
        return f"No cell has a value of {info.name}."
    best = ranked[0]
    unequal = " at unequal budgets" if comparison.knows_costs else " (budgets are not known)"
    budget = f" at {comparison.budget} each" if comparison.budget else unequal
    most = "lowest" if info.better == "lower" else "highest"
    return (
        f"{best.label} has the {most} {info.name}, {shown_mean(best, info)}{budget}: "
        f"{_against_others(comparison, best)}"
    )


def _against_others(comparison: Comparison, best: CellSummary) -> str:
    info = comparison.first
    others = [cell.label for cell in comparison.ranked() if cell is not best]
    if not others:
        return "there is no other cell to compare it with."
    pairs = {label: comparison.pair(info.name, best.label, label) for label in others}
    verdicts = {label: pair.verdict for label, pair in pairs.items() if pair is not None}
    if "one seed" in verdicts.values():
        return "but with one seed nobody can say whether that is chance."
    level = [label for label, verdict in verdicts.items() if verdict == "not distinguishable"]
    behind = [label for label, own in verdicts.items() if own in ("better", "worse", "different")]
    if len(behind) == len(others):
        return f"a real difference to {_every(len(others))}."
    if len(level) == len(others):
        return f"but it is not distinguishable from {_every(len(others))}."
    if not behind and not level:
        return f"but it shares no seed with {_every(len(others))}, so there is no verdict."
    named = ", ".join(level[:3]) + (f" and {len(level) - 3} more" if len(level) > 3 else "")
    return (
        f"a real difference to {len(behind)} of {len(others)} other cells, "
        f"but not distinguishable from {named or 'those without a common seed'}."
    )


def _every(count: int) -> str:
    return "the other cell" if count == 1 else f"any of the {count} other cells"
