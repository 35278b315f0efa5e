"""What an attempt to connect shows of itself: user name and password, and the headers of a websocket."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tars_mqtt import rule
from tars_mqtt._core.aside import Aside, CallFailedError
from tars_mqtt._core.limit import Limit
from tars_mqtt.config import MQTTClientConfig
from tars_mqtt.errors import ConnectError
from tars_mqtt.url import BrokerURL

Login = tuple[str | None, str | None]
"""User name and password."""


class Secrets:
    """Gets them anew for each attempt, from the settings or from the user's functions.

    Owned by the network thread. No error quotes anything of what a function returned or raised.
    """

    def __init__(self, config: MQTTClientConfig, aside: Aside) -> None:
        self._config = config
        self._aside = aside
        self._login: Login | None = None
        self._headers: Mapping[str, str] = {}

    def ask(self, url: BrokerURL, limit: Limit) -> None:
        """Ask the user's functions, once for all brokers of an attempt, of which *url* is the first.

        Raises:
            ConnectError: A function failed, took too long, or returned something else.
            Interrupted: The attempt was called off.
        """
        config = self._config
        if config.credentials is not None:
            self._login = self._ask("credentials", config.credentials, _wrong_login, url, limit)
        headers = config.ws_headers
        if callable(headers) and any(each.transport == "websockets" for each in config.urls):
            headers = self._ask("ws_headers", headers, _wrong_headers, url, limit)
        if isinstance(headers, Mapping):
            self._headers = headers

    def login(self, url: BrokerURL) -> Login:
        """User name and password.

        Raises:
            ConfigError: The file with the password cannot be used.
        """
        return self._config.user_and_password(url) if self._login is None else self._login

    @property
    def headers(self) -> Mapping[str, str]:
        """What a websocket's handshake says beside the headers of the standard."""
        return self._headers

    def _ask(
        self,
        name: str,
        function: Callable[[], Any],
        wrong: Callable[[object], str | None],
        url: BrokerURL,
        limit: Limit,
    ) -> Any:
        try:
            answer = self._aside.call(name, function, limit)
        except CallFailedError as error:
            raise ConnectError(f"no connection to {url}: the {name} callable {error}") from error
        if problem := wrong(answer):
            raise ConnectError(f"no connection to {url}: what the {name} callable returned {problem}")
        return answer


def _wrong_login(answer: object) -> str | None:
    if not isinstance(answer, tuple) or len(answer) != 2:
        return f"is a {type(answer).__name__}, and not a tuple of user name and password"
    for noun, check, part in zip(
        ("user name", "password"), (rule.username, rule.password), answer, strict=True
    ):
        if problem := check(part):
            return f"has a {noun} that {problem}"
    return None


def _wrong_headers(answer: object) -> str | None:
    return (
        rule.headers(answer)
        if isinstance(answer, Mapping)
        else f"is a {type(answer).__name__}, and not a dict"
    )
