"""What is sent when: after a reconnect, around a message that is too large, and at the end."""

from __future__ import annotations

import time

from reliability import contender
from reliability.outcome import Outcome
from tests.support import Broker, FaultProxy, ScriptedBroker, ScriptedConnection, eventually
from tests.support.observer import Observer
from tests.support.packet import PacketType

_WINDOW = 20


def window(client_name: str, quick: bool) -> Outcome:
    count = 200 if quick else 2_000

    def serve(connection: ScriptedConnection) -> None:
        connection.accept(session_present=connection.number > 1)
        connection.serve(instead=lambda packet: packet.type == PacketType.PUBLISH)

    def sent() -> int:
        return sum(
            each.type == PacketType.PUBLISH for link in broker.connections[1:] for each in tuple(link.packets)
        )

    with ScriptedBroker(serve) as broker, FaultProxy(broker.url) as proxy:
        settings = contender.Settings(window=_WINDOW)
        client = contender.make(client_name, proxy.url, "window", settings)
        client.connect()
        proxy.refuse()
        proxy.cut()
        time.sleep(0.5)
        client.submit_all("window", range(count))
        proxy.accept()
        eventually(lambda: sent() >= _WINDOW)
        time.sleep(1.5)  # for more of them than there should be
        at_once = sent()
        client.close(0.2)
    return Outcome(f"{at_once:,}", met=at_once == _WINDOW)


def oversized(client_name: str, quick: bool) -> Outcome:
    """In MQTT 3.1.1 the broker says nothing and hangs up; in MQTT 5, which is for ours only, it names its limit."""
    protocols = ["3.1.1", "5"] if client_name in contender.OURS else ["3.1.1"]
    delivered = [_around_oversized(client_name, protocol) for protocol in protocols]
    text = ", ".join(
        f"{count} of 20 in MQTT {protocol}" for protocol, count in zip(protocols, delivered, strict=True)
    )
    return Outcome(text, met=all(count == 20 for count in delivered))


def _around_oversized(client_name: str, protocol: str) -> int:
    with Broker(["max_packet_size 20000"]) as broker, Observer(broker.host, broker.port) as observer:
        ours = {"protocol": protocol} if client_name in contender.OURS else {}
        client = contender.make(client_name, broker.url, "oversized", contender.Settings(ours=ours))
        client.connect()
        until = time.monotonic() + 6
        for number in range(20):
            client.submit("small", number)
            if number == 9:
                client.submit("large", "x" * 50_000)
        while (
            len(delivered := {each.data for each in observer.on("small")}) < 20 and time.monotonic() < until
        ):
            time.sleep(0.05)
        client.close(0.2)
    return len(delivered)


def shutdown(client_name: str, quick: bool) -> Outcome:
    count = 500 if quick else 5_000
    with Broker(["max_queued_messages 0"], verbose=False) as broker:
        with Observer(broker.host, broker.port) as observer:
            client = contender.make(client_name, broker.url, "shutdown", contender.Settings())
            client.connect()
            client.submit_all("shutdown", range(count))
            client.close(10)
            time.sleep(1)
            delivered = len({each.data for each in observer.on("shutdown")})
        if client_name not in contender.OURS:
            return Outcome(f"{delivered:,} delivered", met=delivered == count)
        acknowledged, counted, took = _shutdown_in_need(client_name, broker, count, 1.0 if quick else 10.0)
    return Outcome(
        f"{delivered:,} delivered; on a link too slow for them {acknowledged:,} acknowledged "
        f"and {counted:,} counted as given up, in {took:.1f} s",
        met=delivered == count and acknowledged + counted == count,
    )


def _shutdown_in_need(client_name: str, broker: Broker, count: int, timeout: float) -> tuple[int, int, float]:
    with FaultProxy(broker.url) as proxy:
        client = contender.make(client_name, proxy.url, "shutdown", contender.Settings())
        assert isinstance(client, contender.Ours)
        client.connect()
        proxy.bandwidth(count * 8)
        receipts = [client.submit("shutdown", number) for number in range(count)]
        began = time.monotonic()
        client.client.shutdown(timeout)
        took = time.monotonic() - began
        counted: int = client.client.stats().dropped.get("shutdown", 0)
        failed = sum(receipt.exception(0) is not None for receipt in receipts)  # type: ignore[attr-defined]
        assert failed == counted, f"{failed} receipts failed, {counted} are counted"
        client.close()
    return count - failed, counted, took
