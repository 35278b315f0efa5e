"""Results as Markdown that can be read as it is."""

from __future__ import annotations

from bench.result import Results
from bench.workload import Metric, Workload


def tables(results: Results) -> str:
    """One table for each workload, and one that sums up."""
    parts = [f"{results.machine}. {_versions(results)}"]
    for workload in results.workloads():
        if results.clients(workload):
            parts += [f"### {workload.title}", _table(_rows(results, workload))]
    summary = _summary(results)
    if len(summary) > 1:
        parts += ["### Against the best of the others", _table(summary)]
    return "\n\n".join(parts) + "\n"


def _versions(results: Results) -> str:
    return ", ".join(f"{name} {number}" for name, number in results.versions.items() if number)


def _rows(results: Results, workload: Workload) -> list[list[str]]:
    clients = results.clients(workload)
    ours = [name for name in results.ours if name in clients]
    rows = [["", *(metric.unit for metric in workload.metrics), *(f"{name} ÷ it" for name in ours)]]
    for client in clients:
        values = [number(results.value(workload, client, metric)) for metric in workload.metrics]
        rows.append([client, *values, *(_ratios(results, workload, name, client) for name in ours)])
    return rows


def _ratios(results: Results, workload: Workload, name: str, other: str) -> str:
    if name == other:
        return ""
    return ", ".join(f"{results.ratio(workload, name, other, metric):.2f}" for metric in workload.metrics)


def _summary(results: Results) -> list[list[str]]:
    rows = [["", *results.ours]]
    for workload in results.workloads():
        for metric in workload.metrics:
            best = results.best_peer(workload, metric)
            cells = [_against(results, workload, name, best, metric) for name in results.ours] if best else []
            if any(cells):
                rows.append([f"{workload.title}: {metric.unit}, ÷ {best}", *cells])
    return rows


def _against(results: Results, workload: Workload, name: str, best: str, metric: Metric) -> str:
    if name not in results.clients(workload):
        return ""
    return f"{results.ratio(workload, name, best, metric):.2f}"


def number(value: float) -> str:
    """Three or more digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = [_line(row, widths) for row in rows]
    rule = "|".join("-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths))
    return "\n".join([first, f"|{rule}|", *others])


def _line(row: list[str], widths: list[int]) -> str:
    cells = [
        cell.rjust(width) if column else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return f"| {' | '.join(cells)} |"
