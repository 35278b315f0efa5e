"""No client: a socket, and the packets that it cannot do without. Nothing is decoded, nothing handled."""

from __future__ import annotations

import time

from bench.event import TOPIC, TYPE, data, encode
from bench.far import Connection, packet
from bench.job import Arrivals, Job, Trips, ready

_GATHERING_TIME = 0.00002
"""Seconds; more or less of it made it slower."""


class Bare:
    def __init__(self, job: Job) -> None:
        self._job = job

    def work(self) -> None:
        getattr(self, f"run_{self._job.run}")()

    def _connect(self) -> Connection:
        connection = Connection(self._job.port, b"bench")
        for topic_filter in self._job.topic_filters:
            body = b"\x00\x01" + _text(topic_filter) + bytes([self._job.qos])
            connection.send(packet(0x82, body))
            connection.count(0x90)
        return connection

    def run_receive(self) -> None:
        job = self._job
        connection = self._connect()
        arrivals = Arrivals(job.messages, lambda: None)
        arrivals.start()
        ready()
        left = job.messages
        while left:
            time.sleep(_GATHERING_TIME)
            bodies = connection.bodies(0x30)
            for body in bodies:
                arrivals(body)
            if job.qos:
                connection.send(b"".join(map(_acknowledgement, bodies)))
            left -= len(bodies)
        arrivals.report()

    def run_round_trip(self) -> None:
        job = self._job
        connection = self._connect()
        message = packet(0x30, _text(TOPIC) + encode(TYPE, data(0)))
        ready()
        trips = Trips()
        for _ in range(job.messages):
            trips.leave()
            connection.send(message)
            connection.count(0x30)
            trips.come_back()
        trips.report()


def _text(text: str) -> bytes:
    return len(text).to_bytes(2, "big") + text.encode()


def _acknowledgement(body: bytes) -> bytes:
    start = 2 + int.from_bytes(body[:2])
    return b"\x40\x02" + body[start : start + 2]
