"""One scenario for both clients: a blocking face of the asyncio client lets a test read the same for either.

With the fixture ``make_client`` a test runs twice, as ``[sync]`` and as ``[aio]``::

    def test_a_message_comes_back(make_client, shared_broker, unique):
        received = []
        client = make_client(shared_broker.url, source_name="me")
        client.subscribe(f"{unique}/#", received.append)
        client.connect()
        client.publish_event(f"{unique}/a", "test.happened", {"n": 1}, qos=1)
        eventually(lambda: received)

In ``[aio]`` the client lives on an event loop in a thread of its own, and

- calls run on that loop and block the caller: those of the client, its subscriptions, receipts and iterators;
- ``with`` and ``for`` stand for ``async with`` and ``async for``;
- a plain function given to ``subscribe`` or ``on`` becomes a coroutine function: its messages go through
  tasks on the loop. The function itself runs on a thread, where it may block and use the client. Coroutine
  functions stay as they are. For a plain function handled as such, go to the client: ``client.unwrapped``.

At the end of the test all clients are shut down and the loop's thread has ended.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    Colour = Literal["sync", "aio"]

PATIENCE = 45.0
"""Seconds after which a blocked call fails the test; below the time-out of the test, which says less."""

TEARDOWN = 2.0
"""Seconds that a client may take for its shutdown at the end of a test."""


class ClientMaker:
    """Makes clients of one colour, and ends them all. The fixture ``make_client`` is one of these.

    Attributes:
        colour: "sync" or "aio".
    """

    def __init__(self, colour: Colour) -> None:
        self.colour = colour
        self._clients: list[Any] = []
        self._loop = LoopThread() if colour == "aio" else None

    def __call__(
        self, mqtt_url: str, client_id: str | None = None, source_name: str | None = None, **settings: Any
    ) -> Any:
        """Make a client; unless said otherwise with an id of its own, reconnecting within half a second."""
        from tars_mqtt import MQTTClient, aio

        client_id = client_id or f"t{uuid.uuid4().hex[:12]}"
        settings = {"reconnect_min_delay": 0.1, "reconnect_max_delay": 0.5} | settings
        client: Any
        if self._loop is None:
            client = MQTTClient(mqtt_url, client_id, source_name, **settings)
        else:
            client = BlockingClient(aio.MQTTClient(mqtt_url, client_id, source_name, **settings), self._loop)
        self._clients.append(client)
        return client

    def close(self) -> None:
        """Shut all clients down, and end the loop."""
        try:
            for client in reversed(self._clients):
                client.shutdown(timeout=TEARDOWN)
        finally:
            if self._loop is not None:
                self._loop.close()


class LoopThread:
    """An event loop in a thread of its own, and the threads on which handlers run that may block."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._handlers = ThreadPoolExecutor(64, thread_name_prefix="test-handler")
        self._errors: list[str] = []
        self.loop.set_exception_handler(lambda _, context: self._errors.append(repr(context)))
        self._thread = threading.Thread(target=self.loop.run_forever, name="test-loop", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call *function* on the loop, in the caller's context; if it returns a coroutine, await that."""
        assert threading.current_thread() is not self._thread, "a blocking call on the loop's own thread"
        outcome: Future[Any] = Future()

        async def run() -> None:
            try:
                result = function(*args, **kwargs)
                outcome.set_result(await result if inspect.iscoroutine(result) else result)
            except BaseException as error:
                outcome.set_exception(error)

        tasks: list[asyncio.Task[None]] = []  # the loop alone would not keep the task alive
        context = contextvars.copy_context()
        self.loop.call_soon_threadsafe(lambda: tasks.append(self.loop.create_task(run())), context=context)
        return outcome.result(PATIENCE)

    def as_coroutine_function(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        """A coroutine function that looks like *handler* and calls it on a thread."""
        if inspect.iscoroutinefunction(handler):
            return handler

        @functools.wraps(handler)
        async def on_thread(argument: Any) -> None:
            context = contextvars.copy_context()
            await self.loop.run_in_executor(self._handlers, context.run, handler, argument)

        return on_thread

    def close(self) -> None:
        """End the loop and its threads; fail if something went wrong on the loop that nobody has seen."""
        self.call(_cancel_all)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        assert not self._thread.is_alive(), "the event loop does not end"
        self.loop.close()
        self._handlers.shutdown(wait=True)
        assert not self._errors, f"unseen on the event loop: {self._errors}"


class Blocking:
    """A blocking face of anything that belongs to an aio client.

    Attributes:
        unwrapped: What is behind the face.
    """

    def __init__(self, unwrapped: Any, loop: LoopThread) -> None:
        self.unwrapped = unwrapped
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        value = self._loop.call(getattr, self.unwrapped, name)
        if inspect.ismethod(value):
            return functools.wraps(value)(functools.partial(self._call, value))
        return self._faced(value)

    def __enter__(self) -> Self:
        self._call(self.unwrapped.__aenter__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self.unwrapped.__aexit__, kind, error, trace)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        try:
            return self._call(self.unwrapped.__anext__)
        except StopAsyncIteration:
            raise StopIteration from None

    def __repr__(self) -> str:
        return f"<blocking {self.unwrapped!r}>"

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return self._faced(self._loop.call(function, *args, **kwargs))
        except TimeoutError as error:
            if receipt := getattr(error, "receipt", None):
                error.receipt = self._faced(receipt)  # type: ignore[attr-defined]
            raise

    def _faced(self, value: Any) -> Any:
        belongs_to_aio = type(value).__module__.startswith("tars_mqtt.aio")
        return Blocking(value, self._loop) if belongs_to_aio else value


class BlockingClient(Blocking):
    """The blocking face of an aio client."""

    def subscribe(self, topic: str, handler: Callable[..., Any], *args: Any, **options: Any) -> Any:
        handler = self._loop.as_coroutine_function(handler)
        return self._call(self.unwrapped.subscribe, topic, handler, *args, **options)

    def on(self, topic: str, *args: Any, **options: Any) -> Callable[[Any], Any]:
        decorate = self._call(self.unwrapped.on, topic, *args, **options)

        def decorator(handler: Any) -> Any:
            self._call(decorate, self._loop.as_coroutine_function(handler))
            return handler

        return decorator


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
