"""The benchmark still works; what it measures is nobody's promise here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tars_mqtt
from tests.support import find_broker

SCRIPTS = Path(__file__).parents[2] / "scripts"
OURS = ["tars", "tars.aio"]


@pytest.fixture
def mosquitto(shared_broker):
    """The path of a mosquitto: the benchmark starts its own, over and over."""
    found = find_broker()
    if not Path(found).is_file():
        pytest.skip(f"the benchmark needs a mosquitto of this machine, not {found}")
    return found


def bench(mosquitto: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    package = Path(tars_mqtt.__file__).parents[1]
    paths = os.pathsep.join([str(SCRIPTS), str(package)])
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        env={**os.environ, "MQTT_TEST_BROKER": mosquitto, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_quick_run_measures_every_workload_and_draws_it(mosquitto, tmp_path):
    """A quick run of the benchmark does all its workloads, and writes a table, JSON and a plot."""
    report, picture = tmp_path / "report.json", tmp_path / "plot.svg"
    run = bench(
        mosquitto,
        "--quick",
        "--clients",
        ",".join([*OURS, "paho", "socket"]),
        "--json",
        report,
        "--plot",
        picture,
    )
    assert run.returncode == 0, run.stderr
    measured = {(each["workload"], each["client"]) for each in json.loads(report.read_text())["measurements"]}
    everyone = ["publish-0", "deliver-0", "publish-1", "sequential-1", "receive-0", "receive-1", "backlog-1"]
    everyone += ["round-trip", "filters-1000", "filters-10000", "receive-1MB", "publish-1MB", "memory"]
    everyone += ["start-up", "import"]
    assert {(workload, client) for workload in everyone for client in [*OURS, "paho"]} <= measured
    assert {
        ("threads-1", "tars"),
        ("threads-1", "paho"),
        ("dedup-1", "tars"),
        ("dedup-1", "tars.aio"),
    } <= measured
    assert {(workload, "socket") for workload in ("receive-0", "receive-1", "round-trip")} <= measured
    assert "### Publish QoS 0" in run.stdout
    assert "÷ paho" in run.stdout
    assert "÷ socket" not in run.stdout, "it is no client, so nobody is compared with it"
    assert "paho" in picture.read_text()


def test_runs_in_parts_are_reported_as_one(mosquitto, tmp_path):
    """What was measured in several runs makes one table."""
    parts = [tmp_path / f"{workload}.json" for workload in ("publish-0", "import")]
    for part in parts:
        run = bench(mosquitto, "--quick", "--clients", "tars", "--workloads", part.stem, "--json", part)
        assert run.returncode == 0, run.stderr
    run = bench(mosquitto, "--report", *parts)
    assert "### Publish QoS 0" in run.stdout
    assert "### Import" in run.stdout


def test_processes_that_share_a_subscription_are_measured(mosquitto):
    """One row for each number of processes; all of them together handle every message."""
    run = bench(mosquitto, "--quick", "--rounds", 1, "--processes", "1,2")
    assert run.returncode == 0, run.stderr
    assert [line.split("|")[1].strip() for line in run.stdout.splitlines()[2:]] == ["1", "2"]


def test_the_far_side_also_works_without_a_compiler(mosquitto, tmp_path):
    """Where there is no C compiler, the far side runs in Python."""
    workloads = "deliver-0,receive-0,receive-1"
    run = bench(mosquitto, "--quick", "--clients", "tars", "--workloads", workloads, PATH=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert "no C compiler" in run.stderr
    assert run.stdout.count("### ") == 3


def test_a_client_that_fails_fails_the_run(mosquitto, tmp_path):
    """A measurement that does not come about is told, with what the client said; the others are shown."""
    broken = tmp_path / "tars_mqtt" / "__init__.py"
    broken.parent.mkdir()
    broken.write_text("raise ImportError('out of order')")
    run = bench(mosquitto, "--quick", "--clients", "tars", "--workloads", "publish-0", "--against", tmp_path)
    assert run.returncode == 1
    assert "out of order" in run.stderr
    assert "| tars " in run.stdout
