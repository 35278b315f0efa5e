"""A process of its own for one client and one workload: ``python -m bench.worker JOB``."""

from __future__ import annotations

import importlib
import json
import os
import sys

from bench.job import Job


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    module, _, name = job.adapter.partition(".")
    getattr(importlib.import_module(f"bench.clients.{module}"), name)(job).work()
    # The measurement is over. A goodbye may take long: in one of them the broker is frozen.
    os._exit(0)


if __name__ == "__main__":
    main()
