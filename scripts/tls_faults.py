"""Print what the client makes of everything that can be wrong with TLS, as a table.

    .venv/bin/python scripts/tls_faults.py

Each fault happens twice: before the first ``connect()``, and to a connection that stands, of which the attempts
within ten seconds are counted. The faults are those of ``tests/integration/test_tls.py``.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tars_mqtt import ConfigError, ConnectError, MQTTClient
from tests.support.tls_fault import FAULTS, Fault, Link

CONNECT_TIMEOUT = 5.0
DELAYS = {"reconnect_min_delay": 0.1, "reconnect_max_delay": 2.0}
WINDOW = 10.0


def at_first(fault: Fault, folder: Path) -> tuple[str, float]:
    """The error that the first ``connect()`` raises, and after how many seconds."""
    with Link(folder, **fault.link) as link:
        fault.happen(link)
        client = MQTTClient(link.url, "client", connect_timeout=CONNECT_TIMEOUT, **DELAYS, **link.settings)
        started = time.monotonic()
        try:
            client.connect()
        except (ConnectError, ConfigError) as error:
            kind = "ConfigError" if isinstance(error, ConfigError) else "ConnectError"
            return f"`{kind}`: {error}".replace(f"{folder}/", ""), time.monotonic() - started
        client.shutdown()
        return "none", 0.0


def later(fault: Fault, folder: Path) -> int:
    """The attempts of a client that was connected when the fault happened."""
    with (
        Link(folder, **fault.link) as link,
        MQTTClient(link.url, "client", shutdown_timeout=1.0, **DELAYS, **link.settings),
    ):
        fault.happen(link)
        link.proxy.cut()
        time.sleep(WINDOW)
        return link.proxy.connections - 1


def row(fault: Fault) -> str:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        error, seconds = at_first(fault, Path(one))
        attempts = later(fault, Path(two))
    return f"| {fault.name} | {error} | {seconds:.2f} | {attempts} |"


def main() -> None:
    logging.disable()
    print(
        f"connect_timeout is {CONNECT_TIMEOUT:g} s, reconnect_max_delay {DELAYS['reconnect_max_delay']:g} s\n"
    )
    print("| fault | error seen | seconds until connect() raised | attempts in 10 s |")
    print("|---|---|---|---|")
    with ThreadPoolExecutor(8) as pool:
        for line in pool.map(row, FAULTS):
            print(line)


if __name__ == "__main__":
    main()
