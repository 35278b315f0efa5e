"""Lanes: what waits for one subscription, and in what order it may be taken."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars_mqtt._core.lane import Delivery, Fifo, Keyed, Lane
from tars_mqtt._core.ledger import Acknowledgement
from tars_mqtt.message import Message


def delivery(name: str, qos: int = 0, key: Hashable = None) -> Delivery:
    message = Message("t", name.encode(), qos)
    return Delivery(message, Acknowledgement(message, 1, 1) if qos else None, key)


def deliveries(names: str, qos: int = 0) -> list[Delivery]:
    """One delivery for each letter; a keyed lane takes the letter as the key."""
    return [delivery(name, qos, name) for name in names]


def names(batch: list[Delivery]) -> str:
    return b"".join(delivery.message.payload for delivery in batch).decode()


# -- fifo ---------------------------------------------------------------------------------


def test_a_fifo_gives_back_in_order_of_arrival_whatever_the_qos() -> None:
    lane = Fifo()
    lane.push([delivery("a"), delivery("b", 1), delivery("c", 1)])
    lane.push([delivery("d"), delivery("e", 2)])
    assert len(lane) == 5
    assert names(lane.take(2)) == "ab"
    assert names(lane.take(64)) == "cde"
    assert lane.take(64) == []
    assert len(lane) == 0


def test_a_fifo_drops_its_oldest_of_qos_0_and_keeps_the_rest_in_order() -> None:
    lane = Fifo()
    lane.push([delivery("a", 1), delivery("b"), delivery("c", 2), delivery("d")])
    dropped = lane.drop_oldest()
    assert dropped is not None
    assert names([dropped]) == "b"
    assert names(lane.take(64)) == "acd"


def test_a_lane_of_qos_1_and_2_has_nothing_to_drop() -> None:
    for lane in (Fifo(), Keyed()):
        lane.push([delivery("a", 1), delivery("b", 2)])
        assert lane.drop_oldest() is None
        assert len(lane) == 2


def test_a_lane_is_cleared_of_everything_at_once_and_can_be_used_again() -> None:
    for lane in (Fifo(), Keyed()):
        lane.push([*deliveries("ab"), *deliveries("ca", 1)])
        assert sorted(names(lane.clear())) == ["a", "a", "b", "c"]
        assert len(lane) == 0
        assert lane.take(64) == []
        lane.push(deliveries("a"))
        assert names(lane.take(64)) == "a"


# -- keyed --------------------------------------------------------------------------------


def test_a_key_in_work_waits_while_others_go() -> None:
    lane = Keyed()
    lane.push(deliveries("aab"))
    first = lane.take(1)
    assert names(first) == "a"
    assert names(lane.take(1)) == "b"
    assert lane.take(1) == []
    assert len(lane) == 1
    lane.finish(first)
    assert names(lane.take(1)) == "a"


def test_what_arrives_for_a_key_in_work_goes_after_it() -> None:
    lane = Keyed()
    lane.push(deliveries("a"))
    first = lane.take(64)
    lane.push(deliveries("a"))
    assert lane.take(64) == []
    lane.finish(first)
    assert names(lane.take(64)) == "a"


def test_one_batch_is_of_one_key() -> None:
    lane = Keyed()
    lane.push(deliveries("aabba"))
    assert names(lane.take(64)) == "aaa"
    assert names(lane.take(64)) == "bb"


def test_keys_take_turns() -> None:
    lane = Keyed()
    lane.push(deliveries("aaaabb"))
    order = ""
    while batch := lane.take(1):
        order += names(batch)
        lane.finish(batch)
    assert order == "ababaa"


def test_a_keyed_lane_drops_the_oldest_of_qos_0_of_all_its_keys() -> None:
    """Not the oldest of whichever key happens to stand first."""
    lane = Keyed()
    lane.push([delivery("1", key="a"), delivery("2", 1, "b"), delivery("3", key="b"), delivery("4", key="a")])
    first = lane.take(1)
    assert names(first) == "1"
    dropped = [lane.drop_oldest(), lane.drop_oldest(), lane.drop_oldest()]
    assert [names([each]) for each in dropped if each is not None] == ["3", "4"]
    assert len(lane) == 1


def test_a_key_all_of_whose_messages_were_dropped_is_forgotten() -> None:
    lane = Keyed()
    lane.push(deliveries("ab"))
    assert lane.drop_oldest() is not None
    assert names(lane.take(64)) == "b"
    assert "a" not in lane._lines


def test_keys_that_are_done_leave_nothing_behind() -> None:
    """A service that orders by device must not remember every device it ever saw."""
    lane = Keyed()
    for number in range(1000):
        lane.push([delivery("x", key=number)])
        lane.finish(lane.take(64))
    assert not lane._lines
    assert not lane._runnable


def test_keys_of_which_everything_was_given_up_leave_nothing_behind() -> None:
    """Topics may be ever new, and handlers blocked for long."""
    lane = Keyed()
    lane.push([delivery("kept", 1, "both"), delivery("lossy", 0, "both")])
    for number in range(100):
        lane.push([delivery("x", key=number)])
    in_work = lane.take(1)
    while lane.drop_oldest() is not None:
        pass
    assert set(lane._lines) == {"both"}
    assert not lane._runnable
    lane.finish(in_work)
    assert not lane._lines


@pytest.mark.parametrize("lane", [Fifo(), Keyed()], ids=["fifo", "keyed"])
def test_a_lane_says_whether_there_is_something_to_take(lane: Lane) -> None:
    """Whoever would ask again and again for what is not there keeps a processor busy."""
    assert not lane.takes()
    lane.push(deliveries("aa"))
    assert lane.takes()
    batch = lane.take(1)
    assert bool(lane.takes()) is isinstance(lane, Fifo), "the key is in work"
    lane.finish(batch)
    assert lane.takes()
    lane.finish(lane.take(64))
    assert not lane.takes()


# -- both, whatever happens ---------------------------------------------------------------

steps = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from("abc"), st.sampled_from([0, 1])),
        st.tuples(st.just("take"), st.integers(1, 4)),
        st.tuples(st.just("finish")),
        st.tuples(st.just("drop")),
        st.tuples(st.just("clear")),
    ),
    max_size=60,
)


@given(steps, st.booleans())
def test_nothing_is_lost_doubled_or_overtaken(steps: list[tuple], keyed: bool) -> None:
    """Within a key the numbers only ever rise, and each number comes out once, one way or another."""
    lane: Lane = Keyed() if keyed else Fifo()
    pushed = 0
    gone: list[int] = []
    lossy: list[int] = []
    last: dict[Hashable, int] = {}
    in_work: list[list[Delivery]] = []
    for step, *arguments in steps:
        if step == "push":
            key, qos = arguments
            each = delivery(str(pushed), qos, key if keyed else None)
            if not qos:
                lossy.append(pushed)
            lane.push([each])
            pushed += 1
        elif step == "take":
            batch = lane.take(*arguments)
            for each in batch:
                number = int(each.message.payload)
                assert number > last.get(each.key, -1)
                last[each.key] = number
                gone.append(number)
                if number in lossy:
                    lossy.remove(number)
            if keyed:
                assert len({each.key for each in batch}) <= 1
                assert not {each.key for each in batch} & {batch[0].key for batch in in_work}
            if batch:
                in_work.append(batch)
        elif step == "finish" and in_work:
            lane.finish(in_work.pop(0))
        elif step == "drop":
            dropped = lane.drop_oldest()
            assert (None if dropped is None else int(dropped.message.payload)) == (lossy or [None])[0]
            gone += lossy[:1]
            del lossy[:1]
        elif step == "clear":
            gone += [int(each.message.payload) for each in lane.clear()]
            lossy.clear()
        assert len(lane) == pushed - len(gone)
    while in_work or lane.takes():
        if in_work:
            lane.finish(in_work.pop(0))
        if batch := lane.take(64):
            gone += [int(each.message.payload) for each in batch]
            in_work.append(batch)
    assert sorted(gone) == list(range(pushed))
