"""What the broker's rules forbid fails by itself, says so, and stops nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tars_mqtt import PublishRejectedError, SubscribeError, aio
from tests.support import ScriptedBroker, eventually, packet
from tests.support.packet import PacketType

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import Broker, Packet, ScriptedConnection

NOT_AUTHORIZED = 0x87
SUBSCRIBE_REFUSED = {"5": "Not authorized", "3.1.1": "Unspecified error"}


@pytest.fixture
def guarded(make_broker: Callable[..., Broker], tmp_path: Path) -> Broker:
    """A mosquitto whose access list has ``open/#`` in it, and nothing else."""
    rules = tmp_path / "acl"
    rules.write_text("topic readwrite open/#\n")
    return make_broker([f"acl_file {rules}"])


class Rules:
    """The rules of mosquitto's dynamic security; unlike an access list it refuses subscriptions."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "rules.json"
        found = sorted(Path("/usr/lib").rglob("mosquitto_dynamic_security.so"))
        if not found:
            pytest.skip("mosquitto's dynamic security is not there")
        self.config = [f"plugin {found[0]}", f"plugin_opt_config_file {self._path}"]

    def allow(self, *filters: str) -> None:
        """Let everybody subscribe with these filters only; counts from the next start."""
        access = {"publishClientSend": True, "publishClientReceive": True, "unsubscribe": True}
        acls = [
            {"acltype": "subscribeLiteral", "topic": topic, "priority": 0, "allow": True} for topic in filters
        ]
        rules: dict[str, Any] = {
            "defaultACLAccess": access | {"subscribe": False},
            "clients": [],
            "groups": [{"groupname": "all", "roles": [{"rolename": "guest"}], "clients": []}],
            "roles": [{"rolename": "guest", "acls": acls}],
            "anonymousGroup": "all",
        }
        self._path.write_text(json.dumps(rules))


@pytest.fixture
def rules(tmp_path: Path) -> Rules:
    return Rules(tmp_path)


# -- publishing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("qos", [1, 2])
def test_a_publish_that_is_refused_fails_its_own_receipt(make_client, guarded: Broker, qos) -> None:
    client = make_client(guarded.url, protocol="5")
    client.connect()
    receipts = [client.submit_event(f"{topic}/a", "e", {}, qos=qos) for topic in ("open", "shut", "open")]
    for allowed in receipts[::2]:
        allowed.result(10)
    error = receipts[1].exception(10)
    assert isinstance(error, PublishRejectedError)
    assert (error.reason, error.code) == ("Not authorized", NOT_AUTHORIZED)
    assert str(error) == "the message to 'shut/a' was rejected: Not authorized"
    with pytest.raises(PublishRejectedError):
        client.publish("shut/b", b"", qos=qos)
    assert client.stats().rejected == 2
    assert client.connected
    assert client.stats().reconnects == 0


def test_mqtt_3_has_no_way_to_refuse_a_publish(make_client, guarded: Broker) -> None:
    """mosquitto acknowledges what it throws away: nothing that a client could notice."""
    client = make_client(guarded.url, protocol="3.1.1")
    client.connect()
    client.publish("shut/a", b"", qos=1)
    assert client.stats().rejected == 0


@pytest.mark.parametrize(("qos", "answer"), [(1, packet.puback), (2, packet.pubrec)])
@pytest.mark.parametrize(
    ("code", "reason"), [(0x83, "Implementation specific error"), (0x97, "Quota exceeded"), (0xFE, "0xfe")]
)
def test_every_reason_is_named(make_client, qos, answer, code, reason) -> None:
    def refuse(connection: ScriptedConnection) -> None:
        connection.accept()

        def instead(sent: Packet) -> bool:
            if sent.type != PacketType.PUBLISH:
                return False
            connection.send(answer(packet.read_publish(sent, connection.level).packet_id, code))
            return True

        connection.serve(instead)

    with ScriptedBroker(refuse) as broker:
        client = make_client(broker.url, protocol="5")
        client.connect()
        with pytest.raises(PublishRejectedError, match=reason) as caught:
            client.publish("a", b"", qos=qos)
        assert caught.value.code == code
        assert client.stats().inflight == 0


# -- subscribing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_subscription_that_is_refused_raises_on_its_line(make_broker, make_client, rules, protocol) -> None:
    """Nothing of it stays registered, and the others go on."""
    rules.allow("open/#")
    broker = make_broker(rules.config)
    received: list[bytes] = []
    client = make_client(broker.url, protocol=protocol)
    client.subscribe("open/#", received.append, 1)
    client.connect()
    with pytest.raises(SubscribeError) as caught:
        client.subscribe("shut/#", received.append, 1)
    assert caught.value.refused == (("shut/#", SUBSCRIBE_REFUSED[protocol]),)
    assert f"'shut/#': {SUBSCRIBE_REFUSED[protocol]}" in str(caught.value)
    client.publish("open/a", b"here", qos=1)
    eventually(lambda: received == [b"here"])
    broker.restart()
    eventually(lambda: client.stats().reconnects and client.connected)
    assert "shut/#" not in broker.log.rpartition("mosquitto version")[2]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_connect_names_every_subscription_that_is_refused(make_broker, make_client, rules, protocol) -> None:
    """And leaves the client connected, with those that were granted."""
    rules.allow("open/#")
    broker = make_broker(rules.config)
    received: list[bytes] = []
    client = make_client(broker.url, protocol=protocol)
    for topic in ("shut/1", "open/#", "shut/2"):
        client.subscribe(topic, received.append, 1)
    with pytest.raises(SubscribeError) as caught:
        client.connect()
    reason = SUBSCRIBE_REFUSED[protocol]
    assert caught.value.refused == (("shut/1", reason), ("shut/2", reason))
    assert client.connected
    client.publish("open/a", b"here", qos=1)
    eventually(lambda: received == [b"here"])
    client.connect()  # which somebody else has heard already: there is a connection


async def test_an_iterator_that_was_refused_when_connecting_says_why(make_broker, rules) -> None:
    """It asks again when it is used, for nobody tells whether the rules are still the same."""
    rules.allow("open/#")
    broker = make_broker(rules.config)
    client = aio.MQTTClient(broker.url, "me")
    messages = client.messages("shut/#", qos=1)
    with pytest.raises(SubscribeError):
        await client.connect()
    with pytest.raises(SubscribeError, match=SUBSCRIBE_REFUSED["5"]):
        await anext(messages)
    await client.shutdown()


def test_a_subscription_that_is_refused_after_a_reconnect_is_logged(
    make_broker, make_client, rules, caplog
) -> None:
    """Again after each reconnect, for the rules may change back; the others go on."""
    rules.allow("open/#", "later/shut")
    broker = make_broker(rules.config)
    received: list[bytes] = []
    client = make_client(broker.url)
    client.subscribe("later/shut", received.append, 1)
    client.subscribe("open/#", received.append, 1)
    client.connect()
    rules.allow("open/#")
    for number in (1, 2):
        caplog.clear()
        broker.restart()
        eventually(lambda number=number: client.stats().reconnects == number and client.connected)
        assert "the broker refused the subscription 'later/shut': Not authorized" in [
            record.getMessage() for record in caplog.records if record.levelname == "ERROR"
        ]
        client.publish("open/a", b"%d" % number, qos=1)
        eventually(lambda number=number: received[-1:] == [b"%d" % number])
    rules.allow("open/#", "later/shut")
    broker.restart()
    eventually(lambda: client.stats().reconnects == 3 and client.connected)
    client.publish("later/shut", b"open again", qos=1)
    eventually(lambda: received[-1] == b"open again")
