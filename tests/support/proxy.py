"""A TCP proxy in front of a broker that cuts, stalls, slows and spoils what goes through it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections import Counter
from typing import TYPE_CHECKING, Literal

from tests.support import packet as mqtt
from tests.support.port import HOST, address_of, free_port
from tests.support.scripted import RESET

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator
    from types import TracebackType
    from typing import Any, Self

    from tests.support.packet import Packet

    Direction = Literal["to_broker", "to_client"]
    Ending = Literal["FIN", "RST"]

BOTH: tuple[Direction, Direction] = ("to_broker", "to_client")
CHUNK_BYTES = 65_536


class FaultProxy:
    """Passes connections on to a broker; every fault is switched by a method, from the test's thread.

    One thread runs an event loop that owns all sockets: when a method returns, what it promises has happened.

    Args:
        upstream: The broker's URL.
        record: Keep what goes through, for ``packets``.
    """

    def __init__(self, upstream: str, *, record: bool = False) -> None:
        self.port = free_port()
        self.url = f"mqtt://{HOST}:{self.port}"
        self.connections = 0
        """How many there have been."""
        self.bytes_passed: Counter[Direction] = Counter()

        self._upstream = address_of(upstream)
        self._record = record
        self._latency = 0.0
        self._bytes_per_second = 0.0
        self._slice_bytes = 0
        self._slice_pause = 0.0
        self._flips: dict[Direction, dict[int, int]] = {"to_broker": {}, "to_client": {}}
        self._next_flips: dict[Direction, list[tuple[int, int]]] = {"to_broker": [], "to_client": []}
        self._cuts: dict[Direction, int] = {}
        self._errors: list[BaseException] = []

        # owned by the loop's thread
        self._listener: socket.socket | None = None
        self._flowing: dict[Direction, asyncio.Event] = {direction: asyncio.Event() for direction in BOTH}
        self._links: list[_Link] = []
        self._all_links: list[_Link] = []

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self.resume()
        self.accept()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- ends ---------------------------------------------------------------------------------

    def cut(self) -> None:
        """Tear down every connection on both sides (RST). New ones are let through."""
        self._call(self._end_links("RST"))

    def cut_after(self, count: int, direction: Direction) -> None:
        """Tear down the next connection to have passed *count* bytes in this direction, exactly there."""
        self._cuts[direction] = count

    def hang_up(self) -> None:
        """End every connection on both sides in good order (FIN). New ones are let through."""
        self._call(self._end_links("FIN"))

    def half_close(self, direction: Direction = "to_client") -> None:
        """Send FIN in one direction of every connection; the other direction goes on."""

        async def half_close() -> None:
            for link in self._links:
                link.half_close(direction)

        self._call(half_close())

    def refuse(self) -> None:
        """Stop listening: new connections are refused. Those there are stay."""
        self._call(self._refuse())

    def accept(self) -> None:
        """Listen again, on the same port."""
        self._call(self._accept())

    def redirect(self, upstream: str) -> None:
        """Lead new connections to another broker. Those there are stay."""
        self._upstream = address_of(upstream)

    def close(self) -> None:
        """Cut what is open and end the thread. May be called twice."""
        if self._loop.is_closed():
            return
        self.refuse()
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        assert not self._thread.is_alive(), "the proxy's thread does not end"
        self._loop.close()
        if self._errors:
            raise self._errors[0]

    # -- delays -------------------------------------------------------------------------------

    def stall(self, direction: Direction | None = None) -> None:
        """Pass nothing on any more, not even an end, as a blackhole does. New connections are taken."""
        self._call(self._set_flowing(direction, flowing=False))

    def resume(self, direction: Direction | None = None) -> None:
        """Pass on what was held back, and all that follows."""
        self._call(self._set_flowing(direction, flowing=True))

    def latency(self, seconds: float) -> None:
        """Hold everything that arrives from now on back for so long, in each direction; 0 ends it."""
        self._latency = seconds

    def bandwidth(self, bytes_per_second: float) -> None:
        """Pass on no more than this per connection and direction; 0 ends it."""
        self._bytes_per_second = bytes_per_second

    def slice(self, count: int, pause: float = 0.0) -> None:
        """Pass on at most *count* bytes at a time, with a *pause* after each piece; 0 ends it."""
        self._slice_bytes = count
        self._slice_pause = pause

    # -- spoilt bytes, and what there was -----------------------------------------------------

    def flip_bit(self, offset: int, direction: Direction, bit: int = 0) -> None:
        """Turn over one bit, once: in the next connection whose byte at *offset* goes through."""
        self._flips[direction][offset] = 1 << bit

    def flip_next_bit(self, direction: Direction, bit: int = 0, after: int = 0) -> None:
        """Turn over one bit, once, of what goes through from now on: in its first byte, or so many *after* that."""

        async def flip() -> None:
            self._next_flips[direction].append((after, 1 << bit))

        self._call(flip())

    @property
    def flips_to_come(self) -> int:
        """Bits that are still to be turned over."""
        return sum(map(len, [*self._flips.values(), *self._next_flips.values()]))

    @property
    def open_connections(self) -> int:
        return len(self._links)

    def passed(self, direction: Direction) -> int:
        """How many bytes have gone through the busiest open connection in this direction; for ``cut_after``."""
        return max((link.passed[direction] for link in tuple(self._links)), default=0)

    def packets(self, direction: Direction, connection: int = -1) -> list[Packet]:
        """The whole packets that one connection, by default the last one, has passed on."""
        assert self._record, "the proxy was made without record=True"
        data = bytes(self._all_links[connection].recorded[direction])
        return list(_packets_in(data))

    # -- on the loop's thread -----------------------------------------------------------------

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _set_flowing(self, direction: Direction | None, *, flowing: bool) -> None:
        for each in [direction] if direction else BOTH:
            if flowing:
                self._flowing[each].set()
            else:
                self._flowing[each].clear()

    async def _accept(self) -> None:
        if self._listener is None:
            self._listener = socket.create_server((HOST, self.port))
            self._listener.setblocking(False)
            self._loop.add_reader(self._listener, self._take_connection, self._listener)

    async def _refuse(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    async def _end_links(self, ending: Ending) -> None:
        links = list(self._links)
        for link in links:
            link.ending = ending
            link.task.cancel()
        if links:
            await asyncio.wait([link.task for link in links])

    def _take_connection(self, listener: socket.socket) -> None:
        # A task in loop.sock_accept() would lose a connection that comes as the task is cancelled.
        try:
            client, _ = listener.accept()
        except OSError:  # it has left already
            return
        link = _Link(client)
        link.task = self._loop.create_task(self._serve(link))
        link.task.add_done_callback(lambda task: self._ended(link, task))
        self.connections += 1
        self._links.append(link)
        self._all_links.append(link)

    def _ended(self, link: _Link, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self._errors.append(error)
        self._links.remove(link)
        link.close()

    async def _serve(self, link: _Link) -> None:
        try:
            await self._loop.sock_connect(link.broker, self._upstream)
            async with asyncio.TaskGroup() as group:
                for direction in BOTH:
                    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=16)
                    group.create_task(self._read(link, direction, queue))
                    group.create_task(self._write(link, direction, queue))
        except* OSError:
            # One side has torn the connection down, or the broker is not there: tell the other side so.
            link.ending = "RST"

    async def _read(
        self, link: _Link, direction: Direction, queue: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        data = b"."
        while data:
            await self._flowing[direction].wait()
            data = await self._loop.sock_recv(link.source(direction), CHUNK_BYTES)
            await queue.put((self._loop.time() + self._latency, data))

    async def _write(
        self, link: _Link, direction: Direction, queue: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        while True:
            due, data = await queue.get()
            await asyncio.sleep(due - self._loop.time())
            await self._flowing[direction].wait()
            if not data:
                link.half_close(direction)
                return
            while data:
                await self._flowing[direction].wait()
                size = self._piece_bytes()
                await self._pass(link, direction, data[:size])
                data = data[size:]

    def _piece_bytes(self) -> int:
        limits = [CHUNK_BYTES]
        if self._slice_bytes:
            limits.append(self._slice_bytes)
        if self._bytes_per_second:
            limits.append(max(1, int(self._bytes_per_second / 20)))
        return min(limits)

    async def _pass(self, link: _Link, direction: Direction, piece: bytes) -> None:
        start = link.passed[direction]
        piece = self._spoilt(direction, start, piece)
        cut = self._cuts.get(direction)
        if cut is not None and start <= cut <= start + len(piece):
            del self._cuts[direction]
            piece = piece[: cut - start]
        else:
            cut = None

        await self._loop.sock_sendall(link.sink(direction), piece)
        link.passed[direction] += len(piece)
        self.bytes_passed[direction] += len(piece)
        if self._record:
            link.recorded[direction] += piece
        if cut is not None:
            raise ConnectionAbortedError(f"cut after {cut} bytes")

        if self._bytes_per_second:
            await asyncio.sleep(len(piece) / self._bytes_per_second)
        if self._slice_bytes:
            await asyncio.sleep(self._slice_pause)

    def _spoilt(self, direction: Direction, start: int, piece: bytes) -> bytes:
        spoilt = bytearray(piece)
        flips = self._flips[direction]
        for offset in [offset for offset in flips if start <= offset < start + len(piece)]:
            spoilt[offset - start] ^= flips.pop(offset)
        later = []
        for after, mask in self._next_flips[direction]:
            if after < len(piece):
                spoilt[after] ^= mask
            else:
                later.append((after - len(piece), mask))
        self._next_flips[direction] = later
        return bytes(spoilt)


class _Link:
    """One connection of a client and its twin to the broker."""

    task: asyncio.Task[None]

    def __init__(self, client: socket.socket) -> None:
        self.ending: Ending = "FIN"
        self.passed: Counter[Direction] = Counter()
        self.recorded: dict[Direction, bytearray] = {"to_broker": bytearray(), "to_client": bytearray()}
        self.client = client
        self.broker = socket.socket()
        for side in (self.client, self.broker):
            side.setblocking(False)
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def source(self, direction: Direction) -> socket.socket:
        return self.client if direction == "to_broker" else self.broker

    def sink(self, direction: Direction) -> socket.socket:
        return self.broker if direction == "to_broker" else self.client

    def half_close(self, direction: Direction) -> None:
        with contextlib.suppress(OSError):
            self.sink(direction).shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for side in (self.client, self.broker):
            with contextlib.suppress(OSError):
                if self.ending == "RST":
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                else:
                    side.shutdown(socket.SHUT_WR)
                    while side.recv(CHUNK_BYTES):  # what is unread when a socket is closed makes it a reset
                        pass
            side.close()


def _packets_in(data: bytes) -> Iterator[Packet]:
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        if at + count > len(data):
            raise EOFError
        at += count
        return data[at - count : at]

    while True:
        try:
            yield mqtt.read_packet(take)
        except EOFError:
            return
