"""What is broken, when and for how long: drawn from a seed, so that a run can be had again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from tests.support.proxy import Direction

KINDS = {
    "kill-broker": "kill -9 of a broker that keeps its state on disk; started again after a while",
    "restart-broker": "the broker is ended in good order, and started again",
    "freeze-broker": "SIGSTOP of the broker: connections stay open, nobody answers",
    "refuse": "connections are torn down, and new ones refused for a while",
    "reset": "RST",
    "hang-up": "FIN",
    "half-close": "FIN in one direction only",
    "cut": "RST in the middle of a packet",
    "blackhole": "nothing passes in one direction or both, and nobody is told",
    "slices": "one byte at a time",
    "latency": "100 ms each way",
    "throttle": "64 kB/s",
    "kill-publisher": "kill -9 of a publisher; started again, with the same outbox",
    "kill-subscriber": "kill -9 of a subscriber; started again, with the same client id",
}
"""Every kind of fault there is, and what it does."""

MOMENTARY = frozenset({"reset", "hang-up", "half-close"})
ON_LINKS = frozenset(KINDS) - {kind for kind in KINDS if kind.startswith(("kill-", "restart-", "freeze-"))}
BROKER_LISTENS_AGAIN = frozenset({"kill-broker", "restart-broker", "refuse"})
"""The faults that end with a broker that can be reached again, after it could not."""


@attrs.frozen
class Fault:
    """One thing that breaks. What its kind does not need is without meaning.

    Args:
        quiet: Seconds without a fault before it.
        lasts: Seconds until it is mended.
        links: Whose connections it is about.
        direction: Of the bytes; None for both.
        number: Picks the process, or the byte.
    """

    kind: str
    quiet: float
    lasts: float
    links: tuple[str, ...]
    direction: Direction | None
    number: int

    def __str__(self) -> str:
        lasts = "" if self.kind in MOMENTARY else f"{self.lasts:.1f} s"
        links = " and ".join(self.links) if self.kind in ON_LINKS else ""
        return f"{self.kind:15} {lasts:>5}  {links:24}"


def faults(seed: int, kinds: Sequence[str]) -> Iterator[Fault]:
    """Faults without end, the same for the same seed and kinds; no kind twice before each had its turn."""
    draw = random.Random(seed)
    turn: list[str] = []
    while True:
        if not turn:
            turn = list(kinds)
            draw.shuffle(turn)
        yield Fault(
            kind=turn.pop(),
            quiet=draw.uniform(0.2, 0.8),
            lasts=draw.uniform(0.1, 1.0) if draw.random() < 0.7 else draw.uniform(1.0, 4.0),
            links=draw.choice([("publisher",), ("subscriber",), ("publisher", "subscriber")]),
            direction=draw.choice(["to_broker", "to_client", None]),
            number=draw.randrange(10_000),
        )
