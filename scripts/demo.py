"""A sensor, a monitor, and a broker that is killed in the middle: nothing acknowledged gets lost.

Three processes beside the broker. `sensor` publishes a reading every 40 ms with QoS 1, and repeats
every tenth; `monitor` handles them through wildcards, each envelope once; both publish their health.
This one runs the show, and at the end holds the sensor's acknowledgements against what the monitor
handled. It exits with 1 if an acknowledged reading was not handled.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from tars_mqtt import Envelope, Message, MQTTClient

if TYPE_CHECKING:
    from collections.abc import Iterator

told = threading.Lock()
ROOMS = ("kitchen", "bath", "attic")
SETTINGS = {
    "enable_health": True,
    "keepalive": 5,
    "reconnect_min_delay": 0.2,
    "reconnect_max_delay": 1.0,
    # A broker that knows MQTT 3.1.1 only may leave a CONNECT of MQTT 5 unanswered for half of this.
    "connect_timeout": 3.0,
}


# -- the two services: what a user of the library writes -------------------------------------------


def sensor(url: str) -> None:
    """Publish readings until told to stop; they wait in the client's queue while there is no broker."""
    with MQTTClient(url, "demo-sensor", "sensor", **SETTINGS) as client, ThreadPoolExecutor(4) as impatient:
        watch_connection(client)
        receipts = []
        for number in count_readings():
            topic = f"home/{ROOMS[number % 3]}/temperature"
            reading = Envelope.new(
                "reading.taken", {"celsius": round(random.gauss(21, 2), 1)}, source="sensor"
            )
            send = impatient.submit(client.publish, topic, reading.to_bytes(), qos=1)
            receipts.append((reading.id, send))
            if number % 10 == 9:
                impatient.submit(client.publish, topic, reading.to_bytes(), qos=1)
        sent = [envelope_id for envelope_id, receipt in receipts if receipt.exception(30) is None]
        tell("sent", ids=sent, twice=len(receipts) // 10, retried=client.stats().retried)


def monitor(url: str) -> None:
    """Handle every reading once, and watch the health of everybody."""
    client = MQTTClient(url, "demo-monitor", "monitor", dedupe_ttl=60, dedupe_max_entries=10_000, **SETTINGS)
    handled: list[str] = []

    @client.on("home/+/temperature", qos=1)
    def on_reading(message: Message) -> None:
        handled.append(message.envelope.id)
        tell("reading", room=message.topic.split("/")[1], **message.envelope.data)

    @client.on("system/health/+", qos=1)
    def on_health(envelope: Envelope) -> None:
        tell("health", source=envelope.source, **envelope.data)

    with client:
        watch_connection(client)
        for line in sys.stdin:
            if line == "count\n":
                tell("handled", ids=handled, duplicates=client.stats().duplicates)


# -- what the services need to take part in the show ------------------------------------------------


def tell(what: str, **details: object) -> None:
    """Report to the show, by a line of JSON."""
    line = json.dumps({"what": what, "at": time.monotonic(), **details}) + "\n"
    with told:
        sys.stdout.write(line)
        sys.stdout.flush()


def watch_connection(client: MQTTClient) -> None:
    """Report each time that the connection is there again."""

    def watch() -> None:
        connected = False
        while client.state.value not in ("closing", "closed"):
            if client.connected != connected:
                connected = client.connected
                tell("connected" if connected else "disconnected")
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()


def count_readings() -> Iterator[int]:
    """Count up every 40 ms; ``pause``, ``go`` and ``stop`` come from the show."""
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=lambda: [orders.put(line.strip()) for line in sys.stdin], daemon=True).start()
    number, order = 0, "go"
    while order != "stop":
        try:
            order = orders.get(timeout=0.04)
        except queue.Empty:
            if order == "go":
                yield number
                number += 1


# -- brokers ----------------------------------------------------------------------------------------


class Broker:
    """A broker of the show's own, on this machine only."""

    def __init__(self, kind: str) -> None:
        self.remembers = kind != "amqtt"
        self._folder = tempfile.TemporaryDirectory(prefix="tars-mqtt-demo-")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"mqtt://127.0.0.1:{self._port}"
        if self.remembers:
            self._command = [kind, "-c", self._mosquitto_configuration()]
        else:
            self._command = [sys.executable, __file__, "amqtt", str(self._port)]
        self._process: subprocess.Popen[bytes] | None = None

    def _mosquitto_configuration(self) -> str:
        path = Path(self._folder.name) / "mosquitto.conf"
        lines = [
            f"listener {self._port} 127.0.0.1",
            "allow_anonymous true",
            "persistence true",
            f"persistence_location {self._folder.name}/",
            "autosave_on_changes true",
            "autosave_interval 1",
        ]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            lines.append("user root")  # otherwise it becomes another user, who may not write here
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), 1).close()
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"demo: the broker did not start: {' '.join(self._command)}")
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        self.kill()
        self._folder.cleanup()


def run_amqtt(port: str) -> None:
    """Run a broker in Python, in a process of its own."""
    import asyncio

    from amqtt.broker import Broker as Amqtt

    async def serve() -> None:
        broker = Amqtt(
            {
                "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
                "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
            }
        )
        await broker.start()
        await asyncio.Event().wait()

    asyncio.run(serve())


# -- the show -----------------------------------------------------------------------------------------


class Service:
    """One of the two services as the show sees it: a process, and what it tells."""

    def __init__(self, name: str, url: str, show: Show) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, __file__, name, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, args=(show,), daemon=True)
        self._reader.start()

    def _read(self, show: Show) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            show.take(self.name, json.loads(line))

    def order(self, word: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; the account will say so
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()

    def end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(5)


class Show:
    """Prints what happens, and keeps the account."""

    def __init__(self) -> None:
        self._colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._readings: Counter[str] = Counter()
        self._latest: dict[str, float] = {}
        self.health: dict[str, list[str]] = {}
        self.connected: dict[str, list[float]] = {}
        self.results: dict[str, dict[str, object]] = {}

    def take(self, name: str, event: dict[str, object]) -> None:
        what = event["what"]
        if what == "reading":
            room = str(event["room"])
            self._readings[room] += 1
            self._latest[room] = float(str(event["celsius"]))
            if sum(self._readings.values()) % 25 == 0:
                temperatures = "  ".join(
                    f"{room} {self._latest[room]:4.1f}°C" for room in sorted(self._latest)
                )
                self.say("monitor", f"{sum(self._readings.values()):4} readings   {temperatures}")
        elif what == "health":
            state = f"{'ok' if event['ok'] else 'not ok'}: {event['event']}"
            states = self.health.setdefault(str(event["source"]), [])
            if states[-1:] != [state]:
                states.append(state)
            self.say("health", f"{event['source']} is {state}", "32" if event["ok"] else "31")
        elif what == "connected":
            self.connected.setdefault(name, []).append(float(str(event["at"])))
        elif what == "disconnected":
            self.say(name, "lost the broker", "31")
        else:
            self.results[str(what)] = event

    def say(self, who: str, text: str, colour: str = "") -> None:
        with self._lock:
            line = f"{time.monotonic() - self._started:5.1f} s  {who:8} {text}"
            print(f"\033[{colour}m{line}\033[0m" if colour and self._colours else line, flush=True)

    def until(self, predicate: object, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not predicate():  # type: ignore[operator]
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def main() -> int:
    kind = os.environ.get("DEMO_BROKER", "amqtt")
    show = Show()
    broker = None if "://" in kind else Broker(kind)
    services: list[Service] = []
    listens_again = 0.0
    try:
        if broker is not None:
            broker.start()
        url = kind if broker is None else broker.url
        show.say("broker", "listens" if broker else "is yours: it will not be killed")
        watching = Service("monitor", url, show)
        services.append(watching)
        if not show.until(lambda: show.connected.get("monitor"), 20):
            sys.exit("demo: the monitor found no broker")
        measuring = Service("sensor", url, show)
        services.append(measuring)
        if not show.until(lambda: show.connected.get("sensor"), 20):
            sys.exit("demo: the sensor found no broker")
        time.sleep(4)
        if broker is not None:
            listens_again = kill_and_restart(broker, measuring, show)
            time.sleep(4)
        measuring.order("stop")
        show.until(lambda: "sent" in show.results, 40)
        sent = set(show.results.get("sent", {}).get("ids", ()))  # type: ignore[arg-type]
        show.until(lambda: counted(watching, show) >= sent, 10)
    except KeyboardInterrupt:
        show.say("show", "stopped")
        return 130
    finally:
        for service in reversed(services):
            service.end()
        if broker is not None:
            broker.close()
    return account(show, listens_again)


def kill_and_restart(broker: Broker, measuring: Service, show: Show) -> float:
    """Kill the broker, let the sensor go on for a while, and start it again; returns when it listened."""
    # What the broker has acknowledged and not handed on dies with it: that is its promise to keep, not ours.
    measuring.order("pause")
    time.sleep(0.5)
    show.say("broker", "is killed (kill -9)", "31")
    broker.kill()
    if broker.remembers:
        measuring.order("go")
        show.say("sensor", "goes on measuring: readings wait in its queue")
    time.sleep(2.5)
    broker.start()
    listens_again = time.monotonic()
    show.say("broker", "listens again", "32")
    if not broker.remembers:
        # It has forgotten who subscribed: the monitor must be back before the sensor speaks.
        show.until(lambda: len(show.connected.get("monitor", ())) > 1, 15)
        measuring.order("go")
    return listens_again


def counted(watching: Service, show: Show) -> set[object]:
    watching.order("count")
    time.sleep(0.2)
    return set(show.results.get("handled", {}).get("ids", ()))  # type: ignore[arg-type]


def account(show: Show, listens_again: float) -> int:
    sent = show.results.get("sent", {})
    handled = show.results.get("handled", {})
    acknowledged, done = list(sent.get("ids", ())), list(handled.get("ids", ()))  # type: ignore[call-overload]
    lost = set(acknowledged) - set(done)
    twice = len(done) - len(set(done))
    rows = [
        ("readings sent and acknowledged", str(len(acknowledged))),
        ("  of them repeated by the sensor", str(sent.get("twice", 0))),
        ("readings handled by the monitor", str(len(set(done)))),
        ("duplicates filtered", str(handled.get("duplicates", 0))),
        ("handled twice", str(twice)),
        ("acknowledged and lost", str(len(lost))),
    ]
    for name, times in sorted(show.connected.items()):
        after = [moment - listens_again for moment in times if listens_again and moment >= listens_again]
        if after:
            rows.append((f"{name}: broker listens -> connected", f"{after[0]:.2f} s"))
    for source, states in sorted(show.health.items()):
        rows.append((f"health of {source}", ", ".join(states)))
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in rows) + "\n")
    if not acknowledged or lost or twice:
        print("demo: an acknowledged reading was lost, or one was handled twice", file=sys.stderr)
        return 1
    print("  Every reading that the broker acknowledged was handled, once.")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    roles = {"sensor": sensor, "monitor": monitor, "amqtt": run_amqtt}
    if len(sys.argv) == 3:
        logging.basicConfig(level=logging.ERROR)  # the show tells of lost connections itself
        try:
            roles[sys.argv[1]](sys.argv[2])
        except KeyboardInterrupt:
            sys.exit(130)
    else:
        sys.exit(main())
