"""Results as a picture: an SVG with bars for the main workloads."""

from __future__ import annotations

from xml.sax.saxutils import escape

from bench.contender import BARE
from bench.result import Results
from bench.table import number
from bench.workload import CPU, Workload

_MAIN = ("publish-0", "publish-1", "receive-0", "receive-1", "round-trip")

_COLUMNS = 2
_PANEL_WIDTH = 460
_NAME_WIDTH = 96
_BAR_WIDTH = 230
_BAR_HEIGHT = 13
_ROW_HEIGHT = 18
_TITLE_HEIGHT = 30
_GAP = 22

_STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #1f2328; }
.title { font-weight: 600; font-size: 13px; }
.unit, .note { fill: #656d76; font-weight: 400; }
.ours { fill: #0969da; }
.peer { fill: #afb8c1; }
.bare { fill: none; stroke: #afb8c1; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .unit, .note { fill: #8d96a0; }
  .ours { fill: #4493f8; }
  .peer { fill: #484f58; }
  .bare { stroke: #484f58; }
}"""


def plot(results: Results) -> str:
    """Return the SVG."""
    workloads = [workload for workload in results.workloads() if workload.name in _MAIN]
    panel_height = _TITLE_HEIGHT + _ROW_HEIGHT * len(results.versions) + _GAP
    lines = -(-len(workloads) // _COLUMNS)
    width, height = _COLUMNS * _PANEL_WIDTH, lines * panel_height + _GAP
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f"<style>\n{_STYLE}\n</style>",
    ]
    for index, workload in enumerate(workloads):
        left = index % _COLUMNS * _PANEL_WIDTH
        top = index // _COLUMNS * panel_height
        parts += [f'<g transform="translate({left} {top})">', *_panel(results, workload), "</g>"]
    parts.append(f'<text class="note" x="12" y="{height - 8}">{escape(results.machine)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(results: Results, workload: Workload) -> list[str]:
    metric = workload.metrics[0]
    better = "more" if metric.more_is_better else "less"
    title = (
        f'{escape(workload.title)} <tspan class="unit">{escape(metric.unit)}, {better} is better; CPU</tspan>'
    )
    parts = [f'<text class="title" x="12" y="22">{title}</text>']
    clients = results.clients(workload)
    longest = max(results.value(workload, client, metric) for client in clients)
    for index, client in enumerate(clients):
        value, cpu = (results.value(workload, client, which) for which in (metric, CPU))
        width = round(value / longest * _BAR_WIDTH, 1)
        top = _TITLE_HEIGHT + index * _ROW_HEIGHT
        base = top + _BAR_HEIGHT - 2
        start, end = _NAME_WIDTH + 8, _NAME_WIDTH + 14 + width
        kind = "ours" if client in results.ours else "bare" if client == BARE else "peer"
        label = f'{number(value)} <tspan class="unit">{number(cpu)} µs</tspan>'
        parts += [
            f'<text x="{_NAME_WIDTH}" y="{base}" text-anchor="end">{escape(client)}</text>',
            f'<rect class="{kind}" x="{start}" y="{top}" width="{width}" height="{_BAR_HEIGHT}" rx="2"/>',
            f'<text x="{end}" y="{base}">{label}</text>',
        ]
    return parts
