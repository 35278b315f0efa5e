"""Processes killed at the worst moment, and files that fail: what was accepted goes out, what was handled stays so."""

from __future__ import annotations

import logging
import subprocess
from typing import TYPE_CHECKING

import pytest

from tars_mqtt import OutboxError
from tests.support import Broker, FaultProxy, eventually, numbers
from tests.support.program import Program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What each program begins with: a client of the colour that the test asks for.
CLIENT = """
import os, signal
from tests.support.colour import ClientMaker

colour, url, path = sys.argv[1:4]
make_client = ClientMaker(colour)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


"""

KEPT = {"dedupe_ttl": 600, "dedupe_max_entries": 10_000}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "outbox.db")


class Listener:
    """Hears what arrives at the broker: everything, and each event once."""

    def __init__(self, make_client, url: str) -> None:
        self.all: list[bytes] = []
        self.once: list[bytes] = []
        client = make_client(url)
        client.subscribe("a", self.all.append, 1)
        client.connect()
        other = make_client(url, **KEPT)
        other.subscribe("a", self.once.append, 1)
        other.connect()


# -- the publisher is killed --------------------------------------------------------------------------

ENDLESS = (
    CLIENT
    + """
client = make_client(url, client_id="publisher", outbox=path)
client.connect()
number = int(sys.argv[4])
while True:
    client.submit_event("a", "n", number, qos=1)
    say("accepted", number)
    number += 1
"""
)


def test_kill_9_of_a_publisher_loses_nothing_that_it_had_accepted(
    make_client, network: FaultProxy, path
) -> None:
    """In the middle of its work, three times, with a slow link in between; the next process sends the rest."""
    listener = Listener(make_client, network.url)
    accepted: set[int] = set()
    network.latency(0.02)
    for start in (0, 100_000, 200_000):
        with Program(ENDLESS, make_client.colour, network.url, path, str(start)) as publisher:
            publisher.wait_for(f"accepted {start + 150}")
            publisher.kill()
            publisher.wait()
            lines = publisher.output.splitlines()
        accepted |= {int(line.split()[1]) for line in lines if line.startswith("accepted ")}
    heir = make_client(network.url, client_id="publisher", outbox=path)
    heir.connect()
    eventually(lambda: accepted <= set(numbers(listener.once)))
    heard = numbers(listener.once)
    assert heard == sorted(heard), "in the order in which they were accepted"
    assert len(heard) == len(set(heard)), "under one id each"


PLACES = {
    "before the commit": "tars_mqtt.outbox.Outbox.store",
    "after the commit": "tars_mqtt.outbox.Outbox.store",
    "before an acknowledgement is read": "tars_mqtt._core.outbound.Outbound.acknowledged",
    "before what was acknowledged is deleted": "tars_mqtt.outbox.Outbox.prune",
}

KILLED_AT = (
    CLIENT
    + """
from unittest import mock

place, name, most = sys.argv[4], sys.argv[5], int(sys.argv[6])
module, _, function = name.rpartition(".")
owner = __import__("pkgutil").resolve_name(module)
original = getattr(owner, function)
calls = 0


def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls > most and place != "after the commit":
        die()
    result = original(*args, **kwargs)
    if calls > most:
        die()
    return result


setattr(owner, function, dying)
client = make_client(url, client_id="publisher", outbox=path)
client.connect()
for number in range(40):
    client.submit_event("a", "n", number, qos=1)
    say("accepted", number)
time.sleep(30)
"""
)


@pytest.mark.parametrize("place", list(PLACES))
def test_a_publisher_killed_at_any_step_sends_everything_accepted_and_each_under_one_id(
    make_client, broker: Broker, path: str, place: str
) -> None:
    """Between store and send, send and acknowledgement, acknowledgement and deletion."""
    listener = Listener(make_client, broker.url)
    arguments = make_client.colour, broker.url, path, place, PLACES[place]
    with Program(KILLED_AT, *arguments, "20" if "commit" in place else "0") as publisher:
        assert publisher.wait() == -9
        lines = publisher.output.splitlines()
    accepted = [int(line.split()[1]) for line in lines if line.startswith("accepted ")]
    heir = make_client(broker.url, client_id="publisher", outbox=path)
    heir.connect()
    stored = len(accepted) + (place == "after the commit")
    eventually(lambda: set(range(stored)) <= set(numbers(listener.once)))
    eventually(lambda: heir.stats().queued == 0)
    heard = numbers(listener.once)
    assert heard in (list(range(stored)), list(range(stored + 1)))
    if place == "before the commit":
        assert len(heard) == stored == 20
        assert len(accepted) == 20


# -- the subscriber is killed -------------------------------------------------------------------------

WORKER = (
    CLIENT
    + """
client = make_client(url, client_id="worker")


def handler(payload):
    number = payload.decode()
    say("begins", number)
    time.sleep(60 if number == sys.argv[-1] else 0.01)
    say("handled", number)


client.subscribe("work", handler, 1, concurrency=2)
client.connect()
time.sleep(60)
"""
)


def test_kill_9_of_a_subscriber_in_the_middle_of_its_handlers_loses_nothing(
    make_client, broker: Broker, path: str
) -> None:
    """What was begun and not finished comes again, to a later process."""
    boss = make_client(broker.url)
    boss.connect()
    begun, handled = [], []
    for life in range(3):
        last = str(30 * life + 25) if life < 2 else "none"
        with Program(WORKER, make_client.colour, broker.url, path, last) as worker:
            if life == 0:
                eventually(lambda: "Received SUBSCRIBE from worker" in broker.log)
                for number in range(100):
                    boss.publish("work", str(number), qos=1)
            if life < 2:
                worker.wait_for(f"begins {last}\n")
                worker.kill()
                worker.wait()
            else:
                worker.wait_for("handled 99\n")
                worker.wait_for("handled 98\n")
            lines = worker.output.splitlines()
        begun.append([int(line.split()[1]) for line in lines if line.startswith("begins ")])
        handled.append([int(line.split()[1]) for line in lines if line.startswith("handled ")])
    assert {number for life in handled for number in life} == set(range(100))
    for life in (0, 1):
        unfinished = set(begun[life]) - set(handled[life])
        # Not always the next one: where the kill came late, that is killed before it gets as far.
        assert unfinished <= {number for later in handled[life + 1 :] for number in later}


HANDLED_THEN_KILLED = (
    CLIENT
    + """
from tars_mqtt._core.ledger import Ledger

original = Ledger.take_due


def take_due(ledger):
    if ledger._order and ledger._order[0].finished:
        die()
    return original(ledger)


Ledger.take_due = take_due
client = make_client(
    url, client_id="worker", outbox=path, dedupe_durable=True, dedupe_ttl=600, dedupe_max_entries=100
)
def work(payload):
    say("handled")


client.subscribe("work", work, 1)
client.connect()
say("ready")
time.sleep(60)
"""
)


def test_an_event_handled_by_a_process_that_was_killed_before_its_acknowledgement_is_not_handled_again(
    make_client, broker: Broker, path: str
) -> None:
    """Durable deduplication: effectively once, over a kill."""
    boss = make_client(broker.url)
    boss.connect()
    with Program(HANDLED_THEN_KILLED, make_client.colour, broker.url, path) as worker:
        worker.wait_for("ready")
        boss.publish_event("work", "n", 1, qos=1)
        assert worker.wait() == -9
        assert worker.output.count("handled") == 1
    again: list[bytes] = []
    others: list[bytes] = []

    def work(payload: bytes) -> None:
        again.append(payload)

    work.__qualname__ = "work"  # as in the program
    heir = make_client(broker.url, client_id="worker", outbox=path, dedupe_durable=True, **KEPT)
    heir.subscribe("work", others.append, 1)  # a release later, and before the other
    heir.subscribe("work", work, 1)
    heir.connect()
    eventually(lambda: heir.stats().duplicates == 1)
    boss.publish_event("work", "n", 2, qos=1)
    eventually(lambda: numbers(again) == [2])
    eventually(lambda: numbers(others) == [1, 2])


# -- the disk -----------------------------------------------------------------------------------------

FULL_DISK = (
    CLIENT
    + """
from tars_mqtt import OutboxError


def limit_files(size):
    import resource

    if sys.argv[4] == "a file that may not grow":
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))


client = make_client(url, client_id="publisher", outbox=path)
client.connect()
say("connected")
sys.stdin.readline()
limit_files(200_000)
accepted = 0
try:
    for accepted in range(100_000):
        client.submit_event("a", "n", accepted, qos=1, timeout=0)
except OutboxError as error:
    say("refused:", error)
say("accepted", accepted, "in all")
sys.stdin.readline()
limit_files(None)
client.submit_event("a", "n", accepted, qos=1).result(20)
while client.stats().queued:
    time.sleep(0.01)
time.sleep(1.5)  # what could not be deleted is deleted by then
die()
"""
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; for root only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("nobody but root can make a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("kind", ["a file that may not grow", "a disk that is full"])
def test_a_full_disk_is_an_error_for_the_caller_and_loses_nothing(
    make_client, network: FaultProxy, request: pytest.FixtureRequest, path: str, kind: str
) -> None:
    """What was taken before goes out, once, though it cannot be deleted at first; with room it takes more."""
    pytest.importorskip("resource")
    ballast = None
    if kind == "a disk that is full":
        disk = request.getfixturevalue("small_disk")
        path = str(disk / "outbox.db")
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(400_000))
    listener = Listener(make_client, network.url)
    with Program(FULL_DISK, make_client.colour, network.url, path, kind) as publisher:
        publisher.wait_for("connected")
        network.stall("to_broker")
        publisher.say("fill the disk")
        publisher.wait_for(" in all")
        assert "refused: the outbox" in publisher.output
        network.resume("to_broker")
        accepted = int(publisher.output.partition("accepted ")[2].split()[0])
        eventually(lambda: len(listener.all) >= accepted)
        if ballast is not None:
            assert "free some space" in publisher.output
            ballast.unlink()
        publisher.say("there is room again")
        assert publisher.wait() == -9
    assert accepted > 10
    eventually(lambda: len(listener.all) > accepted)
    assert numbers(listener.all) == list(range(accepted + 1))
    heir = make_client(network.url, client_id="publisher", outbox=path)
    heir.connect()
    assert heir.stats().queued == 0


@pytest.mark.parametrize(
    "damage", ["not a database", "cut in half", "a spoilt page", "empty", "a spoilt log"]
)
def test_a_damaged_file_is_set_aside_reported_and_no_reason_not_to_start(
    make_client, broker: Broker, tmp_path: Path, path: str, damage: str, caplog
) -> None:
    received: list[bytes] = []
    first = make_client(broker.url, outbox=path)
    first.connect()
    broker.kill()
    eventually(lambda: not first.connected)
    for number in range(200):
        first.submit_event("a", "n", number, qos=1)
    first.shutdown(timeout=0.2)
    file = tmp_path / "outbox.db"
    content = bytearray(file.read_bytes())
    if damage == "not a database":
        content[:] = b"this was a database once" * 1000
    elif damage == "cut in half":
        del content[len(content) // 2 :]
    elif damage == "a spoilt page":
        content[8192:12_288] = bytes(range(256)) * 16
    elif damage == "empty":
        content.clear()
    file.write_bytes(content)
    if damage == "a spoilt log":
        (tmp_path / "outbox.db-wal").write_bytes(bytes(range(256)) * 100)
    broker.start()
    client = make_client(broker.url, outbox=path)
    client.subscribe("b", received.append, 1)
    client.connect()
    client.publish_event("b", "n", 1, qos=1)
    eventually(lambda: numbers(received) == [1])
    reported = [record for record in caplog.records if record.levelno == logging.ERROR]
    if damage in ("empty", "a spoilt log"):
        assert not reported, "SQLite takes the one for new, and knows that the other is not its own"
    else:
        assert "is damaged" in reported[0].getMessage()
        assert list(tmp_path.glob("outbox.db.damaged-*"))


HOLDS_THE_FILE = (
    CLIENT
    + """
client = make_client(url, client_id="first", outbox=path)
client.connect()
say("connected")
sys.stdin.readline()
for number in range(50):
    client.submit_event("a", "n", number, qos=1)
say("accepted")
time.sleep(60)
"""
)


def test_a_second_process_on_the_file_is_refused_until_the_first_is_dead(
    make_client, network: FaultProxy, path: str
) -> None:
    """``kill -9`` leaves no lock behind, and the second one sends what the first one could not."""
    listener = Listener(make_client, network.url)
    second = make_client(network.url, client_id="second", outbox=path)
    with Program(HOLDS_THE_FILE, make_client.colour, network.url, path) as first:
        first.wait_for("connected")
        with pytest.raises(OutboxError, match="in use by another process"):
            second.connect()
        network.stall("to_broker")
        first.say("now")
        first.wait_for("accepted")
        first.kill()
        first.wait()
    network.cut()
    network.resume()
    second.connect()
    eventually(lambda: sorted(set(numbers(listener.once))) == list(range(50)))
