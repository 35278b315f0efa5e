"""When to ask the peer for a sign of life, and when to give it up."""

from __future__ import annotations

from tars_mqtt._core.liveness import Liveness


def liveness(keepalive: float = 60.0, patience: float = 90.0) -> Liveness:
    return Liveness(keepalive, patience, received=0.0, sent=0.0)


def test_the_peer_is_asked_after_half_of_the_keepalive_without_traffic():
    peer = liveness()
    assert peer.deadline() == 30.0
    assert not peer.ping_due(29.9)
    assert peer.ping_due(30.0)


def test_a_short_patience_asks_sooner():
    assert liveness(patience=3.0).deadline() == 1.5


def test_it_is_asked_once_until_it_answers():
    peer = liveness()
    peer.asked = 30.0
    assert not peer.ping_due(80.0)
    assert peer.deadline() == 90.0


def test_bytes_in_one_direction_alone_do_not_put_the_question_off():
    """A subscriber that only listens must still send something within the keepalive [MQTT-3.1.2-20]."""
    peer = liveness()
    peer.note(29.0, signs_of_life=100, bytes_out=0)
    assert peer.ping_due(30.0)
    peer = liveness()
    peer.note(29.0, signs_of_life=0, bytes_out=100)
    assert peer.ping_due(30.0)


def test_traffic_in_both_directions_does():
    peer = liveness()
    peer.note(29.0, signs_of_life=100, bytes_out=100)
    assert not peer.ping_due(58.9)
    assert peer.ping_due(59.0)


def test_a_silent_peer_is_overdue_after_the_patience():
    peer = liveness()
    assert peer.overdue(89.9) is None
    assert peer.overdue(90.0) == 90.0


def test_what_we_send_is_no_sign_of_life():
    peer = liveness()
    peer.note(89.0, signs_of_life=0, bytes_out=1000)
    assert peer.overdue(90.0) == 90.0


def test_a_sign_of_life_clears_the_suspicion():
    peer = liveness()
    peer.suspected = True
    peer.note(91.0, signs_of_life=1, bytes_out=0)
    assert not peer.suspected
    assert peer.overdue(92.0) is None


def test_silence_says_nothing_while_we_do_not_listen():
    peer = liveness()
    peer.suspected = True
    peer.excuse(89.0)
    assert not peer.suspected
    assert peer.overdue(100.0) is None


def test_a_peer_that_is_not_read_is_asked_again_for_it_needs_our_pings_as_well():
    """Its answers wait unread; without pings it would take us for dead [MQTT-3.1.2-24]."""
    peer = liveness()
    asked = []
    for now in range(0, 120, 10):
        peer.excuse(now)
        if peer.ping_due(now):
            peer.asked = now
            asked.append(now)
            peer.note(now, signs_of_life=0, bytes_out=len(asked))
    assert asked == [30, 60, 90]
    assert peer.overdue(120.0) is None
