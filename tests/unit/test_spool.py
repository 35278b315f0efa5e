"""What is run later for an outbox, and that nothing is once it is closed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from tars_mqtt import ClosedError, OutboxError
from tars_mqtt._core.spool import Spool
from tars_mqtt.outbox import Outbox
from tests.support.way_out import outgoing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tars_mqtt._core.outgoing import Outgoing
    from tars_mqtt.message import PublishReceipt


class Stage:
    """A spool on a real file, whose later calls come when the test says so."""

    def __init__(self, path: Path) -> None:
        self.later: list[Callable[[], None]] = []
        self.outbox = Outbox(path)
        self.spool = Spool(self.outbox, lambda _, call: self.later.append(call), 0.0)
        self.stored: list[Outgoing] = []
        self.loaded: list[Outgoing] = []
        self.failed: list[OutboxError] = []

    def store(self) -> Outgoing:
        message = outgoing()
        self.spool.store(message, self.stored.append)
        return message

    def store_soon(self) -> None:
        self.spool.store_soon(outgoing(), self.stored.append, lambda _, error: self.failed.append(error))

    def store_on_disk_only(self) -> PublishReceipt:
        message = self.store()
        assert not self.spool.stays_in_memory(message, 1024)
        self.stored.clear()
        return message.receipt

    def load(self) -> None:
        self.spool.load(self.loaded.extend)

    def run_later(self) -> None:
        later, self.later = self.later, []
        for call in later:
            call()


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path / "outbox.db")


def test_acknowledged_messages_are_deleted_in_one_go(stage: Stage) -> None:
    for message in [stage.store() for _ in range(3)]:
        stage.spool.discard(message)
    assert (len(stage.later), stage.outbox.totals()[0]) == (1, 3)
    stage.run_later()
    assert (stage.later, stage.outbox.totals()[0]) == ([], 0)
    stage.spool.close()


def test_what_fails_is_tried_again(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.spool.discard(stage.store())
    stage.load()
    stage.outbox._connection.execute("DROP TABLE outgoing")
    for attempt in (1, 2):
        stage.run_later()
        assert len(stage.later) == 2
        assert caplog.text.count("trying again") == 2 * attempt
    stage.spool.close()


def test_calls_that_come_after_its_end_do_nothing_and_bring_no_others(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    """Or there would be a thread for them, which nobody ends, and which logs an error each second."""
    message = stage.store()
    stage.spool.discard(message)
    stage.load()
    stage.store_soon()
    assert len(stage.later) == 3
    stage.spool.retire()
    stage.spool.close()
    assert len(stage.stored) == 2, "what waited is written"
    with caplog.at_level(logging.DEBUG):
        stage.run_later()
        stage.spool.discard(message)
        stage.load()
    assert (stage.later, caplog.records) == ([], [])


def test_what_comes_after_its_end_fails_at_once(stage: Stage) -> None:
    stage.spool.retire()
    stage.spool.close()
    stage.store_soon()
    assert len(stage.failed) == 1
    with pytest.raises(OutboxError):
        stage.store()
    assert stage.later == []


def test_what_is_taken_back_while_it_is_only_on_disk_stays_so_though_nobody_holds_the_receipt(
    stage: Stage,
) -> None:
    for number in range(3):
        receipt = stage.store_on_disk_only()
        if number == 1:
            assert receipt.cancel()
    del receipt
    stage.load()
    stage.run_later()
    assert [message.receipt.cancelled() for message in stage.loaded] == [False, True, False]
    assert not stage.spool._taken_back
    stage.loaded[0].receipt.cancel()
    assert not stage.spool._taken_back, "what is in the queue is held there"
    stage.spool.close()


def test_what_was_taken_back_and_is_only_on_disk_does_not_stay_in_the_file(stage: Stage) -> None:
    stage.store_on_disk_only().cancel()
    kept = stage.store_on_disk_only()
    stage.spool.retire()
    assert isinstance(kept.exception(0), ClosedError)
    stage.spool.close()
    outbox = Outbox(stage.outbox.path)
    assert outbox.totals()[0] == 1
    outbox.close()
