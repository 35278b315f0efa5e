"""All measurements of a run, and what they come to."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Self

import attrs

from bench.contender import BARE, Contender
from bench.measure import Metrics
from bench.workload import WORKLOADS, Metric, Workload


@attrs.frozen
class Measurement:
    """One workload done once by one client; without metrics where it failed."""

    workload: str
    client: str
    round: int
    metrics: Metrics


@attrs.define
class Results:
    """What a run measured. The values of one round were taken one after the other, and compare best."""

    machine: str
    versions: dict[str, str]
    """Of each client, in the order in which they are shown."""
    ours: list[str]
    """The clients that the others are compared with."""
    measurements: list[Measurement] = attrs.field(factory=list)

    @classmethod
    def begin(cls, contenders: Iterable[Contender]) -> Self:
        contenders = list(contenders)
        machine = (
            f"{os.cpu_count()} x {_processor()}, {platform.system()}, Python {platform.python_version()}"
        )
        return cls(
            machine,
            {contender.name: _version(contender) for contender in contenders},
            [contender.name for contender in contenders if contender.ours and contender.path is None],
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        content = json.loads(path.read_text())
        measurements = [Measurement(**measurement) for measurement in content.pop("measurements")]
        return cls(**content, measurements=measurements)

    @classmethod
    def merged(cls, parts: Iterable[Self]) -> Self:
        """One run of what was measured in parts, for instance because each may take a few minutes only."""
        whole, *others = parts
        for part in others:
            offset = 1 + max(measurement.round for measurement in whole.measurements)
            whole.versions |= part.versions
            whole.ours += [name for name in part.ours if name not in whole.ours]
            whole.measurements += [
                attrs.evolve(measurement, round=measurement.round + offset)
                for measurement in part.measurements
            ]
        return whole

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(attrs.asdict(self), indent=1) + "\n")

    def workloads(self) -> list[Workload]:
        """What was measured of what there is."""
        names = {measurement.workload for measurement in self.measurements}
        return [workload for workload in WORKLOADS if workload.name in names]

    def clients(self, workload: Workload) -> list[str]:
        """Who did it."""
        return [name for name in self.versions if self._values(workload, name, workload.metrics[0])]

    def peers(self, workload: Workload) -> list[str]:
        """Who did it of the packages that are not ours."""
        not_peers = (*self.ours, BARE)
        return [name for name in self.clients(workload) if name.partition("@")[0] not in not_peers]

    def value(self, workload: Workload, client: str, metric: Metric) -> float:
        """The median over the rounds."""
        return median(self._values(workload, client, metric).values())

    def ratio(self, workload: Workload, client: str, other: str, metric: Metric) -> float:
        """How *client* compares with *other*: the median of the ratios within a round."""
        values = self._values(workload, client, metric)
        others = self._values(workload, other, metric)
        rounds = values.keys() & others.keys()
        if rounds:
            return median(values[number] / others[number] for number in rounds)
        return self.value(workload, client, metric) / self.value(workload, other, metric)

    def best_peer(self, workload: Workload, metric: Metric) -> str | None:
        """The peer with the best median."""
        best = max if metric.more_is_better else min
        return best(self.peers(workload), key=lambda name: self.value(workload, name, metric), default=None)

    def _values(self, workload: Workload, client: str, metric: Metric) -> dict[int, float]:
        return {
            measurement.round: measurement.metrics[metric.name]
            for measurement in self.measurements
            if measurement.workload == workload.name
            and measurement.client == client
            and metric.name in measurement.metrics
        }


def _version(contender: Contender) -> str:
    if contender.path is not None:
        return contender.path
    if contender.bare:
        return ""
    try:
        return version(contender.distribution)
    except PackageNotFoundError:
        if contender.ours:
            return "from source"
        raise


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
