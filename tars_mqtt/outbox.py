"""The durable outbox: outgoing messages on disk until the broker has them, in one SQLite file.

The file belongs to one process at a time. Every commit is on the disk when it returns (WAL,
``synchronous=FULL``); callers that come while one is under way share the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

from tars_mqtt.errors import OutboxError, fresh

__all__ = ["Outbox", "StoredMessage"]

logger = logging.getLogger("tars_mqtt.publish")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS outgoing (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    topic BLOB NOT NULL,
    payload BLOB NOT NULL,
    qos INTEGER NOT NULL,
    retain INTEGER NOT NULL,
    envelope_id TEXT,
    stored_at REAL NOT NULL,
    properties BLOB NOT NULL DEFAULT x''
);
CREATE TABLE IF NOT EXISTS seen (
    key TEXT PRIMARY KEY,
    expires_at REAL NOT NULL
) WITHOUT ROWID;
"""
_INSERT = (
    "INSERT INTO outgoing (topic, payload, qos, retain, envelope_id, stored_at, properties)"
    " VALUES (?, ?, ?, ?, ?, ?, ?)"
)


@attrs.frozen
class StoredMessage:
    """One message as it lies on disk."""

    number: int
    topic: bytes
    payload: bytes
    qos: int
    retain: bool
    envelope_id: str | None
    stored_at: float
    properties: bytes


@attrs.define(eq=False)
class _Write:
    """What one caller wants committed."""

    statement: str
    row: tuple[object, ...]
    committed: Callable[[int], None]
    """Called inside the commit's turn, with the number of the last row inserted."""
    failed: Callable[[OutboxError], None] | None = None
    """Called instead, for a caller that does not wait."""
    error: OutboxError | None = None
    over: bool = False


_outboxes: weakref.WeakSet[Outbox] = weakref.WeakSet()


class Outbox:
    """One open outbox file. Any thread; each call but `discard` and `store_soon` may wait for the disk.

    Raises:
        OutboxError: The file cannot be opened, or another process has it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        wall_clock: Callable[[], float] = time.time,
        client_id: str = "",
    ) -> None:
        self.path = Path(path)
        self._client_id = client_id
        self._wall_clock = wall_clock
        # Held by whoever uses the connection; a caller that finds it taken leaves its write to be shared.
        self._turn = threading.Lock()
        self._closed = False
        # Guarded by _lock:
        self._lock = threading.Lock()
        self._writes: deque[_Write] = deque()
        self._discarded: list[tuple[int]] = []
        self._connection = self._open()
        _outboxes.add(self)

    # -- outgoing messages --------------------------------------------------------------------

    def store(
        self,
        topic: bytes,
        payload: bytes,
        qos: int,
        retain: bool,
        envelope_id: str | None,
        stored: Callable[[int], None],
        properties: bytes = b"",
    ) -> None:
        """Return when the message is on disk; *stored* has been called with its number, in order of numbers.

        Raises:
            OutboxError: It could not be written; the message is not stored.
        """
        row = (topic, payload, qos, retain, envelope_id, self._wall_clock(), properties)
        self._commit(_Write(_INSERT, row, stored))

    def store_soon(
        self,
        topic: bytes,
        payload: bytes,
        qos: int,
        retain: bool,
        envelope_id: str | None,
        stored: Callable[[int], None],
        failed: Callable[[OutboxError], None],
        properties: bytes = b"",
    ) -> None:
        """Leave the message to the next `commit`, which calls *stored* as `store` does, or *failed*. Does not block."""
        row = (topic, payload, qos, retain, envelope_id, self._wall_clock(), properties)
        with self._lock:
            self._writes.append(_Write(_INSERT, row, stored, failed))

    def commit(self) -> None:
        """Write what was left by `store_soon`."""
        with self._turn:
            self._commit_gathered()

    def discard(self, number: int) -> None:
        """The broker has the message: it may be deleted with the next `prune`. Does not block."""
        with self._lock:
            self._discarded.append((number,))

    def prune(self) -> None:
        """Delete what was discarded; nothing once it is closed.

        Raises:
            OutboxError: It could not be written; the next call tries again.
        """
        with self._turn:
            if not self._closed:
                self._prune()

    def _prune(self) -> None:
        with self._lock:
            discarded, self._discarded = self._discarded, []
        if not discarded:
            return
        try:
            self._delete(discarded)
        except BaseException:
            with self._lock:
                self._discarded += discarded
            raise

    def _delete(self, numbers: list[tuple[int]]) -> None:
        with self._reported():
            # A deletion that a power cut undoes costs a repetition, not a message.
            self._connection.execute("PRAGMA synchronous = NORMAL")
            try:
                with self._connection:
                    self._connection.execute("BEGIN")
                    self._connection.executemany("DELETE FROM outgoing WHERE number = ?", numbers)
            finally:
                self._connection.execute("PRAGMA synchronous = FULL")

    def fetch(self, after: int, most: int) -> list[StoredMessage]:
        """Read stored messages in order, from the first number above *after*."""
        with self._turn, self._reported():
            rows = self._connection.execute(
                "SELECT number, topic, payload, qos, retain, envelope_id, stored_at, properties FROM outgoing"
                " WHERE number > ? ORDER BY number LIMIT ?",
                (after, most),
            ).fetchall()
        return [
            StoredMessage(number, topic, payload, qos, bool(retain), envelope_id, stored_at, properties)
            for number, topic, payload, qos, retain, envelope_id, stored_at, properties in rows
        ]

    def totals(self) -> tuple[int, int]:
        """How many messages are stored, and their bytes."""
        with self._turn, self._reported():
            count, size = self._connection.execute(
                "SELECT count(*), coalesce(sum(length(topic) + length(payload) + length(properties)), 0)"
                " FROM outgoing"
            ).fetchone()
        return count, size

    # -- what was handled ---------------------------------------------------------------------

    def remember(self, key: str, ttl: float, instead_of: object = None) -> None:
        """Return when it is on disk that *key* was handled, and that another key is not remembered any more."""
        if instead_of is not None:
            with self._lock:
                self._writes.append(_Write("DELETE FROM seen WHERE key = ?", (instead_of,), lambda _: None))
        row = (key, self._wall_clock() + ttl)
        self._commit(_Write("INSERT OR REPLACE INTO seen VALUES (?, ?)", row, lambda _: None))

    def remembered(self, most: int) -> list[tuple[str, float]]:
        """Up to *most* keys that are not expired, latest last, with the seconds that they have left.

        All others are deleted.
        """
        now = self._wall_clock()
        with self._turn, self._reported():
            with self._connection:
                self._connection.execute("BEGIN")
                self._connection.execute(
                    "DELETE FROM seen WHERE expires_at <= ?"
                    " OR key NOT IN (SELECT key FROM seen ORDER BY expires_at DESC LIMIT ?)",
                    (now, most),
                )
            rows = self._connection.execute("SELECT key, expires_at FROM seen ORDER BY expires_at").fetchall()
        return [(key, expires_at - now) for key, expires_at in rows]

    # -- the file -----------------------------------------------------------------------------

    def close(self) -> None:
        """Write what waits, delete what was discarded, and let go of the file. Idempotent."""
        with self._turn:  # all in one: who prunes beside it has had the turn before, or finds it closed
            if self._closed:
                return
            self._commit_gathered()
            with contextlib.suppress(OutboxError):
                self._prune()
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._closed = True

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.OperationalError as error:
            raise self._refused(error) from error
        except sqlite3.DatabaseError as error:
            aside = self._set_aside()
            logger.error(
                "the outbox %s is damaged (%s): it was set aside as %s, and a new one begun",
                self.path,
                error,
                aside.name,
                extra={"client_id": self._client_id},
            )
        try:
            return self._connect()
        except sqlite3.Error as error:
            raise self._refused(error) from error

    def _connect(self) -> sqlite3.Connection:
        with contextlib.suppress(OSError):  # SQLite says it better
            # Messages are nobody else's business. What SQLite puts beside the file is as open as that is. Never
            # a file that is there: closing it would take away the locks that this process has on it.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        connection = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            # No other process may have the file, so no shared memory is needed beside it either.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN EXCLUSIVE")
            connection.execute("COMMIT")
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError("its pages do not fit together")
            connection.executescript(_SCHEMA)
            columns = [name for _, name, *_ in connection.execute("PRAGMA table_info(outgoing)")]
            if "properties" not in columns:  # a file from before there were any
                connection.execute("ALTER TABLE outgoing ADD COLUMN properties BLOB NOT NULL DEFAULT x''")
        except BaseException:
            connection.close()
            raise
        return connection

    def _set_aside(self) -> Path:
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(self._wall_clock()))
        aside = self.path.with_name(f"{self.path.name}.damaged-{stamp}")
        try:
            self.path.rename(aside)
            wal = self.path.with_name(self.path.name + "-wal")
            if wal.exists():
                wal.rename(aside.with_name(aside.name + "-wal"))
        except OSError as error:
            raise OutboxError(
                f"the outbox {str(self.path)!r} is damaged and cannot be moved: {error}"
            ) from error
        return aside

    def _refused(self, error: sqlite3.Error) -> OutboxError:
        if "locked" in str(error):
            return OutboxError(
                f"the outbox {str(self.path)!r} is in use by another process: give each process a file of its own"
            )
        return OutboxError(
            f"the outbox {str(self.path)!r} cannot be opened: {error}; check the path and its rights"
        )

    # -- group commit -------------------------------------------------------------------------

    def _commit(self, write: _Write) -> None:
        try:
            with self._lock:
                self._writes.append(write)
            # Whoever gets the turn commits what has gathered meanwhile, its own write included.
            with self._turn:
                if not write.over:
                    self._commit_gathered()
        except BaseException:  # Ctrl-C, as a rule
            self._take_back(write)
            raise
        if write.error is not None:
            raise fresh(write.error)

    def _take_back(self, write: _Write) -> None:
        """Nobody waits for *write* any more: it is over already, or never happens."""
        with self._turn, self._lock, contextlib.suppress(ValueError):
            self._writes.remove(write)

    def _commit_gathered(self) -> None:
        """Commit all writes. Those that are not over, because the commit was interrupted, are left to the next."""
        with self._lock:
            writes = list(self._writes)
        if not writes:
            return
        rows: list[int] = []
        error: OutboxError | None = None
        try:
            with self._reported():
                self._write(writes, rows)
        except OutboxError as failure:
            error = failure
        except BaseException:
            if len(rows) == len(writes):  # it came when they were on disk
                self._tell(zip(writes, rows, strict=True))
            raise
        self._tell(zip(writes, [0] * len(writes) if error else rows, strict=True), error)

    def _write(self, writes: list[_Write], rows: list[int]) -> None:
        """Put *writes* on disk, and the number of each one's last row in *rows*; unless they are there, it is empty."""
        connection = self._connection
        try:
            connection.execute("BEGIN")
            rows.extend(connection.execute(write.statement, write.row).lastrowid or 0 for write in writes)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                rows.clear()
                connection.rollback()
            raise

    def _tell(self, ended: Iterator[tuple[_Write, int]], error: OutboxError | None = None) -> None:
        """Tell each write what became of it, and once, also if an interruption comes in between."""
        try:
            for write, row in ended:
                with self._lock:
                    self._writes.popleft()
                write.error = error
                write.over = True  # whoever waits for it cannot look before the turn is over
                if error is None:
                    write.committed(row)
                elif write.failed is not None:
                    write.failed(fresh(error))
        except BaseException:
            self._tell(ended, error)
            raise

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except sqlite3.Error as error:
            text = str(error)
            advice = "free some space" if "full" in text else "check the disk"
            raise OutboxError(f"the outbox {str(self.path)!r} cannot be written: {text}; {advice}") from error


def _after_fork_in_child() -> None:
    # SQLite, if it closed its copy of the connection, would delete the write-ahead log that the parent goes on
    # writing. The end of the interpreter frees all objects but those with a reference that nobody holds.
    for outbox in list(_outboxes):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(outbox._connection))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
