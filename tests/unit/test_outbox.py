"""`Outbox`: what is on disk when a call returns, in which order, and what becomes of a bad file."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from tars_mqtt import OutboxError
from tars_mqtt.outbox import Outbox
from tests.support import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@pytest.fixture
def outbox(path: Path) -> Iterator[Outbox]:
    outbox = Outbox(path)
    yield outbox
    outbox.close()


def store(outbox: Outbox, payload: bytes = b"x") -> int:
    numbers: list[int] = []
    outbox.store(b"a/b", payload, 1, False, "id", numbers.append)
    return numbers[0]


def test_messages_come_back_in_order_after_the_number_asked_for(outbox: Outbox) -> None:
    numbers = [store(outbox, bytes([n])) for n in range(10)]
    assert numbers == sorted(numbers)
    rows = outbox.fetch(numbers[2], 4)
    assert [row.payload for row in rows] == [b"\x03", b"\x04", b"\x05", b"\x06"]
    assert (rows[0].topic, rows[0].qos, rows[0].retain, rows[0].envelope_id) == (b"a/b", 1, False, "id")


def test_properties_are_kept_and_counted(outbox: Outbox) -> None:
    outbox.store(b"a", b"x", 1, False, None, lambda _: None, b"\x03\0\1t")
    outbox.store_soon(b"a", b"x", 1, False, None, lambda _: None, pytest.fail, b"\x01\1")
    outbox.commit()
    store(outbox)
    assert [row.properties for row in outbox.fetch(0, 10)] == [b"\x03\0\1t", b"\x01\1", b""]
    assert outbox.totals() == (3, 2 + 4 + 2 + 2 + 4)


def test_a_file_of_a_version_that_had_no_properties_is_taken_over(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "CREATE TABLE outgoing (number INTEGER PRIMARY KEY AUTOINCREMENT, topic BLOB NOT NULL,"
            " payload BLOB NOT NULL, qos INTEGER NOT NULL, retain INTEGER NOT NULL, envelope_id TEXT,"
            " stored_at REAL NOT NULL)"
        )
        connection.execute("INSERT INTO outgoing VALUES (7, x'61', x'62', 1, 0, 'id', 1.0)")
    for _ in range(2):
        outbox = Outbox(path)
        assert [(row.number, row.payload, row.properties) for row in outbox.fetch(0, 10)] == [(7, b"b", b"")]
        outbox.close()


def test_what_was_stored_is_there_after_a_kill(path: Path) -> None:
    """``kill -9`` right after the call returned, and the next process finds the message."""
    script = (
        "import os, sys; from tars_mqtt.outbox import Outbox; outbox = Outbox(sys.argv[1])\n"
        "outbox.store(b'a', b'safe', 1, True, None, lambda number: None)\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    outbox = Outbox(path)
    assert [(row.payload, row.retain) for row in outbox.fetch(0, 10)] == [(b"safe", True)]
    outbox.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_that_ends_takes_nothing_from_its_parent(path: Path) -> None:
    """Neither what is on disk by then, nor what comes later."""
    script = (
        "import os, sys; from tars_mqtt.outbox import Outbox; outbox = Outbox(sys.argv[1])\n"
        "outbox.store(b'a', b'before', 1, True, None, lambda number: None)\n"
        "if not os.fork(): sys.exit()\n"
        "os.wait()\n"
        "outbox.store(b'a', b'after', 1, True, None, lambda number: None)\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    outbox = Outbox(path)
    assert [row.payload for row in outbox.fetch(0, 10)] == [b"before", b"after"]
    outbox.close()


def test_what_was_discarded_is_gone_and_the_rest_stays(outbox: Outbox) -> None:
    numbers = [store(outbox, b"12345") for _ in range(4)]
    outbox.discard(numbers[0])
    outbox.discard(numbers[2])
    assert outbox.totals() == (4, 32)
    outbox.prune()
    assert outbox.totals() == (2, 16)
    assert [row.number for row in outbox.fetch(0, 10)] == [numbers[1], numbers[3]]


def test_numbers_are_not_used_again(outbox: Outbox) -> None:
    """A deleted message's number must not make a newer one look older than it is."""
    first = store(outbox)
    outbox.discard(first)
    outbox.prune()
    assert store(outbox) > first


def test_threads_share_commits_and_numbers_come_in_order(outbox: Outbox) -> None:
    order: list[int] = []

    def work() -> None:
        for _ in range(50):
            outbox.store(b"a", b"x", 1, False, None, order.append)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == sorted(order)
    assert outbox.totals()[0] == len(order) == 400


def test_what_waits_for_a_commit_shares_it_in_order_and_nobody_is_forgotten(outbox: Outbox) -> None:
    """Also with one who does not wait before one who does, and at the end."""
    order: list[str] = []

    def leave(name: str) -> None:
        outbox.store_soon(b"a", b"x", 1, False, None, lambda _: order.append(name), pytest.fail)

    leave("first")
    leave("second")
    assert order == []
    outbox.commit()
    leave("third")
    outbox.store(b"a", b"x", 1, False, None, lambda _: order.append("fourth"))
    leave("fifth")
    outbox.close()
    assert order == ["first", "second", "third", "fourth", "fifth"]


def test_who_does_not_wait_for_a_commit_is_told_that_it_failed(outbox: Outbox) -> None:
    failed: list[OutboxError] = []
    outbox._connection.execute("PRAGMA max_page_count = 1")
    for _ in range(2):
        outbox.store_soon(b"a", b"x" * 1_000_000, 1, False, None, pytest.fail, failed.append)
    outbox.commit()
    assert len(failed) == 2
    assert failed[0] is not failed[1]


class Interrupted:
    """A connection on which Ctrl-C comes once, right before or right after a statement."""

    def __init__(self, connection: sqlite3.Connection, statement: str, after: bool) -> None:
        self._connection = connection
        self._statement = statement
        self._after = after
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def execute(self, statement: str, *row: object) -> sqlite3.Cursor:
        if not statement.startswith(self._statement) or self.reached.is_set():
            return self._connection.execute(statement, *row)
        self.reached.set()
        assert self.go_on.wait(10)
        if self._after:
            self._connection.execute(statement, *row)
        raise KeyboardInterrupt

    def __getattr__(self, name: str) -> object:
        return getattr(self._connection, name)


@pytest.mark.parametrize(
    ("statement", "after"),
    [("BEGIN", False), ("BEGIN", True), ("INSERT", True), ("COMMIT", False), ("COMMIT", True)],
)
def test_who_is_interrupted_while_it_commits_for_others_takes_nothing_from_them(
    outbox: Outbox, statement: str, after: bool
) -> None:
    """Neither from those who have waited before it, nor from those who come meanwhile; its own is not half there."""
    connection = Interrupted(outbox._connection, statement, after)
    stored: list[bytes] = []
    interruptions: list[BaseException] = []

    def submit(payload: bytes) -> None:
        try:
            outbox.store(b"a", payload, 1, False, None, lambda _: stored.append(payload))
        except KeyboardInterrupt as interruption:
            interruptions.append(interruption)

    outbox.store_soon(b"a", b"left", 1, False, None, lambda _: stored.append(b"left"), pytest.fail)
    outbox._connection = connection  # type: ignore[assignment]
    interrupted = threading.Thread(target=submit, args=(b"mine",))
    interrupted.start()
    assert connection.reached.wait(10)
    other = threading.Thread(target=submit, args=(b"other",))
    other.start()
    eventually(lambda: len(outbox._writes) == 3)
    connection.go_on.set()
    interrupted.join(10)
    other.join(10)
    assert len(interruptions) == 1
    # Whether its own is on disk is open: the other one may have taken it along.
    assert sorted({*stored, b"mine"}) == [b"left", b"mine", b"other"]
    assert [row.payload for row in outbox.fetch(0, 10)] == stored
    outbox.commit()
    assert outbox.totals()[0] == len(stored)


def test_who_is_interrupted_while_it_waits_for_its_turn_is_not_stored(outbox: Outbox) -> None:
    class Turn:
        """Ctrl-C comes while the first one waits for it."""

        def __enter__(self) -> None:
            outbox._turn = turn
            raise KeyboardInterrupt

        def __exit__(self, *_: object) -> None: ...

    turn = outbox._turn
    outbox._turn = Turn()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        store(outbox)
    outbox.commit()
    assert outbox.totals() == (0, 0)


def test_who_is_interrupted_while_it_tells_others_tells_them_all(outbox: Outbox) -> None:
    told: list[str] = []

    def interrupted(_: int) -> None:
        told.append("interrupted")
        raise KeyboardInterrupt

    outbox.store_soon(b"a", b"x", 1, False, None, interrupted, pytest.fail)
    outbox.store_soon(b"a", b"x", 1, False, None, lambda _: told.append("next"), pytest.fail)
    with pytest.raises(KeyboardInterrupt):
        outbox.commit()
    outbox.commit()
    assert told == ["interrupted", "next"]
    assert outbox.totals()[0] == 2


def test_a_second_user_of_the_file_is_refused(outbox: Outbox, path: Path) -> None:
    with pytest.raises(OutboxError, match="in use by another process"):
        Outbox(path)
    script = "import sys; from tars_mqtt.outbox import Outbox; Outbox(sys.argv[1])"
    other = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False
    )
    assert "in use by another process" in other.stderr


def test_a_damaged_file_is_set_aside_and_reported(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(b"this was a database once" * 100)
    with caplog.at_level(logging.ERROR):
        outbox = Outbox(path)
    assert outbox.totals() == (0, 0)
    store(outbox)
    outbox.close()
    (aside,) = path.parent.glob("outbox.db.damaged-*")
    assert aside.read_bytes().startswith(b"this was a database once")
    assert aside.name in caplog.text


def test_what_it_writes_is_for_its_owner_alone(path: Path) -> None:
    before = os.umask(0)
    try:
        outbox = Outbox(path)
        store(outbox)
        modes = {found.name: stat.S_IMODE(found.stat().st_mode) for found in path.parent.glob("outbox.db*")}
        outbox.close()
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("outbox.db", "outbox.db-wal"), 0o600)


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(OutboxError, match="cannot be opened"):
        Outbox(tmp_path / "missing" / "outbox.db")


def test_a_full_disk_is_an_error_and_nothing_is_taken(outbox: Outbox) -> None:
    """SQLite's own limit on the number of pages stands for the disk."""
    store(outbox)
    (pages,) = outbox._connection.execute("PRAGMA page_count").fetchone()
    outbox._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OutboxError, match=r"full; free some space"):
        store(outbox, b"x" * 1_000_000)
    assert outbox.totals()[0] == 1
    outbox._connection.execute("PRAGMA max_page_count = 1000000")
    store(outbox, b"x" * 1_000_000)
    assert outbox.totals()[0] == 2


def test_what_could_not_be_deleted_is_deleted_the_next_time(outbox: Outbox) -> None:
    """Deleting takes room too: a disk that was full for a moment must not repeat messages at the next start."""
    outbox.discard(store(outbox))
    outbox._connection.execute(
        "CREATE TRIGGER full BEFORE DELETE ON outgoing BEGIN SELECT RAISE(ABORT, 'full'); END"
    )
    with pytest.raises(OutboxError, match="free some space"):
        outbox.prune()
    outbox._connection.execute("DROP TRIGGER full")
    outbox.discard(store(outbox))
    outbox.prune()
    assert outbox.totals() == (0, 0)


class ClosesFirst:
    """The turn of an outbox that somebody else closes right before the next one has it."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._turn = outbox._turn

    def __enter__(self) -> None:
        self._outbox._turn = self._turn
        self._outbox.close()
        self._turn.acquire()

    def __exit__(self, *_: object) -> None:
        self._turn.release()


def test_what_is_closed_while_another_thread_is_about_to_prune_is_pruned(outbox: Outbox, path: Path) -> None:
    outbox.discard(store(outbox))
    outbox._turn = ClosesFirst(outbox)  # type: ignore[assignment]
    outbox.prune()
    reopened = Outbox(path)
    assert reopened.totals() == (0, 0)
    reopened.close()


def test_keys_are_remembered_for_their_time(path: Path) -> None:
    now = 1000.0
    outbox = Outbox(path, wall_clock=lambda: now)
    outbox.remember("short", 10)
    outbox.remember("long", 100)
    outbox.close()
    now = 1050.0
    outbox = Outbox(path, wall_clock=lambda: now)
    assert outbox.remembered(10) == [("long", 50.0)]
    outbox.close()


def test_of_more_keys_than_are_wanted_the_latest_stay(outbox: Outbox) -> None:
    for ttl, key in enumerate("abcd", start=10):
        outbox.remember(key, ttl)
    assert [key for key, _ in outbox.remembered(2)] == ["c", "d"]
    assert [key for key, _ in outbox.remembered(10)] == ["c", "d"]


def test_a_key_may_take_the_place_of_another(outbox: Outbox) -> None:
    outbox.remember("a", 10)
    outbox.remember("b", 10, instead_of="a")
    assert [key for key, _ in outbox.remembered(10)] == ["b"]
