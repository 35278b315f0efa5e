"""The soak loses nothing, can be had again, and does not look away when something is lost."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tars_mqtt
from tests.support import find_broker

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"


def soak(mosquitto: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(SCRIPTS), str(Path(tars_mqtt.__file__).parents[1]), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "reliability", *map(str, arguments)],
        env={**os.environ, "MQTT_TEST_BROKER": mosquitto, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )


@pytest.fixture
def mosquitto(shared_broker: object) -> str:
    """The path of a mosquitto: the soak starts and kills its own."""
    found = find_broker()
    if not Path(found).is_file():
        pytest.skip(f"the soak needs a mosquitto of this machine, not {found}")
    return found


def row(output: str, name: str) -> int:
    (line,) = (line for line in output.splitlines() if line.strip().startswith(name))
    return int(line.split()[-1])


@pytest.mark.parametrize("client", ["threads", "asyncio"])
def test_a_short_soak_loses_nothing(mosquitto: str, client: str) -> None:
    """Broken connections, and ``kill -9`` of the broker, of the publisher and of the subscriber."""
    kinds = "reset,cut,kill-broker,kill-publisher,kill-subscriber"
    run = soak(mosquitto, "--seed", 149, "--count", 5, "--faults", kinds, "--client", client)
    assert run.returncode == 0, run.stdout + run.stderr
    assert row(run.stdout, "faults") == 5
    assert row(run.stdout, "events handled") > 50
    assert row(run.stdout, "lost, of those sent") == 0
    assert row(run.stdout, "handled twice") == 0


@pytest.mark.parametrize(
    ("client", "figures"),
    [("threads", "outage,window"), ("asyncio", "outage,window"), ("paho", "window"), ("aiomqtt", "window")],
)
def test_figures_can_be_measured(mosquitto: str, client: str, figures: str) -> None:
    """With few events; what comes out is nobody's promise here, but for the window."""
    run = soak(mosquitto, "--figures", figures, "--quick", "--client", client)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("\n") == 3 + figures.count(",")
    assert client == "paho" or "| 20 | 20 |" in run.stdout


def test_an_unknown_fault_is_refused_with_those_that_there_are() -> None:
    run = soak("mosquitto", "--faults", "earthquake")
    assert run.returncode == 2
    assert "there is no earthquake; there are kill-broker, " in run.stderr


@pytest.fixture
def reliability(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import reliability.account
    import reliability.fault

    return reliability


def test_a_seed_gives_the_same_faults_again(reliability: Any) -> None:
    def some(seed: int) -> list[Any]:
        return list(itertools.islice(reliability.fault.faults(seed, list(reliability.fault.KINDS)), 30))

    assert some(1) == some(1) != some(2)
    assert {fault.kind for fault in some(1)} == set(reliability.fault.KINDS)


def lines(text: str) -> list[tuple[str, list[int], float]]:
    """What a journal says: ``tried 1, handled 0 1``; a line takes a second."""
    words = [line.split() for line in text.split(", ") if line]
    return [(what, list(map(int, numbers)), float(at)) for at, (what, *numbers) in enumerate(words)]


SENT = "begun, tried 0, accepted 0, acknowledged 0, tried 1, accepted 1, tried 2"


@pytest.mark.parametrize(
    ("heard", "verdict"),
    [
        ("begun, handled 0 0, handled 0 1", []),
        ("begun, handled 0 0, handled 0 1, handled 0 2", []),
        ("begun, handled 0 0, begun, handled 0 0, handled 0 1", []),
        ("begun, handled 0 0", ["1 events accepted and lost"]),
        ("begun, handled 0 0, handled 0 1, handled 0 0", ["1 events handled twice"]),
        ("begun, handled 0 0, handled 0 1, begun, handled 0 0", ["1 events handled twice"]),
        ("begun, handled 0 0, begun, handled 0 0, handled 0 0, handled 0 1", ["1 events handled twice"]),
        ("begun, handled 0 0, handled 0 1, handled 0 7", ["1 events handled that nobody sent"]),
        ("begun", ["nothing was sent, or nothing handled", "2 events accepted and lost"]),
    ],
)
def test_the_account_names_every_broken_promise(reliability: Any, heard: str, verdict: list[str]) -> None:
    """What a killed process had in hand may come again, once; what was cut short may come or not."""
    account = reliability.account.Account()
    account.sent[0].add(lines(SENT))
    account.heard[0].add(lines(heard))
    assert account.broken_promises(once=True, outbox=True) == verdict


def test_the_account_counts_what_is_out_of_order_and_times_recoveries(reliability: Any) -> None:
    account = reliability.account.Account()
    account.sent[0].add(lines(SENT))
    account.heard[0].add(lines("begun, handled 0 1, handled 0 0, handled 0 2"))
    account.mended.append(reliability.account.Mended("refuse", 1.25))
    assert account.count("out_of_order") == 1
    assert account.recoveries() == {"refuse": [0.75]}
    assert ("broker listens again -> event handled", "p50 0.75 s, max 0.75 s") in account.rows()
