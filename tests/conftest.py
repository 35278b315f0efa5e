"""Fixtures for all tests: brokers, names, and the check that nothing is left behind."""

from __future__ import annotations

import asyncio
import inspect
import os
import sysconfig
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hypothesis
import pytest

from tests.support import Broker, BrokerMissing, FaultProxy, LeakCheck, RemoteBroker, find_broker
from tests.support.colour import ClientMaker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MARKED_DIRECTORIES = ("integration", "contract", "faults", "scripts")
ON_CI = os.environ.get("CI", "").lower() not in {"", "0", "false", "no"}

# A deadline would measure the machine, not the code; and so does the check that examples come fast enough.
hypothesis.settings.register_profile(
    "tars-mqtt", deadline=None, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tars-mqtt")


def pytest_configure(config: pytest.Config) -> None:
    installed = Path(sysconfig.get_path("purelib"))
    if os.environ.get("MQTT_TEST_INSTALLED") and installed not in package_path().parents:
        raise pytest.UsageError(f"the installed package was to be tested, and not {package_path()}")


def pytest_report_header(config: pytest.Config) -> list[str]:
    try:
        broker = find_broker().rpartition("@")[2]
    except BrokerMissing:
        broker = "none"
    return [f"tars_mqtt: {package_path()}", f"broker: {broker}"]


def package_path() -> Path:
    spec = find_spec("tars_mqtt")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's directory is its mark."""
    tests = Path(__file__).parent
    for item in items:
        for name in MARKED_DIRECTORIES:
            if item.path.is_relative_to(tests / name):
                item.add_marker(name)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine test on a loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """After each test no thread and no socket of ours is left."""
    check = LeakCheck()
    yield
    check.assert_clean()


@pytest.fixture(scope="session")
def shared_broker() -> Iterator[Broker | RemoteBroker]:
    """A broker for tests that leave it as it is and use names of their own (``unique``)."""
    try:
        found = find_broker()
    except BrokerMissing as missing:
        _do_without(missing)
    if "://" in found:
        yield RemoteBroker(found)
        return
    with Broker() as broker:
        yield broker


@pytest.fixture
def make_broker() -> Iterator[Callable[..., Broker]]:
    """Start brokers with the options of ``Broker``, for tests that stop, kill, freeze or configure theirs."""
    brokers: list[Broker] = []

    def make(*args: object, **options: object) -> Broker:
        try:
            broker = Broker(*args, **options)  # type: ignore[arg-type]
        except BrokerMissing as missing:
            _do_without(missing)
        brokers.append(broker)
        broker.start()
        return broker

    yield make
    for broker in brokers:
        broker.close()


@pytest.fixture
def broker(make_broker: Callable[..., Broker]) -> Broker:
    """A broker of the test's own, which it may treat as it likes."""
    return make_broker()


@pytest.fixture
def proxy(shared_broker: Broker | RemoteBroker) -> Iterator[FaultProxy]:
    """A network that breaks on demand, in front of the shared broker; it keeps what goes through."""
    with FaultProxy(shared_broker.url, record=True) as proxy:
        yield proxy


@pytest.fixture(params=["sync", "aio"])
def make_client(request: pytest.FixtureRequest) -> Iterator[ClientMaker]:
    """Make clients: sync in one run of the test, aio in the other. See ``tests.support.colour``."""
    maker = ClientMaker(request.param)
    yield maker
    maker.close()


@pytest.fixture
def unique() -> str:
    """A name no other test has: for client ids, sources and the first level of topics."""
    return f"t{uuid.uuid4().hex[:12]}"


def _do_without(missing: BrokerMissing) -> NoReturn:
    if ON_CI:
        pytest.fail(str(missing))
    pytest.skip(str(missing))
