"""Every error of the package: one tree, split by what the caller does next."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

ErrorT = TypeVar("ErrorT", bound=BaseException)


class TarsMQTTError(Exception):
    """The root of this package's own errors.

    Not among them: `TypeError` and `ValueError` for arguments that nothing could be done with, the `TimeoutError` of
    an iterator's wait, and the `CancelledError` of a receipt whose message was taken back.
    """


# -- the caller's input is wrong: mend it, retrying is no use -----------------------------


class ConfigError(TarsMQTTError, ValueError):
    """One or more settings are wrong, or a file that one of them names cannot be used.

    Attributes:
        problems: One sentence per wrong field, in the order of the fields.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "invalid setting: " if count == 1 else f"{count} invalid settings: "
        super().__init__(head + "; ".join(self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


class TopicError(TarsMQTTError, ValueError):
    """A topic or a filter breaks the rules of the standard [MQTT-4.7]."""


class EncodeError(TarsMQTTError, ValueError):
    """The data cannot be written as JSON, or a property as MQTT has it; nothing was sent.

    Attributes:
        path: Where: ``data.items[3].price`` or ``properties.content_type`` for instance; ``payload`` or
            ``envelope`` where it is in those themselves.
    """

    def __init__(self, message: str, path: str = "data") -> None:
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.path)


class DecodeError(TarsMQTTError, ValueError):
    """A payload is not the envelope, or its data is not the model, that was asked for."""


# -- the connection -----------------------------------------------------------------------


class NotConnectedError(TarsMQTTError, RuntimeError):
    """There is no connection, and what was asked for cannot wait for one."""


class ConnectError(TarsMQTTError, RuntimeError):
    """No connection came about in the time allowed."""


class ConnectRefusedError(ConnectError):
    """The broker answered, and said no.

    Attributes:
        reason: The broker's reason, in the words of the standard.
        code: The reason code of MQTT 5, or the return code of MQTT 3.1.1.
        retriable: Whether the same request may succeed later.
    """

    def __init__(self, message: str, *, reason: str, code: int, retriable: bool) -> None:
        super().__init__(message)
        self.reason = reason
        self.code = code
        self.retriable = retriable

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(type(self), reason=self.reason, code=self.code, retriable=self.retriable)
        return make, self.args


class ClosedError(TarsMQTTError, RuntimeError):
    """The client was shut down, or belongs to the parent of a forked process."""


# -- one message or one subscription --------------------------------------------------------


class PublishError(TarsMQTTError):
    """One message was not, or not yet, delivered to the broker."""


class QueueFullError(PublishError):
    """No room for another outgoing message; this one was not taken.

    Attributes:
        retriable: Whether room may come free for it; not where it is larger than all the room there is.
    """

    def __init__(self, message: str, retriable: bool = True) -> None:
        super().__init__(message)
        self.retriable = retriable


class OutboxError(PublishError):
    """The durable outbox cannot be opened or written; nothing was taken."""


class AckTimeoutError(PublishError, TimeoutError):
    """The broker's acknowledgement did not come in time; the message is still on its way.

    Attributes:
        receipt: Where the outcome will be known.
    """

    def __init__(self, message: str, receipt: Any = None) -> None:
        super().__init__(message)
        self.receipt = receipt


class PublishRejectedError(PublishError):
    """The message will not be delivered: the broker refused it, or it can never be sent.

    Attributes:
        reason: Why, in the words of the standard where the broker gave a reason.
        code: The broker's reason code (MQTT 5), or None.
    """

    def __init__(self, message: str, *, reason: str, code: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), reason=self.reason, code=self.code), self.args


class SubscribeError(TarsMQTTError):
    """The broker refused a subscription, or did not answer.

    Attributes:
        refused: Filter and reason of each.
    """

    def __init__(self, message: str, refused: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.refused = tuple(refused)


def fresh(error: ErrorT) -> ErrorT:
    """Another instance with the same cause: each waiter raises its own, or their tracebacks would mix."""
    again = copy.copy(error)
    again.__cause__ = error.__cause__
    return again
