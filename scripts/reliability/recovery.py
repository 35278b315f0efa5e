"""How long it takes until events flow again, once the broker can be reached."""

from __future__ import annotations

import random
import threading
import time
from statistics import median

from reliability import contender
from reliability.outcome import Outcome
from tests.support import Broker, eventually
from tests.support.port import is_listening
from tests.support.thread import in_thread

_INTERVAL = 0.005


def measure(client_name: str, quick: bool) -> Outcome:
    """Outages of random length; the broker forgets everything in them, so what is handled was sent after."""
    draw = random.Random(1)
    handled: list[float] = []
    stop = threading.Event()
    with Broker(verbose=False) as broker:
        client = contender.make(client_name, broker.url, "recovery", contender.Settings())
        client.subscribe("recovery", lambda _: handled.append(time.monotonic()))
        client.connect()

        def publish() -> None:
            while not stop.wait(_INTERVAL):
                client.submit("recovery", {})

        publishing = in_thread(publish)
        times = []
        for _ in range(2 if quick else 30):
            flowing = len(handled)
            eventually(lambda before=flowing: len(handled) > before + 100, 20)  # type: ignore[misc]
            broker.kill()
            time.sleep(draw.uniform(0.5, 3.0))
            listens = in_thread(_when_it_listens, broker)
            broker.start()
            moment: float = listens.result(10)
            eventually(lambda since=moment: handled[-1] > since, 30)  # type: ignore[misc]
            times.append(next(when for when in handled if when > moment) - moment)
        stop.set()
        publishing.result(10)
        client.close()
    return Outcome(
        f"p50 {median(times):.2f}, max {max(times):.2f} s of {len(times)}",
        met=median(times) <= 0.2 and max(times) <= 0.5,
    )


def _when_it_listens(broker: Broker) -> float:
    eventually(lambda: is_listening(broker.host, broker.port), 10, interval=0.001)
    return time.monotonic()
