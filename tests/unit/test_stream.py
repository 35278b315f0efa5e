"""The byte stream: packets come out whole and in order, however the bytes came in."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from types import FrameType

import pytest

from tars_mqtt._core import wire
from tars_mqtt._core.stream import ConnectionLostError, Stream

LIMIT = 1 << 20
PINGRESP_PACKET = bytes((wire.PINGRESP, 0))


@pytest.fixture
def pair() -> Iterator[tuple[Stream, socket.socket]]:
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    peer.setblocking(False)
    stream = Stream(ours, LIMIT, v5=True)
    with contextlib.closing(stream), peer:
        yield stream, peer


class FakeSocket:
    """Gives what it is told to, and takes as many bytes at a time as it is told to."""

    def __init__(self, incoming: list[bytes | Exception] = (), takes: list[int | Exception] = ()) -> None:
        self.incoming = list(incoming)
        self.takes = list(takes)
        self.sent = b""
        self.calls = 0
        self.hidden = 0

    def recv(self, size: int) -> bytes:
        step = self.incoming.pop(0) if self.incoming else BlockingIOError()
        if isinstance(step, Exception):
            raise step
        return step

    def send(self, data: memoryview) -> int:
        self.calls += 1
        step = self.takes.pop(0) if self.takes else len(data)
        if isinstance(step, Exception):
            raise step
        self.sent += bytes(data[:step])
        return min(step, len(data))

    def pending(self) -> int:
        return self.hidden


def stream_over(*incoming: bytes | Exception, limit: int = LIMIT) -> Stream:
    return Stream(FakeSocket(list(incoming)), limit, v5=True)  # type: ignore[arg-type]


def publish(payload: bytes) -> bytes:
    return wire.encode_publish(b"t", payload, 0, False, False, 0, True)


def bodies(packets: list[tuple[int, bytes]]) -> list[bytes]:
    return [body for _, body in packets]


# -- in -----------------------------------------------------------------------------------


def test_packets_that_come_together_are_told_apart(pair) -> None:
    stream, peer = pair
    peer.send(publish(b"one") + PINGRESP_PACKET + publish(b"two"))
    assert [first for first, _ in stream.receive()] == [wire.PUBLISH, wire.PINGRESP, wire.PUBLISH]
    assert stream.receive() == []


def test_a_packet_that_comes_byte_by_byte_comes_out_once_and_whole() -> None:
    packets = [publish(b"x" * size) for size in (0, 1, 124, 125, 200, 16_500)]
    for packet in packets:
        stream = stream_over(*(packet[i : i + 1] for i in range(len(packet))))
        received = [found for _ in range(len(packet)) for found in stream.receive()]
        assert [bytes((first,)) for first, _ in received] == [packet[:1]]
        assert packet.endswith(bodies(received)[0])


def test_however_the_bytes_are_cut_the_packets_are_the_same() -> None:
    draw = random.Random(5)
    packets = [publish(draw.randbytes(draw.choice([0, 3, 130, 5000]))) for _ in range(60)]
    data = b"".join(packets)
    whole = stream_over(data).receive()
    assert len(whole) == 60
    for _ in range(50):
        cuts = sorted(draw.randrange(len(data)) for _ in range(draw.randrange(1, 30)))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if a < b]
        stream = stream_over(*pieces)
        assert [found for _ in pieces for found in stream.receive()] == whole


def test_a_large_packet_is_joined_once() -> None:
    """Joined at every read, ten megabytes would be copied a hundred times over."""
    packet = publish(b"x" * 900_000)
    pieces = [packet[i : i + 1000] for i in range(0, len(packet), 1000)]
    stream = stream_over(*pieces)
    for _ in pieces[:-1]:
        assert stream.receive() == []
    assert len(stream._pieces) >= len(pieces) - 2
    assert len(stream.receive()) == 1
    assert stream._pieces == []


def test_bytes_are_counted_as_they_come(pair) -> None:
    stream, peer = pair
    peer.send(b"\x30\x7f1234")
    assert stream.receive() == []
    assert stream.bytes_in == 6


def test_nothing_to_read_is_nothing_wrong(pair) -> None:
    stream, _ = pair
    assert stream.receive() == []
    for error in (BlockingIOError(), InterruptedError()):
        assert stream_over(error).receive() == []


def test_the_end_of_the_stream_is_a_lost_connection(pair) -> None:
    stream, peer = pair
    peer.close()
    with pytest.raises(ConnectionLostError, match="the broker closed the connection"):
        stream.receive()


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), OSError(113, "No route")]
)
def test_a_failing_socket_is_a_lost_connection(error: OSError) -> None:
    with pytest.raises(ConnectionLostError, match="reading failed: "):
        stream_over(error).receive()


def test_what_came_before_the_end_is_not_lost(pair) -> None:
    stream, peer = pair
    peer.send(publish(b"last"))
    peer.close()
    assert len(stream.receive()) == 1
    with pytest.raises(ConnectionLostError):
        stream.receive()


def test_a_packet_above_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(wire.MalformedPacketError, match="above the limit"):
        stream_over(b"\x90\xff\xff\x7f", limit=100).receive()


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_of_a_message_above_the_limit_only_the_head_comes_in_its_turn(size: int) -> None:
    """However the bytes are cut, and whatever stands before and behind it."""
    large = wire.encode_publish(b"to/large", b"x" * 5000, 1, True, False, 77, True)
    data = publish(b"one") + large + PINGRESP_PACKET + large + publish(b"two")
    stream = stream_over(*(data[i : i + size] for i in range(0, len(data), size)), limit=1000)
    found: list[tuple[int, bytes]] = []
    while stream.has_more() or stream._socket.incoming:
        found += stream.receive()
    firsts = [wire.PUBLISH, wire.PASSED_OVER | 0x03, wire.PINGRESP, wire.PASSED_OVER | 0x03, wire.PUBLISH]
    assert [first for first, _ in found] == firsts
    assert found[1][1] == found[3][1] == b"\0\x08to/large" + bytes((0, 77))


def test_a_message_above_the_limit_is_not_held() -> None:
    """Not even one that claims to be as large as can be: its topic is all that stays."""
    head = b"\x32\xff\xff\xff\x7f" + b"\xff\xff" + b"t" * 65_535 + b"\0\x01"
    piece = b"x" * 65_536
    stream = stream_over(head, *[piece] * 4095, limit=1000)
    tracemalloc.start()
    try:
        while not (found := stream.receive()):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [(first, len(body)) for first, body in found] == [(wire.PASSED_OVER | 0x02, 2 + 65_535 + 2)]
    assert peak < 1_000_000


def test_good_packets_before_a_bad_one_come_out_first() -> None:
    stream = stream_over(publish(b"good") + b"\x00\x00")
    assert len(stream.receive()) == 1
    with pytest.raises(wire.MalformedPacketError):
        stream.receive()


def test_bytes_inside_the_tls_layer_are_seen() -> None:
    stream = stream_over()
    assert not stream.has_more()
    stream._socket.hidden = 5  # type: ignore[attr-defined]
    assert stream.has_more()


def test_a_plain_socket_hides_nothing(pair) -> None:
    assert not pair[0].has_more()


# -- out ----------------------------------------------------------------------------------


def test_packets_leave_in_order_in_one_call() -> None:
    sock = FakeSocket()
    stream = Stream(sock, LIMIT, v5=True)  # type: ignore[arg-type]
    packets = [publish(str(number).encode()) for number in range(50)]
    for packet in packets:
        stream.write(packet)
    assert stream.outgoing_bytes == sum(map(len, packets))
    assert stream.flush()
    assert sock.sent == b"".join(packets)
    assert sock.calls == 1
    assert stream.outgoing_bytes == 0
    assert stream.bytes_out == len(sock.sent)


def test_a_socket_that_takes_little_gets_every_byte_once() -> None:
    sock = FakeSocket(takes=[1, 3, BlockingIOError(), 7, InterruptedError(), 100])
    stream = Stream(sock, LIMIT, v5=True)  # type: ignore[arg-type]
    packets = [publish(bytes([65 + number]) * 60) for number in range(4)]
    stream.write(packets[0])
    stream.write(packets[1])
    assert not stream.flush(), "the socket is full"
    assert stream.outgoing_bytes == len(packets[0] + packets[1]) - 4
    stream.write(packets[2])
    assert not stream.flush()
    stream.write(packets[3])
    assert stream.flush()
    assert sock.sent == b"".join(packets)


def test_progress_is_seen_through_a_full_socket_only() -> None:
    """What a socket takes at once says nothing about the peer; what it takes after it was full, does."""
    fake = FakeSocket(takes=[4, BlockingIOError(), 5, BlockingIOError()])
    stream = Stream(fake, LIMIT, v5=True)  # type: ignore[arg-type]
    stream.write(b"x" * 20)
    assert not stream.flush()
    assert stream.drained_bytes == 0
    assert not stream.flush()
    assert stream.drained_bytes == 5
    assert stream.flush()
    assert stream.drained_bytes == 16
    stream.write(b"y")
    assert stream.flush()
    assert stream.drained_bytes == 16


def test_very_much_is_sent_in_pieces_and_nothing_is_torn() -> None:
    sock = FakeSocket()
    stream = Stream(sock, LIMIT, v5=True)  # type: ignore[arg-type]
    packets = [
        publish(bytes([number]) * size) for number, size in enumerate([200_000, 100_000, 300_000, 10, 20])
    ]
    for packet in packets:
        stream.write(packet)
    assert stream.flush()
    assert sock.sent == b"".join(packets)
    assert 1 < sock.calls < 5


def test_flushing_nothing_costs_no_call() -> None:
    sock = FakeSocket()
    assert Stream(sock, LIMIT, v5=True).flush()  # type: ignore[arg-type]
    assert sock.calls == 0


def test_writing_to_a_broken_socket_is_a_lost_connection() -> None:
    sock = FakeSocket(takes=[BrokenPipeError(32, "Broken pipe")])
    stream = Stream(sock, LIMIT, v5=True)  # type: ignore[arg-type]
    stream.write(b"\xc0\x00")
    with pytest.raises(ConnectionLostError, match="writing failed: "):
        stream.flush()


# -- from another thread ------------------------------------------------------------------


def test_a_packet_may_be_sent_past_the_network_thread(pair) -> None:
    stream, peer = pair
    assert stream.sends_now
    packet = publish(b"now")
    assert stream.send_now(packet)
    assert peer.recv(1000) == packet
    assert stream.outgoing_bytes == 0
    assert stream.bytes_out == len(packet)


def test_no_packet_is_sent_past_others(pair) -> None:
    stream, peer = pair
    first, second = publish(b"1"), publish(b"2")
    stream.write(first)
    assert not stream.send_now(second)
    assert stream.flush()
    assert stream.send_now(second)
    assert peer.recv(1000) == first + second


def test_what_the_socket_does_not_take_leaves_first() -> None:
    sock = FakeSocket(takes=[3])
    stream = Stream(sock, LIMIT, v5=True)  # type: ignore[arg-type]
    stream.sends_now = True
    first, second = publish(b"1"), publish(b"2")
    assert stream.send_now(first)
    assert stream.outgoing_bytes == len(first) - 3
    assert stream.cut_short == 1
    assert not stream.send_now(second)
    stream.write(second)
    assert stream.flush()
    assert sock.sent == first + second
    assert stream.cut_short == 0
    assert stream.bytes_out == len(sock.sent)


@pytest.mark.parametrize("error", [BlockingIOError(), BrokenPipeError(32, "Broken pipe")])
def test_a_packet_that_the_socket_refuses_is_still_the_callers(error: OSError) -> None:
    """What is wrong with the connection is for the network thread to find out."""
    sock = FakeSocket(takes=[error])
    stream = Stream(sock, LIMIT, v5=True)  # type: ignore[arg-type]
    stream.sends_now = True
    assert not stream.send_now(publish(b"1"))
    assert (stream.outgoing_bytes, stream.bytes_out, sock.sent) == (0, 0, b"")


def test_nothing_is_sent_on_a_connection_that_is_over(pair) -> None:
    """Its descriptor may belong to somebody else by now."""
    stream, _ = pair
    stream.close()
    assert not stream.send_now(publish(b"1"))


def test_nothing_follows_a_goodbye(pair) -> None:
    stream, peer = pair
    stream.send_no_more()
    assert not stream.send_now(publish(b"1"))
    stream.write(b"\xe0\x00")
    assert stream.flush()
    assert peer.recv(1000) == b"\xe0\x00"


def test_what_is_no_plain_socket_is_the_network_threads_alone() -> None:
    assert not Stream(FakeSocket(), LIMIT, v5=True).sends_now  # type: ignore[arg-type]


def received(peer: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(BlockingIOError):
        while piece := peer.recv(1 << 16):
            data += piece
    return data


def test_many_threads_tear_no_packet(pair) -> None:
    """The network thread writes, flushes and is flushed past, all at once; the peer reads slowly."""
    stream, peer = pair
    counts = [0] * 4
    data = bytearray()

    def send(index: int) -> None:
        for number in range(500):
            packet = publish(b"%d:%d" % (index, number) + b"x" * (number * 37 % 3000))
            while not stream.send_now(packet):
                time.sleep(0)
            counts[index] += 1

    threads = [threading.Thread(target=send, args=(index,), daemon=True) for index in range(4)]
    for thread in threads:
        thread.start()
    written = 0
    while any(thread.is_alive() for thread in threads) or stream.outgoing_bytes:
        stream.write_all([publish(b"n:%d" % written), publish(b"n:%d" % (written + 1))])
        written += 2
        while not stream.flush():
            data += received(peer)
        data += received(peer)
    data += received(peer)
    assert counts == [500] * 4
    packets, consumed, _ = wire.split_packets(bytes(data), LIMIT)
    assert consumed == len(data), "something was torn"
    names = [
        wire.decode_publish(first, data[start:end], v5=True)[1].rstrip(b"x") for first, start, end in packets
    ]
    for origin, count in [(b"n", written), *((b"%d" % index, 500) for index in range(4))]:
        mine = [name for name in names if name.startswith(origin + b":")]
        assert mine == [b"%s:%d" % (origin, number) for number in range(count)]


class _Interrupt(Exception):
    """Comes out of a signal handler, as KeyboardInterrupt does."""


def test_an_interrupt_tears_no_packet(pair) -> None:
    """Whether it comes before a packet is sent or after, the stream knows what went."""
    stream, peer = pair
    stream._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    def interrupt(_: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code is Stream.send_now.__code__:
            raise _Interrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    main, done = threading.main_thread().ident, threading.Event()
    assert main is not None
    assert threading.get_ident() == main
    packet = publish(b"y" * 20_000)
    data = bytearray()
    interrupts = 0

    def disturb() -> None:
        while not done.wait(random.uniform(0, 0.0002)):
            signal.pthread_kill(main, signal.SIGUSR1)

    def flush_and_read() -> None:
        while not done.is_set() or stream.outgoing_bytes:
            stream.flush()
            data.extend(received(peer))
        data.extend(received(peer))

    threads = [threading.Thread(target=each, daemon=True) for each in (disturb, flush_and_read)]
    try:
        try:
            for thread in threads:
                thread.start()
            while interrupts < 300:
                try:
                    while True:
                        if not stream.send_now(packet):  # taken in part
                            time.sleep(0)
                except _Interrupt:
                    interrupts += 1
        finally:
            done.set()
            for thread in threads:
                thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    _, consumed, _ = wire.split_packets(bytes(data), LIMIT)
    assert consumed == len(data), "something was torn"


# -- the end ------------------------------------------------------------------------------


def test_a_stream_may_be_closed_twice(pair) -> None:
    stream, _ = pair
    assert stream.fileno() > 0
    stream.close()
    stream.close()
    assert stream.fileno() == -1
