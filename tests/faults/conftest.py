"""What breaks: a network of the test's own in front of a broker of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tars_mqtt._core.backoff import Backoff
from tests.support import Broker, FaultProxy
from tests.support.colour import ClientMaker

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def network(broker: Broker) -> Iterator[FaultProxy]:
    """The way to ``broker``, whole until the test breaks it."""
    with FaultProxy(broker.url) as proxy:
        yield proxy


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconnect without a delay, where a test has many of them and is not about their length."""
    monkeypatch.setattr(Backoff, "next", lambda _: 0.0)
    monkeypatch.setattr(Backoff, "longest", lambda _: 0.0)


@pytest.fixture
def make_aio_client() -> Iterator[ClientMaker]:
    """Make asyncio clients only, for what threads do not have: tasks that are cancelled."""
    maker = ClientMaker("aio")
    yield maker
    maker.close()
