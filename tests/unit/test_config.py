"""`MQTTClientConfig`: defaults, rules, the environment, and that no password shows anywhere."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import TYPE_CHECKING, Any, get_type_hints

import attrs
import pytest

from tars_mqtt import ConfigError, MQTTClientConfig
from tars_mqtt.settings import Overrides

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "hunter2"
URL = "mqtt://localhost:1883"


def problems(**settings: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        MQTTClientConfig(**({"mqtt_url": URL, "client_id": "c"} | settings))
    return caught.value.problems


def test_the_defaults_are_those_that_are_promised() -> None:
    config = MQTTClientConfig(URL, "my-service")
    promised = {
        "source_name": "my-service",
        "enable_health": False,
        "enable_heartbeat": False,
        "heartbeat_interval": 30.0,
        "dedupe_ttl": 0.0,
        "dedupe_max_entries": 0,
        "keepalive": 60,
        "reconnect_min_delay": 1.0,
        "reconnect_max_delay": 60.0,
        "connect_timeout": 10.0,
        "publish_timeout": 30.0,
        "shutdown_timeout": 10.0,
        "protocol": "auto",
        "session_expiry": 3600.0,
        "workers": 8,
        "max_inflight": 64,
        "max_queued": 10_000,
        "max_queued_bytes": 64 * 2**20,
        "max_pending": 10_000,
        "correlation": "field",
    }
    assert {name: getattr(config, name) for name in promised} == promised


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("mqtt_url", ["", None, 5, "localhost:1883", "http://h"]),
        ("client_id", ["", None, 5, "a\nb", "\ud800", "x" * 65_536]),
        ("source_name", ["a/b", "a+", "#", 5]),
        ("enable_health", ["yes", 1, None]),
        ("enable_heartbeat", [0]),
        ("heartbeat_interval", [0.9, float("nan"), float("inf"), "30", True, -1]),
        ("dedupe_ttl", [-1, float("nan"), "1"]),
        ("dedupe_max_entries", [-1, 1.5, True]),
        ("keepalive", [0, 65_536, 1.5, "60", True]),
        ("reconnect_min_delay", [0.05, float("nan")]),
        ("reconnect_max_delay", [0.4, float("inf")]),
        ("connect_timeout", [0, -1, float("inf")]),
        ("publish_timeout", [0]),
        ("shutdown_timeout", [0]),
        ("protocol", ["3.1", 5, "v5"]),
        ("session_expiry", [-1, 1.5, 4_294_967_296]),
        ("workers", [0, 1.5, True]),
        ("max_inflight", [0, 65_536]),
        ("max_queued", [0]),
        ("max_queued_bytes", [0]),
        ("max_pending", [0]),
        ("handler_timeout", [-1, float("nan")]),
        ("outbox_max_messages", [0]),
        ("outbox_max_bytes", [0]),
        ("outbox_max_age", [-1]),
        ("correlation", ["ids", 5]),
        ("username", [5, "a\0b"]),
        ("credentials", [5, ("me", "secret")]),
        ("ws_headers", [5, "no colon", {"a b": ""}, {"a": 1}, {"a": "b\nc"}, {"Sec-WebSocket-Key": ""}]),
        ("proxy", [5, "", "localhost:1080", "socks5://h", "ftp://h:1", "http://h:1/path", "http://h:x"]),
    ],
)
def test_what_breaks_a_rule_is_refused_naming_the_field(name: str, bad: list[Any]) -> None:
    for value in bad:
        assert any(problem.startswith(name + " ") for problem in problems(**{name: value})), value


def test_every_problem_is_reported_at_once() -> None:
    found = problems(mqtt_url="nonsense", client_id="", keepalive=0, workers=-1)
    assert [problem.split()[0] for problem in found] == ["mqtt_url", "client_id", "keepalive", "workers"]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"dedupe_ttl": 5}, "dedupe_max_entries"),
        ({"reconnect_min_delay": 5, "reconnect_max_delay": 4}, "reconnect_max_delay"),
        ({"username": "u", "password": "a", "password_file": "b"}, "password_file"),
        ({"password": "a"}, "username"),
        ({"username": "u", "credentials": dict}, "username"),
        ({"password_file": "f", "credentials": dict}, "password_file"),
        ({"mqtt_url": "mqtts://h", "tls_cert": "c"}, "tls_key"),
        ({"mqtt_url": "mqtts://h", "tls_key": "k"}, "tls_cert"),
        ({"tls_ca": "ca"}, "tls_ca"),
        ({"ws_headers": {"a": "b"}}, "ws_headers"),
        ({"mqtt_url": "mqtt+unix:///s", "proxy": "socks5://h:1080"}, "proxy"),
        ({"tls_insecure": True}, "tls_insecure"),
        ({"client_id": "a/b"}, "source_name"),
        ({"dedupe_durable": True}, "dedupe_durable"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], field: str) -> None:
    (problem,) = problems(**settings)
    assert problem.startswith(field + " ")


def test_a_whole_number_is_a_fine_number_of_seconds() -> None:
    config = MQTTClientConfig(URL, "c", heartbeat_interval=5)
    assert (config.heartbeat_interval, type(config.heartbeat_interval)) == (5.0, float)


# -- the environment ------------------------------------------------------------------------------


def test_every_setting_but_a_function_has_a_variable() -> None:
    environ = {
        "MQTT_URL": "mqtt://broker:1",
        "MQTT_CLIENT_ID": "env",
        "MQTT_KEEPALIVE": "30",
        "MQTT_HEARTBEAT_INTERVAL": "1.5",
        "MQTT_PROTOCOL": "3.1.1",
        "MQTT_OUTBOX": "/tmp/outbox.db",
        "MQTT_SOURCE_NAME": "",
    }
    config = MQTTClientConfig.from_env(environ=environ)
    assert (config.mqtt_url, config.client_id, config.source_name) == ("mqtt://broker:1", "env", "env")
    assert (config.keepalive, config.heartbeat_interval) == (30, 1.5)
    assert (config.protocol, config.outbox) == ("3.1.1", "/tmp/outbox.db")
    names = [field.metadata["env"] for field in attrs.fields(MQTTClientConfig)]
    names.remove(None)  # a function, which no variable can hold
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, True) for text in ("true", "TRUE", "1", "yes", "On")),
        *((text, False) for text in ("false", "0", "NO", "off")),
    ],
)
def test_booleans_are_read_in_every_usual_way(text: str, value: bool) -> None:
    environ = {"MQTT_URL": URL, "MQTT_CLIENT_ID": "c", "MQTT_ENABLE_HEALTH": text}
    assert MQTTClientConfig.from_env(environ=environ).enable_health is value


def test_problems_of_the_environment_name_the_variables() -> None:
    environ = {"TARS_URL": "nonsense", "TARS_KEEPALIVE": "sixty", "TARS_ENABLE_HEALTH": "maybe"}
    with pytest.raises(ConfigError) as caught:
        MQTTClientConfig.from_env("TARS_", environ)
    for variable in ("TARS_URL", "TARS_CLIENT_ID", "TARS_KEEPALIVE", "TARS_ENABLE_HEALTH"):
        assert variable in str(caught.value)


def test_keywords_win_over_the_environment() -> None:
    environ = {"MQTT_URL": URL, "MQTT_CLIENT_ID": "env", "MQTT_KEEPALIVE": "nonsense"}
    config = MQTTClientConfig.from_env(environ=environ, client_id="keyword", keepalive=5)
    assert (config.client_id, config.keepalive) == ("keyword", 5)


def test_a_misspelt_variable_is_pointed_out_without_its_value(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"MQTT_URL": URL, "MQTT_CLIENT_ID": "c", "MQTT_PASWORD": SECRET}
    with caplog.at_level(logging.WARNING):
        MQTTClientConfig.from_env(environ=environ)
    assert "MQTT_PASWORD" in caplog.text
    assert "MQTT_PASSWORD" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("keep_alive", "keepalive"),
        ("Keepalive", "keepalive"),
        ("user", "username"),
        ("url", "mqtt_url"),
        ("dedup_ttl", "dedupe_ttl"),
        ("health", "enable_health"),
        ("host", "mqtt_url"),
        ("ca_certs", "tls_ca"),
        ("will", "enable_health"),
    ],
)
def test_a_misspelt_keyword_is_pointed_out(written: str, meant: str) -> None:
    hint = f"there is no setting {written!r}: did you mean {meant!r}"
    with pytest.raises(TypeError, match=hint):
        MQTTClientConfig(URL, "c", **{written: 5})
    with pytest.raises(TypeError, match=hint):
        attrs.evolve(MQTTClientConfig(URL, "c"), **{written: 5})


def test_a_keyword_like_no_other_is_answered_with_all_there_are() -> None:
    with pytest.raises(
        TypeError, match=r"no setting 'colour': choose from mqtt_url, client_id, .*tls_insecure"
    ):
        MQTTClientConfig(URL, "c", colour="red")  # type: ignore[call-arg]


def test_type_checkers_know_every_setting_and_no_other() -> None:
    """With its type, as far as that is not a converter's business."""
    fields = {field.name: field.type for field in attrs.fields(MQTTClientConfig)}
    known = get_type_hints(Overrides)
    assert known.keys() == fields.keys()
    hints = get_type_hints(MQTTClientConfig)
    assert {name: hints[name] for name in known if name != "source_name"} == {
        name: hint for name, hint in known.items() if name != "source_name"
    }


@pytest.mark.parametrize(
    ("prefix", "variable", "hint"),
    [
        ("MQTT_", "MQTT_KEEP_ALIVE", "did you mean MQTT_KEEPALIVE?"),
        ("MQTT_", "MQTT_USER", "did you mean MQTT_USERNAME?"),
        ("MQTT_", "MQTT_HEALTH", "did you mean MQTT_ENABLE_HEALTH?"),
        ("MQTT_", "MQTT_HOST", "did you mean MQTT_URL?"),
        ("MQTT_", "MQTT_CLEAN_SESSION", "did you mean MQTT_SESSION_EXPIRY?"),
        ("KITCHEN", "KITCHEN_KEEPALIVE", "is the prefix 'KITCHEN_'?"),
    ],
)
def test_a_wrong_variable_is_met_with_a_hint(
    prefix: str, variable: str, hint: str, caplog: pytest.LogCaptureFixture
) -> None:
    environ = {prefix + "URL": URL, prefix + "CLIENT_ID": "c", variable: "5"}
    MQTTClientConfig.from_env(prefix, environ)
    assert f"ignored the environment variable {variable}: {hint}" in caplog.text


def test_variables_of_others_are_none_of_our_business(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"MQTT_URL": URL, "MQTT_CLIENT_ID": "c", "MQTT_": "", "MQTT_TOPIC": "a", "MQTT_URL_PREFIX": "b"}
    MQTTClientConfig.from_env(environ=environ)
    assert not caplog.records


# -- secrets --------------------------------------------------------------------------------------


def test_no_password_shows() -> None:
    by_url = MQTTClientConfig(f"mqtt://me:{SECRET}@h", "c")
    by_field = MQTTClientConfig(URL, "c", username="me", password=SECRET)
    for config in (by_url, by_field):
        assert SECRET not in repr(config)
        assert SECRET not in str(config.urls)
        assert config.user_and_password() == ("me", SECRET)


def test_no_error_shows_a_password() -> None:
    for settings in (
        {"mqtt_url": f"mqtt://me:{SECRET}@h:port", "keepalive": 0},
        {"password": SECRET, "keepalive": 0},
        {"password": SECRET, "password_file": "f", "username": "u"},
    ):
        assert SECRET not in " ".join(problems(**settings))


def test_no_secret_of_a_proxy_or_of_a_header_shows() -> None:
    proxy, headers = f"socks5://me:{SECRET}@h:1080", {"Authorization": SECRET}
    config = MQTTClientConfig("ws://h", "c", proxy=proxy, ws_headers=headers, credentials=lambda: SECRET)
    assert SECRET not in repr(config)
    for wrong in (
        {"proxy": f"socks5://me:{SECRET}"},
        {"proxy": f"socks5://me:{SECRET}@h:1/path"},
        {"ws_headers": f"Authorization {SECRET}"},
        {"ws_headers": {"Authorization": f"{SECRET}\n"}},
        {"ws_headers": {f"{SECRET}\n": ""}},
    ):
        assert SECRET not in " ".join(problems(**wrong))


def test_fields_win_over_the_url() -> None:
    config = MQTTClientConfig("mqtt://a:b@h", "c", username="u", password="p")
    assert config.user_and_password() == ("u", "p")


def test_the_password_file_is_read_each_time(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("first\n")
    config = MQTTClientConfig(URL, "c", username="u", password_file=path)
    assert config.user_and_password() == ("u", "first")
    path.write_text("second")
    assert config.user_and_password() == ("u", "second")
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        config.user_and_password()


def test_a_config_can_be_compared_copied_and_pickled() -> None:
    config = MQTTClientConfig(f"mqtt://me:{SECRET}@h", "c", keepalive=5)
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert attrs.evolve(config, keepalive=6) != config
