"""Where a client stands: changed by one thread, awaited by others."""

from __future__ import annotations

import threading

from tars_mqtt._core.state import ConnectionState, StateCell

NEW, CONNECTING, CONNECTED, CLOSED = (
    ConnectionState.NEW,
    ConnectionState.CONNECTING,
    ConnectionState.CONNECTED,
    ConnectionState.CLOSED,
)


def test_it_begins_as_new() -> None:
    assert StateCell().value is NEW


def test_replace_changes_only_what_it_expects() -> None:
    cell = StateCell()
    assert not cell.replace(CONNECTED, CLOSED)
    assert cell.value is NEW
    assert cell.replace(NEW, CONNECTING)
    assert cell.value is CONNECTING


def test_waiting_for_what_is_already_true_does_not_wait() -> None:
    assert StateCell().wait(lambda state: state is NEW, 0)


def test_waiting_ends_with_its_time() -> None:
    assert not StateCell().wait(lambda state: state is CONNECTED, 0)


def test_every_waiter_is_woken_by_the_change_it_waits_for() -> None:
    cell = StateCell()
    outcomes: list[bool] = []
    waiters = [
        threading.Thread(
            target=lambda: outcomes.append(cell.wait(lambda state: state is CONNECTED, 10)), daemon=True
        )
        for _ in range(3)
    ]
    for waiter in waiters:
        waiter.start()
    cell.set(CONNECTING)
    cell.set(CONNECTED)
    for waiter in waiters:
        waiter.join(10)
    assert outcomes == [True, True, True]


def test_listeners_hear_each_change_until_they_are_ignored() -> None:
    cell = StateCell()
    heard: list[ConnectionState] = []

    def listener() -> None:
        heard.append(cell.value)

    cell.listen(listener)
    cell.set(CONNECTING)
    cell.replace(CONNECTING, CONNECTED)
    cell.replace(CONNECTING, CLOSED)
    assert heard == [CONNECTING, CONNECTED]
    cell.ignore(listener)
    cell.ignore(listener)
    cell.set(CLOSED)
    assert heard == [CONNECTING, CONNECTED]


def test_a_listener_may_look_listen_and_leave() -> None:
    """It is called without the lock."""
    cell = StateCell()
    heard: list[str] = []

    def once() -> None:
        cell.ignore(once)
        cell.listen(lambda: heard.append("later"))
        heard.append(f"once {cell.wait(lambda state: state is CONNECTED, 0)}")

    cell.listen(once)
    cell.set(CONNECTED)
    cell.set(CLOSED)
    assert heard == ["once True", "later"]
