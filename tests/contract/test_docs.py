"""The documentation is true: its examples run, its links lead somewhere, its tables match the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs
import pytest

import tars_mqtt
from tars_mqtt import MQTTClientConfig, aio
from tests.support.example import examples_in, run_page

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
API = ROOT / "docs" / "API.md"
CONFIGURATION = ROOT / "docs" / "CONFIGURATION.md"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# -- examples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if examples_in(page)], ids=name_of)
def test_the_examples_run_and_print_what_they_say(page, broker, monkeypatch, tmp_path):
    """A reader may copy any example of a page, after those before it, and gets what the page says."""
    environment = {"MQTT_URL": broker.url, "MQTT_CLIENT_ID": "my-service"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    examples = [example.at(f"{broker.host}:{broker.port}") for example in examples_in(page)]
    run_page(examples, {"__name__": "__main__"}, environment)


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


# -- the tables of docs/CONFIGURATION.md ------------------------------------------------------------


def test_the_table_of_settings_matches_the_code():
    """Names, variables, defaults, rules and descriptions are those of the code."""
    expected = "\n".join(["| setting | variable | default | allowed | what it is |", "|---|---|---|---|---|", *rows()])
    assert expected in CONFIGURATION.read_text(encoding="utf-8"), f"the table should be:\n\n{expected}\n"


def rows() -> list[str]:
    return [
        f"| `{field.name}` | `MQTT_{field.metadata['env']}` | {default_of(field)} "
        f"| {allowed_in(field)} | {field.metadata['doc']} |"
        for field in attrs.fields(MQTTClientConfig)
    ]


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
    fields = attrs.fields(MQTTClientConfig)
    assert list(shown) and shown.keys() == {f"MQTT_{field.metadata['env']}" for field in fields}
    for field in fields:
        if field.default not in (attrs.NOTHING, None):
            assert shown[f"MQTT_{field.metadata['env']}"].lower() == str(field.default).lower()


# -- docs/API.md ----------------------------------------------------------------------------------


def public_names() -> list[str]:
    """Every public name: of the package, and of the classes that it exports."""
    names = {"tars_mqtt.aio"}
    for module in (tars_mqtt, aio):
        for name in module.__all__:
            names.add(name)
            thing = getattr(module, name) if name != "__version__" else None
            if isinstance(thing, type) and not issubclass(thing, Exception):
                names |= {f"{name}.{member}" for member in public_members(thing)}
    return sorted(names)


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
        section = re.search(rf"^## .*`{owner}`.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        assert section, f"there is no section on {owner}"
        assert re.search(rf"\b{member}\b", section[0])
    else:
        assert f"`{name}`" in text
