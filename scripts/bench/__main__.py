"""The command line: ``scripts/bench/run``."""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import attrs

from bench import far
from bench.broker import find_mosquitto
from bench.contender import CONTENDERS, Contender
from bench.measure import Laboratory
from bench.plot import plot
from bench.process import MeasurementError
from bench.result import Measurement, Results
from bench.table import tables
from bench.workload import WORKLOADS, Workload

Named = TypeVar("Named", Workload, Contender)


def main() -> int:
    options = _options()
    if options.processes:
        print(_with_processes(options), end="")
        return 0
    if options.report:
        results, failures = Results.merged(map(Results.read, options.report)), 0
    else:
        results, failures = _measure(options)
    if options.json:
        results.write(options.json)
    print(tables(results), end="")
    if options.plot:
        options.plot.write_text(plot(results))
    return 1 if failures else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench/run",
        description="Measure this package and the other MQTT clients for Python on identical work.",
    )
    parser.add_argument("--quick", action="store_true", help="few messages, one round: does it all work?")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="medians of so many (default: 5)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="times the number of messages")
    parser.add_argument("--workloads", metavar="A,B", help=f"of {', '.join(each.name for each in WORKLOADS)}")
    parser.add_argument("--clients", metavar="A,B", help=f"of {', '.join(each.name for each in CONTENDERS)}")
    parser.add_argument(
        "--against", metavar="DIR", type=Path, help="measure another checkout of ours as well"
    )
    parser.add_argument("--broker", metavar="LINE", action="append", default=[], help="for mosquitto.conf")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all measurements there")
    parser.add_argument(
        "--report", metavar="FILE", type=Path, nargs="+", help="measure nothing, show what --json wrote"
    )
    parser.add_argument(
        "--processes",
        metavar="N,N",
        help="measure only how throughput grows with so many processes that share a subscription",
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the main workloads there, as SVG")
    options = parser.parse_args()
    try:
        options.workloads = _chosen(WORKLOADS, options.workloads)
        options.clients = _chosen(CONTENDERS, options.clients)
    except KeyError as unknown:
        parser.error(f"there is no {unknown}; see --help")
    if options.quick:
        options.rounds = 1
    options.workloads = [
        workload.quick() if options.quick else workload.scaled(options.scale)
        for workload in options.workloads
    ]
    if options.against:
        path = str(options.against.resolve())
        options.clients += [
            attrs.evolve(contender, name=f"{contender.name}@{options.against.name}", path=path)
            for contender in options.clients
            if contender.ours
        ]
    return options


def _with_processes(options: argparse.Namespace) -> str:
    from bench.processes import table

    numbers = [int(number) for number in options.processes.split(",")]
    messages = 500 if options.quick else int(8_000 * options.scale)
    with tempfile.TemporaryDirectory(prefix="tars-mqtt-bench-") as directory:
        return table(find_mosquitto(), far.build(Path(directory)), numbers, messages, options.rounds)


def _chosen(there_is: Sequence[Named], names: str | None) -> list[Named]:
    if names is None:
        return list(there_is)
    by_name = {each.name: each for each in there_is}
    return [by_name[name] for name in names.split(",")]


def _measure(options: argparse.Namespace) -> tuple[Results, int]:
    """Measure, and count what failed."""
    try:
        mosquitto = find_mosquitto()
    except FileNotFoundError as error:
        sys.exit(f"bench: {error}")
    results = Results.begin(options.clients)
    failures = 0
    with tempfile.TemporaryDirectory(prefix="tars-mqtt-bench-") as directory:
        laboratory = Laboratory(mosquitto, far.build(Path(directory)), options.broker)
        for number, workload in itertools.product(range(options.rounds), options.workloads):
            # Each begins in turn, so that what disturbs for a while does not always disturb the same.
            start = number % len(options.clients)
            for contender in options.clients[start:] + options.clients[:start]:
                if not laboratory.applies(workload, contender):
                    continue
                print(
                    f"\r\033[K{number + 1}/{options.rounds} {workload.name} {contender.name}",
                    end="",
                    file=sys.stderr,
                )
                try:
                    metrics = laboratory.measure(workload, contender)
                except MeasurementError as error:
                    failures += 1
                    print(f": {error}", file=sys.stderr)
                else:
                    results.measurements.append(Measurement(workload.name, contender.name, number, metrics))
    print("\r\033[K", end="", file=sys.stderr)
    return results, failures


if __name__ == "__main__":
    sys.exit(main())
