"""The command line: ``scripts/soak``."""

from __future__ import annotations

import argparse
import random
import sys

from reliability import contender
from reliability.fault import KINDS
from reliability.figure import FIGURES, measure
from reliability.soak import Length, soak
from reliability.stage import Cast


def main() -> int:
    options = _options()
    if options.figures:
        table, good = measure(options.figures, options.client, options.quick)
        print(table)
        return 0 if good else 1
    return _soak(options)


def _soak(options: argparse.Namespace) -> int:
    status = 0
    for client in options.client:
        cast = Cast(
            client=client,
            publishers=options.publishers,
            subscribers=options.subscribers,
            rate=options.rate,
            dedupe=options.dedupe,
        )
        length = Length(count=options.count, duration=options.duration)
        for seed in range(options.seed, options.seed + options.seeds):
            print(
                f"\n{client}: seed {seed}, {options.publishers} publishers of {options.rate:g} events/s, "
                f"{options.subscribers} subscribers",
                flush=True,
            )
            account, broken = soak(cast, seed, options.faults, length, lambda line: print(line, flush=True))
            rows = account.rows()
            width = max(len(name) for name, _ in rows)
            print("\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in rows))
            for promise in broken:
                print(f"soak: {client}, seed {seed}: {promise}", file=sys.stderr)
                status = 1
    return status


def _options() -> argparse.Namespace:
    names = [figure.name for figure in FIGURES]
    kinds = "\n".join(f"  {kind:16} {what}" for kind, what in KINDS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/soak",
        description="Break the broker, the network and the processes at random, and account for every event.",
        epilog=f"faults:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, help="of the faults; drawn if not given, and told")
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="so many runs, with seeds counting up"
    )
    parser.add_argument("--count", type=int, metavar="N", help="so many faults (default: 10)")
    parser.add_argument("--duration", type=float, metavar="S", help="faults for so many seconds instead")
    parser.add_argument("--faults", type=_names(KINDS), default=list(KINDS), metavar="A,B", help="only these")
    parser.add_argument(
        "--client",
        type=_names(contender.NAMES),
        metavar="A,B",
        help=f"of {', '.join(contender.NAMES)} (default: ours; all for the figures)",
    )
    parser.add_argument("--publishers", type=int, default=1, metavar="N")
    parser.add_argument("--subscribers", type=int, default=1, metavar="N", help="each handles every event")
    parser.add_argument("--rate", type=float, default=150.0, metavar="N", help="events/s of each publisher")
    parser.add_argument(
        "--dedupe", choices=["durable", "memory", "none"], default="durable", help="in the subscribers"
    )
    parser.add_argument(
        "--figures",
        type=_names(names),
        nargs="?",
        const=names,
        metavar="A,B",
        help=f"measure these instead, for the table in docs/RELIABILITY.md: {', '.join(names)} (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="figures of few events: do they work?")
    options = parser.parse_args()
    if options.client is None:
        options.client = list(contender.NAMES if options.figures else contender.OURS)
    if options.seed is None:
        options.seed = random.randrange(1_000_000)
    if options.count is None and options.duration is None:
        options.count = 10
    return options


def _names(there_are: object) -> object:
    known = list(there_are)  # type: ignore[call-overload]

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(known):
            raise argparse.ArgumentTypeError(
                f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}"
            )
        return chosen

    return names


if __name__ == "__main__":
    sys.exit(main())
