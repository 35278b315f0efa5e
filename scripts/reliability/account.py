"""An honest account: what was sent, held against what was handled."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from statistics import median

import attrs

from reliability import journal
from reliability.fault import BROKER_LISTENS_AGAIN

Line = tuple[str, list[int], float]


@attrs.define
class Sent:
    """What one publisher did, over all its lives."""

    tried: set[int] = attrs.field(factory=set)
    accepted: set[int] = attrs.field(factory=set)
    """The client took them: from here on they are its business."""
    acknowledged: set[int] = attrs.field(factory=set)

    def add(self, lines: Iterable[Line]) -> None:
        books = {
            journal.TRIED: self.tried,
            journal.ACCEPTED: self.accepted,
            journal.ACKNOWLEDGED: self.acknowledged,
        }
        for what, numbers, _ in lines:
            if what in books:
                books[what].add(numbers[0])


@attrs.define
class Heard:
    """What one subscriber handled, over all its lives; an event is a publisher and a number."""

    times: list[float] = attrs.field(factory=list)
    handled: dict[int, set[int]] = attrs.field(factory=lambda: defaultdict(set))
    twice: int = 0
    in_hand: int = 0
    """Handled a second time because the process was killed before it could note the first."""
    out_of_order: int = 0
    _latest: Counter[int] = attrs.field(factory=Counter)
    _last: tuple[int, int] | None = None
    _killed_with: set[tuple[int, int]] = attrs.field(factory=set)

    def add(self, lines: Iterable[Line]) -> None:
        for what, numbers, moment in lines:
            if what == journal.BEGUN:
                if self._last is not None:
                    self._killed_with.add(self._last)
            elif what == journal.HANDLED:
                self._handled(numbers[0], numbers[1], moment)

    def _handled(self, publisher: int, number: int, moment: float) -> None:
        self.times.append(moment)
        self._last = (publisher, number)
        handled = self.handled[publisher]
        if number not in handled:
            handled.add(number)
            if number < self._latest[publisher]:
                self.out_of_order += 1
            self._latest[publisher] = max(number, self._latest[publisher])
        elif self._last in self._killed_with:
            self._killed_with.discard(self._last)
            self.in_hand += 1
        else:
            self.twice += 1


@attrs.frozen
class Mended:
    """A fault that is over."""

    kind: str
    moment: float


@attrs.define
class Account:
    """The books of all processes."""

    sent: dict[int, Sent] = attrs.field(factory=lambda: defaultdict(Sent))
    heard: dict[int, Heard] = attrs.field(factory=lambda: defaultdict(Heard))
    mended: list[Mended] = attrs.field(factory=list)

    def total(self, book: str) -> int:
        return sum(len(getattr(sent, book)) for sent in self.sent.values())

    def missing(self, book: str) -> int:
        """Events in a book of the publishers that some subscriber did not handle."""
        return sum(
            len(getattr(sent, book) - heard.handled[publisher])
            for publisher, sent in self.sent.items()
            for heard in self.heard.values()
        )

    @property
    def invented(self) -> int:
        """Events handled that nobody sent."""
        return sum(
            len(numbers - self.sent[publisher].tried)
            for heard in self.heard.values()
            for publisher, numbers in heard.handled.items()
        )

    def count(self, what: str) -> int:
        """Over all subscribers."""
        return sum(getattr(heard, what) for heard in self.heard.values())

    @property
    def handled(self) -> int:
        return sum(len(numbers) for heard in self.heard.values() for numbers in heard.handled.values())

    def recoveries(self) -> Mapping[str, list[float]]:
        """For each kind of fault: seconds from its end to the next event handled, by each subscriber."""
        found: dict[str, list[float]] = defaultdict(list)
        for mended in self.mended:
            for heard in self.heard.values():
                index = bisect_right(heard.times, mended.moment)
                if index < len(heard.times):
                    found[mended.kind].append(heard.times[index] - mended.moment)
        return found

    def broken_promises(self, *, once: bool, outbox: bool) -> list[str]:
        """In words.

        Args:
            once: Each event was to be handled once, unless its process was killed with it in hand.
            outbox: What the client accepted was to be handled, also when its process was killed.
        """
        promised = "accepted" if outbox else "acknowledged"
        found = []
        if not self.total(promised) or not self.handled:
            found.append("nothing was sent, or nothing handled")
        if lost := self.missing(promised):
            found.append(f"{lost} events {promised} and lost")
        if once and (twice := self.count("twice")):
            found.append(f"{twice} events handled twice")
        if invented := self.invented:
            found.append(f"{invented} events handled that nobody sent")
        return found

    def rows(self) -> list[tuple[str, str]]:
        """The account, to be printed."""
        rows = [
            ("faults", str(len(self.mended))),
            ("events sent", str(self.total("accepted"))),
            ("  acknowledged by the broker", str(self.total("acknowledged"))),
            ("  cut short by a kill, may come or not", str(self.total("tried") - self.total("accepted"))),
            ("events handled", str(self.handled)),
            ("lost, of those sent", str(self.missing("accepted"))),
            ("lost, of those acknowledged", str(self.missing("acknowledged"))),
            ("handled twice", str(self.count("twice"))),
            ("  killed in the handler, and handled again", str(self.count("in_hand"))),
            ("out of order", str(self.count("out_of_order"))),
        ]
        recoveries = self.recoveries()
        back = [seconds for kind in BROKER_LISTENS_AGAIN for seconds in recoveries.get(kind, ())]
        if back:
            rows.append(("broker listens again -> event handled", spread(back)))
        rows += [(f"  {kind}: mended -> event handled", spread(recoveries[kind])) for kind in recoveries]
        return rows


def spread(seconds: list[float]) -> str:
    return f"p50 {median(seconds):.2f} s, max {max(seconds):.2f} s"
