"""The figures for docs/RELIABILITY.md, each in a process of its own: ``python -m reliability.figure NAME CLIENT``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import attrs

from reliability import contender, durable, handling, outage, recovery, sending
from reliability.fault import KINDS
from reliability.outcome import Outcome
from reliability.soak import Length, soak
from reliability.stage import Cast

_TIMEOUT = 900.0
_SIDE_BY_SIDE = 3
"""Soaks at a time: they wait most of the time."""
_FAILED, _NOT_MET = "failed", " **(not met)**"
_KILLS = ("kill-publisher", "kill-subscriber")


@attrs.frozen
class Figure:
    """One row of the table."""

    name: str
    title: str
    wanted: str
    measure: Callable[[str, bool], Outcome]
    """Of a client; the flag asks for a quick run, which says only whether it works."""
    clients: tuple[str, ...] = contender.NAMES


def _losses(kinds: Sequence[str], client: str, quick: bool) -> Outcome:
    """Ten faults for each of twenty seeds, some 2,750 events each; a few seeds for the others."""
    ours = client in contender.OURS
    seeds = range(1, 2 if quick else 21 if ours else 6)
    cast = Cast(client=client, rate=450.0)

    def run(seed: int) -> tuple[int, int, int, int, list[str]]:
        account, broken = soak(cast, seed, kinds, Length(count=2 if quick else 10), lambda line: None)
        return (
            account.total("accepted"),
            account.missing("accepted"),
            account.missing("acknowledged"),
            account.count("twice"),
            broken,
        )

    with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        runs = list(pool.map(run, seeds))
    sent, lost, acknowledged, twice = (sum(run[column] for run in runs) for column in range(4))  # type: ignore[misc]
    for broken in (run[4] for run in runs if run[4]):
        print(client, *broken, sep="\n", file=sys.stderr)
    details = f" ({acknowledged:,} of them acknowledged)" if lost else ""
    return Outcome(
        f"{lost:,} of {sent:,} lost{details}, {twice:,} handled twice; {len(runs)} seeds",
        met=not any(run[4] for run in runs),
    )


FIGURES = (
    Figure(
        "faults",
        "events lost in 10 random faults of the broker and the network, QoS 1",
        "0",
        partial(_losses, [kind for kind in KINDS if kind not in _KILLS]),
    ),
    Figure("kills", "the same for `kill -9` of publisher and subscriber", "0", partial(_losses, _KILLS)),
    Figure(
        "recovery",
        "from “broker listens again” to “event handled”, delays of 0.2 to 0.5 s",
        "p50 ≤ 0.2, max ≤ 0.5 s",
        recovery.measure,
    ),
    Figure(
        "outage",
        "200,000 QoS 1 events during an outage",
        "bounded, every refusal visible, ≤ 400 bytes of overhead each",
        outage.in_memory,
    ),
    Figure(
        "outage-outbox", "the same, with an outbox", "all kept, ≤ +20 MB", outage.in_outbox, contender.OURS
    ),
    Figure(
        "slow-handler",
        "a handler blocks for 10 s, keepalive 3 s",
        "stays connected, other handlers and publishes go on",
        handling.slow,
    ),
    Figure(
        "failing-handler",
        "a handler raises 100 of 1,000 times",
        "1,000 seen, acknowledgements in order",
        handling.failing,
    ),
    Figure(
        "window",
        "unacknowledged at once after a reconnect, window 20, 2,000 queued",
        "20",
        sending.window,
    ),
    Figure(
        "oversized", "small events delivered in 6 s around an oversized one", "20 of 20", sending.oversized
    ),
    Figure(
        "shutdown",
        "5,000 in flight at shutdown, 10 s allowed",
        "all delivered, or exactly counted",
        sending.shutdown,
    ),
    Figure(
        "outbox-rate",
        "events/s on disk before `submit_event` returns",
        "≥ 3,000",
        durable.rates,
        contender.OURS,
    ),
)


def measure(names: Iterable[str], clients: Sequence[str], quick: bool) -> tuple[str, bool]:
    """Measure one after the other; returns the table in Markdown, and whether ours are as wanted.

    A quick run is as wanted when nothing failed.
    """
    rows = [["", "wanted", *clients], ["---"] * (len(clients) + 2)]
    good = True
    for figure in FIGURES:
        if figure.name not in names:
            continue
        cells = [_cell(figure, client, quick) if client in figure.clients else "" for client in clients]
        good = good and not any(cell.endswith(_FAILED if quick else (_FAILED, _NOT_MET)) for cell in cells)
        rows.append([figure.title, figure.wanted, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows), good


def _cell(figure: Figure, client: str, quick: bool) -> str:
    outcome = _elsewhere(figure, client, quick)
    cell = _FAILED
    if outcome is not None:
        cell = outcome.text + ("" if outcome.met or client not in contender.OURS else _NOT_MET)
    print(f"{figure.name}: {client}: {cell}", file=sys.stderr, flush=True)
    return cell


def _elsewhere(figure: Figure, client: str, quick: bool) -> Outcome | None:
    """Measure in a process of its own; None if that failed, which was told."""
    command = [sys.executable, "-m", "reliability.figure", figure.name, client, *["--quick"] * quick]
    run = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    if run.returncode:
        sys.stderr.write(run.stderr)
        return None
    return Outcome(**json.loads(run.stdout.splitlines()[-1]))


def main() -> None:
    name, client, *flags = sys.argv[1:]
    (figure,) = (figure for figure in FIGURES if figure.name == name)
    print(json.dumps(attrs.asdict(figure.measure(client, "--quick" in flags))), flush=True)
    # The measurement is over; what else a client holds, 200,000 tasks for instance, need not be put in order.
    os._exit(0)


if __name__ == "__main__":
    main()
