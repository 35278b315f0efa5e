"""One measurement: a broker, a client in a process of its own, and a far side in another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs

from bench.broker import Broker
from bench.contender import Contender
from bench.event import TYPE, data, encode
from bench.job import Job
from bench.process import MeasurementError, Process
from bench.workload import WINDOW, Workload

_FAR_WINDOW = 1_000

Metrics = dict[str, float]


@attrs.frozen
class Laboratory:
    """What all measurements have in common."""

    mosquitto: str
    far: list[str]
    broker_options: list[str] = attrs.field(factory=list)
    timeout: float = 60.0

    def applies(self, workload: Workload, contender: Contender) -> bool:
        """Whether this client can do that work."""
        if workload.run == "import":
            return bool(contender.imports)
        if contender.bare:
            return (
                workload.run in {"receive", "round_trip"} and workload.topics == 1 and not workload.settings
            )
        if workload.threads and not contender.threaded:
            return False
        return not workload.settings or (contender.ours and _has_settings(workload))

    def measure(self, workload: Workload, contender: Contender) -> Metrics:
        """Do it once.

        Raises:
            MeasurementError: It was not done, or not in time.
        """
        if workload.run == "import":
            return self._measure_import(contender)
        with ExitStack() as stack:
            broker = stack.enter_context(Broker(self.mosquitto, self.broker_options))
            subscriber = None
            if workload.far == "subscriber":
                subscriber = stack.enter_context(self._far("subscribe", broker.port, workload.messages))
                subscriber.wait_ready()
            job = _job(workload, contender, broker)
            started = time.perf_counter()
            worker = stack.enter_context(
                Process(
                    [sys.executable, "-m", "bench.worker", json.dumps(job._asdict())],
                    self.timeout,
                    _environment(contender),
                )
            )
            publisher = None
            if workload.far == "publisher":
                publisher = stack.enter_context(
                    self._far(
                        "publish", broker.port, workload.messages, workload.qos, workload.topics, _FAR_WINDOW
                    )
                )
                publisher.tell(encode(TYPE, data(0, "x" * job.padding)).decode())
                publisher.wait_ready()
            worker.wait_ready()
            if workload.run == "connect":
                return {"ms": (time.perf_counter() - started) * 1e3}
            if workload.run == "queue":
                broker.freeze()
                worker.tell("go")
            if publisher is not None:
                _publish(publisher, worker, workload)
            metrics: Metrics = json.loads(worker.hear())
            if subscriber is not None:
                metrics["rate"] = workload.messages / (float(subscriber.hear()) - metrics["began"])
            return metrics

    def _far(self, *arguments: object) -> Process:
        return Process([*self.far, *map(str, arguments)], self.timeout)

    def _measure_import(self, contender: Contender) -> Metrics:
        process = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", f"import {contender.imports}"],
            env=_environment(contender),
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode:
            raise MeasurementError(process.stderr)
        # The last line is that of the module itself: its own time, its time with all it imports, its name.
        cumulative = process.stderr.splitlines()[-1].split("|")[1]
        return {"ms": int(cumulative) / 1e3}


def _publish(publisher: Process, worker: Process, workload: Workload) -> None:
    if workload.backlog:
        worker.pause()
    publisher.tell("go")
    if workload.backlog:
        publisher.hear()
        worker.resume()


def _job(workload: Workload, contender: Contender, broker: Broker) -> Job:
    extra: dict[str, Any] = {
        name: value.format(directory=broker.directory) if isinstance(value, str) else value
        for name, value in workload.settings.items()
    }
    return Job(
        adapter=contender.adapter,
        run=workload.run,
        port=broker.port,
        messages=workload.messages,
        qos=workload.qos,
        filters=workload.filters,
        window=WINDOW,
        padding=workload.padding,
        settings={**contender.settings, **extra},
    )


def _has_settings(workload: Workload) -> bool:
    from tars_mqtt import MQTTClientConfig

    return set(workload.settings) <= set(attrs.fields_dict(MQTTClientConfig))


def _environment(contender: Contender) -> dict[str, str]:
    scripts = str(Path(__file__).parents[1])
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [contender.path, scripts, *given]
    # Without the safe path, ``python -m`` looks into the working directory first: often a checkout of ours.
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONSAFEPATH": "1",
    }
