"""The documentation is true: its examples run, its links lead somewhere, its tables match the code."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import paho.mqtt.client as mqtt
import pytest

import tars_mqtt
from tars_mqtt import (
    AckTimeoutError,
    ClosedError,
    ConfigError,
    ConnectError,
    Envelope,
    Message,
    MQTTClient,
    MQTTClientConfig,
    NotConnectedError,
    OutboxError,
    PublishRejectedError,
    QueueFullError,
    aio,
    errors,
)
from tests.support import ScriptedBroker, eventually, packet
from tests.support.certificate import Authority
from tests.support.example import examples_in, run_page
from tests.support.port import HOST, free_port
from tests.support.tls_fault import FAULTS, Link
from tests.support.tunnel import Tunnel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support import ScriptedConnection

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
API = ROOT / "docs" / "API.md"
CONFIGURATION = ROOT / "docs" / "CONFIGURATION.md"
SECURITY = ROOT / "docs" / "SECURITY.md"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# -- examples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if examples_in(page)], ids=name_of)
def test_the_examples_run_and_print_what_they_say(page, broker, make_broker, monkeypatch, tmp_path):
    """A reader may copy any example of a page, after those before it, and gets what the page says."""
    monkeypatch.chdir(tmp_path)
    examples = [example.at(f"{broker.host}:{broker.port}") for example in examples_in(page)]
    if any(SECURED in example.code for example in examples):
        places = secured_broker(make_broker, tmp_path)
        examples = [example.where(places) for example in examples]
    environment = {"MQTT_URL": broker.url, "MQTT_CLIENT_ID": "my-service"}
    run_page(examples, {"__name__": "__main__"}, environment)


SECURED = "localhost:8883"
_CONF = re.compile(r"^```conf\n# /etc/mosquitto/(\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def secured_broker(make_broker: Any, folder: Path) -> dict[str, str]:
    """Start a mosquitto as docs/SECURITY.md sets it up; tells where things are that pages have in /etc/mqtt."""
    port = free_port()
    authority = Authority(folder)
    authority.issue("broker", "localhost")
    for name in ("kitchen", "office"):
        authority.issue(name, f"{name}@example.org", common_name=name)
    authority.issue("my-service", "my-service@example.org", common_name="my-service", password="open sesame")
    (folder / "my-service.password").write_text("open sesame\n")
    files = dict(_CONF.findall(SECURITY.read_text(encoding="utf-8")))
    (folder / "acl").write_text(files["acl"])
    config = files["mosquitto.conf"].replace("listener 8883", f"listener {port} {HOST}")
    make_broker(config.replace("/etc/mosquitto", str(folder)).splitlines())
    return {SECURED: f"localhost:{port}", "/etc/mqtt": str(folder)}


def test_the_access_lists_give_each_service_its_own(make_broker, tmp_path):
    """Those of docs/SECURITY.md: who may write, who may read, and that subscribing is never refused."""
    address = secured_broker(make_broker, tmp_path)[SECURED]
    seen: list[str] = []

    def see(message: Message) -> None:
        seen.append(message.topic)

    def client(name: str) -> MQTTClient:
        files = {"tls_ca": "ca.pem", "tls_cert": f"{name}.pem", "tls_key": f"{name}.key"}
        settings = {setting: tmp_path / file for setting, file in files.items()}
        return MQTTClient(f"mqtts://{address}", name, enable_health=True, **settings)

    with client("kitchen") as kitchen, client("office") as office:
        kitchen.subscribe("#", see, 1)
        kitchen.publish("kitchen/oven", b"hot", qos=1)
        office.publish("orders/kitchen/pizza", b"33 cm", qos=1)
        office.publish("orders/cellar/wine", b"red", qos=1)
        for stranger, topic in ((office, "kitchen/oven"), (kitchen, "system/health/office")):
            with pytest.raises(PublishRejectedError):
                stranger.publish(topic, b"", qos=1)
        kitchen.publish("kitchen/last", b"", qos=1)
        eventually(lambda: "kitchen/last" in seen)
    assert seen == ["kitchen/oven", "orders/kitchen/pizza", "kitchen/last"]


# -- links ----------------------------------------------------------------------------------------

_LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)")
_CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ +(.*?) *$", re.MULTILINE)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_between_pages_resolve(page):
    """Every relative link leads to a file, and to a heading where it names one."""
    broken = []
    for path, anchor in _LINK.findall(_CODE.sub("", page.read_text(encoding="utf-8"))):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(f"{path}#{anchor}" if anchor else path)
    assert not broken


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = _HEADING.findall(_CODE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_map_leads_to_every_page():
    """Whoever starts at docs/README.md finds every page and every example."""
    start = ROOT / "docs" / "README.md"
    seen = {start}
    waiting = [start]
    while waiting:
        page = waiting.pop()
        for path, _ in _LINK.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / path).resolve()
            if path and target not in seen:
                seen.add(target)
                waiting += [target] if target.suffix == ".md" else []
    everything = {path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".py")}
    assert not {name_of(path) for path in everything - seen}


# -- tests ----------------------------------------------------------------------------------------


def test_every_test_that_a_page_names_exists():
    """docs/RELIABILITY.md names the tests that show its promises."""
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))}
    written = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert named
    assert not named - set(re.findall(r"^(?:async )?def (test_\w+)\(", written, re.MULTILINE))


# -- the tables of docs/CONFIGURATION.md ------------------------------------------------------------


def test_the_table_of_settings_matches_the_code():
    """Names, variables, defaults, rules and descriptions are those of the code."""
    expected = "\n".join(
        ["| setting | variable | default | allowed | what it is |", "|---|---|---|---|---|", *rows()]
    )
    assert expected in CONFIGURATION.read_text(encoding="utf-8"), f"the table should be:\n\n{expected}\n"


def rows() -> list[str]:
    return [
        f"| `{field.name}` | {variable_of(field)} | {default_of(field)} "
        f"| {allowed_in(field)} | {field.metadata['doc']} |"
        for field in attrs.fields(MQTTClientConfig)
    ]


def variable_of(field: Any) -> str:
    variable = field.metadata["env"]
    return f"`MQTT_{variable}`" if variable else "none"


def default_of(field: Any) -> str:
    if field.default is attrs.NOTHING:
        return "required"
    if field.default in (None, ""):
        return "none"
    text = f"{field.default:,}" if type(field.default) is int else str(field.default)
    return text.lower() if isinstance(field.default, bool) else text


def allowed_in(field: Any) -> str:
    """What its rule says that a value must be."""
    complaint: str = field.metadata["rule"](object())
    return complaint.removeprefix("must be ").removeprefix("a ").partition(":")[0]


def test_every_setting_is_in_the_example_environment():
    """.env.example names each variable, and shows the default where there is one."""
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    shown = dict(line.removeprefix("# ").split("=", 1) for line in lines if re.match(r"(# )?MQTT_\w+=", line))
    fields = [field for field in attrs.fields(MQTTClientConfig) if field.metadata["env"]]
    assert shown.keys() == {f"MQTT_{field.metadata['env']}" for field in fields}
    for field in fields:
        if field.default not in (attrs.NOTHING, None):
            as_field = type(field.default) if not isinstance(field.default, bool) else json.loads
            assert as_field(shown[f"MQTT_{field.metadata['env']}"]) == field.default


# -- the errors of docs/CONFIGURATION.md -------------------------------------------------------------

_ROW = re.compile(r"^\| (?:`\w+`: |in the log: )?`(?P<message>[^`]+ [^`]+)` \| .* \|$", re.MULTILINE)


def documented_errors() -> list[str]:
    text = CONFIGURATION.read_text(encoding="utf-8")
    return _ROW.findall(text[text.index("## Common errors") :])


def test_the_documented_errors_are_what_users_see(make_broker, caplog, tmp_path):
    """Each message in the tables is one that the code gives for the mistake that it stands for."""
    real = [*config_errors(), *connection_errors(make_broker), *publish_errors(make_broker())]
    real += outbox_errors(make_broker(), tmp_path / "outbox")
    real += tls_errors(tmp_path)
    with caplog.at_level("WARNING", "tars_mqtt"):
        provoke_log_lines(make_broker())
    real += [record.getMessage().removeprefix("connection lost: ") for record in caplog.records]
    patterns = [re.escape(error).replace("…", ".+") for error in documented_errors()]
    assert len(patterns) > 15
    assert not [pattern for pattern in patterns if not any(re.fullmatch(pattern, text) for text in real)]


def config_errors() -> Iterator[str]:
    wrong: list[dict[str, Any]] = [
        {"mqtt_url": "localhost:1883"},
        {"mqtt_url": "tcp://localhost:1883"},
        {"mqtt_url": "mqtt://user:p@ss@localhost"},
        {"mqtt_url": "mqtt://user:secret"},
        {"mqtt_url": "mqtt://localhost/1883"},
        {"client_id": "plant/1"},
        {"dedupe_ttl": 60},
        {"password": "secret"},
        {"username": "me", "password": "secret", "password_file": "/run/secrets/mqtt"},
        {"dedupe_durable": True},
        {"tls_ca": "ca.pem"},
        {"ws_headers": {"Authorization": "secret"}},
        {"proxy": "socks5://localhost"},
    ]
    for settings in wrong:
        with pytest.raises(ConfigError) as caught:
            MQTTClientConfig(**{"mqtt_url": "mqtt://localhost", "client_id": "a"} | settings)
        yield from caught.value.problems
    with pytest.raises(ConfigError) as caught:
        MQTTClientConfig.from_env(environ={})
    yield from caught.value.problems
    with pytest.raises(TypeError) as unknown:
        MQTTClient("mqtt://localhost", "a", keep_alive=60)
    yield str(unknown.value)


def connection_errors(make_broker: Any) -> Iterator[str]:
    guarded = make_broker(users={"me": "secret"})
    without_tls = guarded.url.replace("mqtt://", "mqtts://")
    for url in (f"mqtt://localhost:{free_port()}", "mqtt://brocker.invalid", guarded.url, without_tls):
        client = MQTTClient(url, "a", connect_timeout=1, reconnect_min_delay=0.1)
        with pytest.raises(ConnectError) as caught:
            client.connect()
        yield str(caught.value)

    with Tunnel("http", login=("me", "secret")) as proxy:
        client = MQTTClient("mqtt://localhost", "a", proxy=f"http://localhost:{proxy.port}")
        with pytest.raises(ConnectError) as caught:
            client.connect()
        yield str(caught.value)

    def fails() -> tuple[str, str]:
        raise OSError

    client = MQTTClient("mqtt://localhost", "a", connect_timeout=1, credentials=fails)
    with pytest.raises(ConnectError) as caught:
        client.connect()
    yield str(caught.value)


def tls_errors(folder: Path) -> Iterator[str]:
    for number, fault in enumerate(FAULTS):
        if fault.lasting:
            place = folder / str(number)
            place.mkdir()
            with Link(place, **fault.link) as link:
                fault.happen(link)
                with pytest.raises(fault.error) as caught:
                    MQTTClient(link.url, "a", **link.settings).connect()
            yield str(caught.value)


def publish_errors(broker: Any) -> Iterator[str]:
    client = MQTTClient(broker.url, "a", max_queued=1)
    with pytest.raises(NotConnectedError) as not_yet:
        client.publish("a", "")
    yield str(not_yet.value)
    with client:
        broker.kill()
        eventually(lambda: not client.connected)
        with pytest.raises(NotConnectedError) as offline:
            client.publish("a", "")
        with pytest.raises(AckTimeoutError) as slow:
            client.publish("a", "", qos=1, timeout=0.01)
        with pytest.raises(QueueFullError) as full:
            client.publish("a", "", qos=1, timeout=0)
        yield from (str(caught.value) for caught in (offline, slow, full))
        client.shutdown(0.5)
    with pytest.raises(ClosedError) as closed:
        client.publish("a", "", qos=1)
    yield str(closed.value)


def outbox_errors(broker: Any, file: Path) -> Iterator[str]:
    second = MQTTClient(broker.url, "b", outbox=file)
    with MQTTClient(broker.url, "a", outbox=file), pytest.raises(OutboxError) as taken:
        second.connect()
    yield str(taken.value)


def provoke_log_lines(broker: Any) -> None:
    def wants_an_envelope(event: Envelope) -> None: ...

    def take_over(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.send(packet.disconnect(0x8E))

    with MQTTClient(broker.url, "my-service") as client:
        client.publish_health(True)
        client.subscribe("a", wants_an_envelope)
        client.publish("a", "hello")
        eventually(lambda: client.stats().decode_failures)
    with ScriptedBroker(take_over) as scripted, MQTTClient(scripted.url, "my-service") as client:
        eventually(lambda: not client.connected)


# -- docs/API.md ----------------------------------------------------------------------------------


def public_names() -> list[str]:
    """Every public name: of the package, and of the classes that it exports; settings have their own page."""
    names = {"tars_mqtt.aio"} | {name for name in vars(errors) if name.endswith("Error")}
    for module in (tars_mqtt, aio):
        for name in module.__all__:
            names.add(name)
            thing = getattr(module, name) if name != "__version__" else None
            if isinstance(thing, type) and not issubclass(thing, Exception):
                names |= {f"{name}.{member}" for member in public_members(thing)}
    settings = {f"MQTTClientConfig.{field.name}" for field in attrs.fields(MQTTClientConfig)}
    return sorted(names - settings)


def public_members(cls: type) -> set[str]:
    """What a class defines itself, attributes of attrs classes included."""
    return {name for name in vars(cls) if not name.startswith("_")} | {
        field.name for field in getattr(cls, "__attrs_attrs__", ())
    }


@pytest.mark.parametrize("name", public_names())
def test_every_public_name_is_in_the_api_reference(name):
    """API.md has the name in code, and a member in the section of its class."""
    text = API.read_text(encoding="utf-8")
    owner, _, member = name.rpartition(".")
    if owner and owner != "tars_mqtt":
        section = re.search(rf"^## [^\n]*`{owner}`.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        assert section, f"there is no section on {owner}"
        assert re.search(rf"\b{member}\b", section[0])
    else:
        assert f"`{name}`" in text


# -- docs/internals ---------------------------------------------------------------------------------


def test_the_table_of_locks_names_every_lock():
    """Whoever adds a lock says there what it guards, and who takes it."""
    page = (ROOT / "docs" / "internals" / "THREADS.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(\w+)` \| `(\w+)`", page, re.MULTILINE))
    assert documented == {lock for source in sources() for lock in locks_in(source)}


def sources() -> list[Path]:
    return sorted(Path(tars_mqtt.__file__).parent.rglob("*.py"))


def locks_in(source: Path) -> Iterator[tuple[str, str]]:
    """Class and attribute of each lock that a module makes; a condition on a lock counted already is none."""
    for cls in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(cls, ast.ClassDef):
            for node in ast.walk(cls):
                value = ast.unparse(node.value) if isinstance(node, ast.Assign) else ""
                if re.search(r"threading\.R?Lock\(\)", value):
                    name = ast.unparse(node.targets[0]).removeprefix("self.")
                    if name.startswith("_"):
                        yield cls.name, name


def test_the_picture_of_the_house_shows_every_module():
    """And no other: docs/internals/README.md, left of its comments."""
    page = (ROOT / "docs" / "internals" / "README.md").read_text(encoding="utf-8")
    picture = page.partition("```text\n")[2].partition("```")[0]
    shown = re.findall(r"\w+", re.sub(r" {6,}\S.*", "", picture))
    modules = [path.stem for path in sources() if path.stem != "__init__"]
    assert sorted(shown) == sorted([*modules, "tars_mqtt", "_core", "aio"])


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "internals").glob("*.md")), ids=name_of)
def test_the_internals_name_what_there_is(page):
    """``Class.name`` and the paths of files: what moves or goes must move or go there as well."""
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b([A-Z][a-z]\w+)\.(\w+)", text))
    assert named - {pair for source in sources() for pair in names_in(source)} == set()
    paths = re.findall(r"`((?:scripts|tests|docs)/[\w./]*)`", text)
    assert not [path for path in paths if not (ROOT / path).exists()]


def names_in(source: Path) -> Iterator[tuple[str, str]]:
    """Class and name of each method and attribute that a module's classes define or use."""
    for cls in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(cls, ast.ClassDef):
            for node in ast.walk(cls):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield cls.name, node.name
                elif isinstance(node, ast.Attribute):
                    yield cls.name, node.attr


def test_paho_is_imported_in_one_place_only():
    """As docs/internals/PAHO.md says."""
    pattern = re.compile(r"^\s*(import|from) paho", re.MULTILINE)
    assert [path.name for path in sources() if pattern.search(path.read_text())] == ["paho.py"]


def test_paho_has_what_we_use_of_its_inside():
    """The two names that docs/internals/PAHO.md owns up to."""
    assert callable(mqtt.Client._create_socket)
    assert callable(mqtt.Client._mid_generate)
