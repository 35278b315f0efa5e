"""`MessageDeduplicator`: claim, keep, release; what is remembered and for how long."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from tars_mqtt import MessageDeduplicator
from tars_mqtt.dedup import DurableDeduplicator
from tars_mqtt.outbox import Outbox
from tests.support import FakeClock

if TYPE_CHECKING:
    from pathlib import Path


def test_a_key_is_claimed_once_and_again_after_a_failure() -> None:
    seen = MessageDeduplicator(10, 10)
    assert seen.claim("a")
    assert not seen.claim("a"), "it is in work"
    seen.release("a")
    assert seen.claim("a"), "a redelivery after a failure is handled"
    seen.keep("a")
    assert not seen.claim("a")


def test_a_hit_does_not_extend_the_time() -> None:
    clock = FakeClock()
    seen = MessageDeduplicator(10, 10, clock)
    seen.claim("a")
    clock.advance(100)
    seen.keep("a")  # counted from here
    for _ in range(9):
        clock.advance(1)
        assert not seen.claim("a")
    clock.advance(1)
    assert seen.claim("a")


def test_the_least_recently_seen_is_forgotten_first() -> None:
    seen = MessageDeduplicator(1000, 3)
    for key in "abc":
        seen.claim(key)
        seen.keep(key)
    assert not seen.claim("a")  # seen again: now "b" is the oldest
    seen.claim("d")
    seen.keep("d")
    assert len(seen) == 3
    assert not seen.claim("a")
    assert seen.claim("b")


def test_what_is_in_work_is_never_forgotten() -> None:
    clock = FakeClock()
    seen = MessageDeduplicator(1, 1, clock)
    seen.claim("slow")
    for key in range(100):
        seen.claim(key)
        seen.keep(key)
        clock.advance(10)
    assert not seen.claim("slow")


@pytest.mark.parametrize(("ttl", "most"), [(0, 1), (-1, 1), (float("nan"), 1), (1, 0)])
def test_nonsense_is_refused(ttl: float, most: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        MessageDeduplicator(ttl, most)


def test_a_claim_of_an_earlier_life_is_none_and_its_release_leaves_a_newer_one_alone() -> None:
    """What a handler had in work when it was given up is claimed anew by whoever gets it next."""
    seen = MessageDeduplicator(60, 10)
    life = seen.lives
    assert seen.claim("a", life)
    seen.release_all()
    assert not seen.claim("b", life)
    assert seen.claim("a", seen.lives)
    seen.release("a", life)
    assert not seen.claim("a")
    seen.release("a", seen.lives)
    assert seen.claim("a")


def test_many_threads_claim_each_key_once() -> None:
    seen = MessageDeduplicator(1000, 100_000)
    claims: list[int] = []
    start = threading.Barrier(8)

    def claim_all() -> None:
        start.wait()
        claims.extend(key for key in range(2000) if seen.claim(key))

    threads = [threading.Thread(target=claim_all) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claims) == list(range(2000))


def test_what_was_kept_on_disk_is_known_after_a_restart(tmp_path: Path) -> None:
    """Kept, not merely claimed: what a killed handler had in work is handled again."""
    for run in range(2):
        outbox = Outbox(tmp_path / "outbox.db")
        seen = DurableDeduplicator(1000, 10)
        seen.attach(outbox)
        assert seen.claim(("filter#1", "kept")) is (run == 0)
        assert seen.claim(("filter#1", "claimed"))
        if run == 0:
            seen.keep(("filter#1", "kept"))
        outbox.close()


def test_the_file_remembers_no_more_keys_than_memory(tmp_path: Path) -> None:
    """However long the process runs: what memory forgets for a new key, the file forgets as well."""
    outbox = Outbox(tmp_path / "outbox")
    seen = DurableDeduplicator(60, 3)
    seen.attach(outbox)
    for key in "abcdef":
        assert seen.claim(key)
        seen.keep(key)
    assert {key for key, _ in outbox.remembered(100)} == {"'d'", "'e'", "'f'"}
    outbox.close()
