"""The demo does what the README says, and does not look away when a reading is lost."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import find_broker

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "scripts" / "demo.py"


def run(broker: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DEMO_BROKER": broker, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, str(PROGRAM)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )


def row(output: str, name: str) -> int:
    (line,) = (line for line in output.splitlines() if line.strip().startswith(name))
    return int(line.split()[-1])


@pytest.mark.parametrize("kind", ["mosquitto", "amqtt"])
def test_the_show_goes_on_through_a_killed_broker(kind: str, shared_broker: object) -> None:
    """With a broker that remembers its sessions, and with one that forgets everything."""
    broker = find_broker() if kind == "mosquitto" else kind
    if kind == "mosquitto" and not Path(broker).is_file():
        pytest.skip("the demo starts a mosquitto of its own, and there is no binary")
    show = run(broker)
    assert show.returncode == 0, show.stdout + show.stderr
    assert "is killed (kill -9)" in show.stdout
    assert row(show.stdout, "readings sent and acknowledged") > 100
    assert row(show.stdout, "duplicates filtered") > 5
    assert row(show.stdout, "acknowledged and lost") == 0
    assert "ok: ready, ok: reconnected, not ok: shutdown" in show.stdout


def test_a_broker_of_the_users_own_is_not_killed(shared_broker: Any) -> None:
    show = run(shared_broker.url)
    assert show.returncode == 0, show.stdout + show.stderr
    assert "is yours: it will not be killed" in show.stdout


@pytest.fixture
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("acknowledged", "handled", "verdict"),
    [(["a", "b"], ["b", "a"], 0), (["a", "b"], ["a"], 1), (["a"], ["a", "a"], 1), ([], [], 1)],
)
def test_a_lost_reading_is_a_failure(
    demo: ModuleType, acknowledged: list[str], handled: list[str], verdict: int
) -> None:
    show = demo.Show()
    show.results = {"sent": {"ids": acknowledged, "twice": 0}, "handled": {"ids": handled, "duplicates": 0}}
    assert demo.account(show, 0.0) == verdict
