"""What needs a process of its own: signals, forks, and a process with many open files."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.support import eventually
from tests.support.observer import Observer
from tests.support.port import HOST, free_port
from tests.support.program import Program

# -- run() --------------------------------------------------------------------------------------

# A service that runs until it is told to end.
RUN = {
    "sync": """
        from tars_mqtt import MQTTClient

        client = MQTTClient(sys.argv[1], "service", enable_health=True, connect_timeout=60)

        @client.on("work")
        def handler(payload):
            say("handled", payload)

        client.run()
        say("state", client.state.value)
        """,
    "aio": """
        import asyncio
        from tars_mqtt.aio import MQTTClient

        async def main():
            client = MQTTClient(sys.argv[1], "service", enable_health=True, connect_timeout=60)

            @client.on("work")
            async def handler(payload):
                say("handled", payload)

            await client.run()
            say("state", client.state.value)

        asyncio.run(main())
        """,
}


@pytest.fixture(params=["sync", "aio"])
def colour(request) -> str:
    return request.param


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_serves_until_a_signal_and_then_shuts_down(colour, broker, number):
    """In good order: the exit code is 0, the health says shutdown, the broker hears DISCONNECT."""
    with Program(RUN[colour], broker.url) as program, Observer(broker.host, broker.port) as observer:
        observer.wait_for("system/health/service")
        observer.publish("work", b"x")
        program.wait_for("handled b'x'")
        program.signal(number)
        assert program.wait() == 0
        assert "state closed" in program.output
        assert observer.wait_for("system/health/service", 2)[1].data["event"] == "shutdown"
    assert "Received DISCONNECT from service" in broker.log


# A handler that is still at work when the shutdown has begun.
SLOW = {
    "sync": RUN["sync"].replace(
        'say("handled", payload)',
        """say("begun")
            while client.state.value != "closing":
                time.sleep(0.01)
            say("closing")
            time.sleep(0.5)""",
    ),
    "aio": RUN["aio"].replace(
        'say("handled", payload)',
        """say("begun")
                while client.state.value != "closing":
                    await asyncio.sleep(0.01)
                say("closing")
                await asyncio.sleep(0.5)""",
    ),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_cut_the_shutdown_short(colour, broker, number):
    """It is bounded by its own time; an impatient Ctrl-C must not cost the goodbye."""
    with Program(SLOW[colour], broker.url) as program, Observer(broker.host, broker.port) as observer:
        observer.wait_for("system/health/service")
        observer.publish("work", b"x")
        program.wait_for("begun")
        program.signal(number)
        program.wait_for("closing")
        program.signal(number)
        assert program.wait() == 0
        assert "state closed" in program.output
        assert observer.wait_for("system/health/service", 2)[1].data["event"] == "shutdown"


def test_a_signal_ends_run_while_the_broker_cannot_be_reached(colour):
    """A container that is told to stop before its broker is there does not wait to be killed."""
    with Program(RUN[colour], f"mqtt://{HOST}:{free_port()}") as program:
        program.wait_for("next attempt in")  # a warning, on stderr
        program.signal(signal.SIGTERM)
        assert program.wait(10) == 0
        assert "state closed" in program.output


def test_run_waits_for_a_broker_that_is_not_there_yet(colour, broker):
    """For longer than a connection may take, if it is told to."""
    code = (
        RUN[colour].replace("connect_timeout=60", "connect_timeout=1").replace("run()", "run(timeout=None)")
    )
    broker.terminate()
    with Program(code, broker.url) as program:
        program.wait_for("next attempt in")
        time.sleep(1.5)
        broker.start()
        eventually(lambda: "system/health/service" in broker.log)
        program.signal(signal.SIGTERM)
        assert program.wait() == 0


INTERRUPTED = """
    import threading
    from tars_mqtt import MQTTClient

    def network_threads():
        return sum("network" in thread.name for thread in threading.enumerate())

    client = MQTTClient(sys.argv[1], "impatient", shutdown_timeout=60)
    client.connect()
    client.submit_event("a", "n", "x" * 10_000_000, qos=0)
    try:
        say("leaving")
        client.disconnect()
    except KeyboardInterrupt:
        say("interrupted", network_threads())
    client.shutdown(1)
    say("left", network_threads())
    """


def test_a_disconnect_that_ctrl_c_interrupts_loses_no_thread(broker):
    """It is still known to run, and ends with the shutdown."""
    broker.freeze()
    with Program(INTERRUPTED.replace("client.connect()", "client.connect(); input()"), broker.url) as program:
        broker.thaw()
        eventually(lambda: "Sending CONNACK to impatient" in broker.log)
        broker.freeze()
        program.say("go on")
        program.wait_for("leaving")
        time.sleep(0.5)
        program.signal(signal.SIGINT)
        program.wait_for("interrupted 1")
        program.wait_for("left 0")
        broker.thaw()


# A handler shuts down, and nothing else keeps the process.
END = {
    "sync": """
        import threading
        from tars_mqtt import MQTTClient

        client = MQTTClient(sys.argv[1], "service", enable_health=True)
        stopped = threading.Event()

        @client.on("stop", qos=1)
        def stop(payload):
            for number in range(100):
                client.submit_event("last/words", "n", number, qos=1)
            client.shutdown()
            stopped.set()
            time.sleep(0.3)

        client.connect()
        stopped.wait()
        """,
    "aio": """
        import asyncio
        from tars_mqtt.aio import MQTTClient

        async def main():
            client = MQTTClient(sys.argv[1], "service", enable_health=True)
            stopped = asyncio.Event()

            @client.on("stop", qos=1)
            async def stop(payload):
                for number in range(100):
                    client.submit_event("last/words", "n", number, qos=1)
                await client.shutdown()
                stopped.set()
                await asyncio.sleep(0.3)

            await client.connect()
            await stopped.wait()

        asyncio.run(main())
        """,
}


def test_a_process_that_ends_when_a_handler_has_shut_down_ends_in_good_order(colour, broker):
    """The handler is acknowledged, what it has published is out, and the broker is told."""
    with Program(END[colour], broker.url) as program, Observer(broker.host, broker.port) as observer:
        observer.wait_for("system/health/service")
        observer.publish("stop", b"x")
        assert program.wait() == 0
        assert observer.wait_for("system/health/service", 2)[1].data["event"] == "shutdown"
        eventually(lambda: len({message.payload for message in observer.on("last/words")}) >= 100)
    assert "Received PUBACK from service" in broker.log
    assert "Received DISCONNECT from service" in broker.log


CONNECT = """
    import threading
    from tars_mqtt import MQTTClient

    client = MQTTClient(sys.argv[1], "impatient", connect_timeout=60)
    try:
        client.connect()
    except KeyboardInterrupt:
        say("interrupted", client.state.value)
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(10)
    say("threads", threading.active_count())
    """


def test_ctrl_c_in_connect_leaves_nothing_behind():
    """Nobody is there for a connection that comes later."""
    with Program(CONNECT, f"mqtt://{HOST}:{free_port()}") as program:
        program.wait_for("next attempt in")
        program.signal(signal.SIGINT)
        program.wait_for("interrupted disconnected")
        program.wait_for("threads 1\n")


def test_what_is_queued_when_a_signal_comes_during_an_outage_goes_out_if_the_broker_is_back_in_time(
    colour, broker
):
    indent, wait = ("    " * 4, "await asyncio") if colour == "aio" else ("    " * 3, "time")
    lines = (
        'say("begun")',
        'while client.state.value != "reconnecting":',
        f"    {wait}.sleep(0.01)",
        'client.submit_event("late", "n", 1, qos=1)',
        'say("queued")',
    )
    code = (
        RUN[colour]
        .replace('say("handled", payload)', f"\n{indent}".join(lines))
        .replace("connect_timeout=60", "reconnect_min_delay=0.1, reconnect_max_delay=0.5")
    )
    with Program(code, broker.url) as program:
        with Observer(broker.host, broker.port) as observer:
            observer.wait_for("system/health/service")
            observer.publish("work", b"x")
            program.wait_for("begun")
        broker.kill()
        program.wait_for("queued")
        program.signal(signal.SIGTERM)
        broker.start()
        assert program.wait() == 0
    assert "late" in broker.log


def test_a_signal_ends_run_during_an_outage(colour, broker):
    with Program(RUN[colour], broker.url) as program:
        eventually(lambda: "system/health/service" in broker.log)
        broker.kill()
        program.wait_for("connection lost")
        program.signal(signal.SIGTERM)
        assert program.wait(15) == 0
        assert "state closed" in program.output


def test_run_puts_the_signal_handlers_back(colour, broker):
    """What the program did with signals before, it does again."""
    afterwards = """
        import signal
        say("SIGTERM", signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
        say("SIGINT", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
        """
    with Program(RUN[colour] + afterwards, broker.url) as program:
        eventually(lambda: "system/health/service" in broker.log)
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert "SIGTERM True\nSIGINT True\n" in program.output


TWO_CLIENTS = """
    import asyncio
    from tars_mqtt.aio import MQTTClient

    async def main():
        one, two = (MQTTClient(sys.argv[1], name, enable_health=True) for name in ("one", "two"))
        await asyncio.gather(one.run(), two.run())
        say("states", one.state.value, two.state.value)
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        again = asyncio.create_task(one.run())
        await one.wait_connected()
        say("mine")
        await stop.wait()
        await one.shutdown()
        await again
        say("removed", loop.remove_signal_handler(signal.SIGTERM))

    import signal
    asyncio.run(main())
    """


def test_a_signal_ends_all_clients_of_a_loop_and_leaves_it_its_own_handler(broker):
    """A loop has one handler for each signal: the last one to put his there must not take it from the others."""
    with Program(TWO_CLIENTS, broker.url) as program, Observer(broker.host, broker.port) as observer:
        for name in ("one", "two"):
            observer.wait_for(f"system/health/{name}")
        program.signal(signal.SIGTERM)
        program.wait_for("mine")
        assert "states closed closed" in program.output
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert "removed True" in program.output


# -- many open files ----------------------------------------------------------------------------

MANY_FILES = """
    import resource
    from tests.support.colour import ClientMaker

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, most))
    files = [open("/dev/null") for _ in range(1200)]
    make_client = ClientMaker(sys.argv[1])
    client = make_client(sys.argv[2])
    received = []
    client.subscribe("a", received.append, 1)
    client.connect()
    client.publish("a", b"works", qos=1)
    while not received:
        time.sleep(0.01)
    make_client.close()
    say(received)
    for file in files:
        file.close()
"""


def test_a_process_with_1200_open_files_connects_and_works(make_client, broker):
    """select() breaks above descriptor 1,023."""
    resource = pytest.importorskip("resource")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2000:
        pytest.skip("this system allows fewer open files")
    with Program(MANY_FILES, make_client.colour, broker.url) as program:
        program.wait_for("[b'works']")
        assert program.wait() == 0


# -- fork ---------------------------------------------------------------------------------------

FORK = {
    "sync": """
        import os, warnings
        from tars_mqtt import ClosedError, MQTTClient

        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks with threads

        received = []
        client = MQTTClient(sys.argv[1], "parent")
        client.subscribe("a", received.append, 1)
        client.connect()

        def in_child(call, *args, **kwargs):
            started = time.monotonic()
            try:
                call(*args, **kwargs)
            except ClosedError as error:
                say("child:", time.monotonic() - started < 1.0, error)
            except BaseException as error:
                say("wrong error", repr(error))

        if os.fork() == 0:
            in_child(client.publish, "a", b"from the child")
            in_child(client.publish_event, "a", "b", None, qos=1)
            in_child(client.submit_event, "a", "b", None, qos=1)
            in_child(client.subscribe, "b", print)
            in_child(client.connect)
            in_child(client.disconnect)
            in_child(client.shutdown)
            in_child(client.wait_connected)
            in_child(client.stats)
            own = MQTTClient(sys.argv[1], "child")
            with own:
                own.publish("a", b"from the child's own", qos=1)
            sys.stdout.flush()
            os._exit(0)
        os.wait()
        client.publish("a", b"from the parent", qos=1)
        while len(received) < 2:
            time.sleep(0.01)
        say(received, client.stats().reconnects)
        client.shutdown()
        """,
    "aio": """
        import asyncio, os, warnings
        from tars_mqtt import ClosedError
        from tars_mqtt.aio import MQTTClient

        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks with threads

        received = []

        async def handler(payload):
            received.append(payload)

        async def in_child(call, *args, **kwargs):
            started = time.monotonic()
            try:
                result = call(*args, **kwargs)
                if asyncio.iscoroutine(result):
                    await result
            except ClosedError as error:
                say("child:", time.monotonic() - started < 1.0, error)
            except BaseException as error:
                say("wrong error", repr(error))

        async def child(client):
            await in_child(client.publish, "a", b"from the child")
            await in_child(client.publish_event, "a", "b", None, qos=1)
            await in_child(client.submit_event, "a", "b", None, qos=1)
            await in_child(client.subscribe, "b", handler)
            await in_child(client.connect)
            await in_child(client.disconnect)
            await in_child(client.shutdown)
            await in_child(client.wait_connected)
            await in_child(client.stats)
            async with MQTTClient(sys.argv[1], "child") as own:
                await own.publish("a", b"from the child's own", qos=1)

        async def parent(pid, client):
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                await asyncio.sleep(0.01)
            await client.publish("a", b"from the parent", qos=1)
            while len(received) < 2:
                await asyncio.sleep(0.01)
            say(received, client.stats().reconnects)
            await client.shutdown()

        async def begin():
            client = MQTTClient(sys.argv[1], "parent")
            await client.subscribe("a", handler, 1)
            await client.connect()
            return client

        loop = asyncio.new_event_loop()
        client = loop.run_until_complete(begin())
        pid = os.fork()
        if pid == 0:
            asyncio.run(child(client))
            sys.stdout.flush()
            os._exit(0)
        loop.run_until_complete(parent(pid, client))
        loop.close()
        """,
}


FORK_IN_BLOCK = {
    "sync": """
        import os, warnings
        from tars_mqtt import MQTTClient

        warnings.simplefilter("ignore", DeprecationWarning)

        with MQTTClient(sys.argv[1], "parent") as client:
            if os.fork() == 0:
                raise SystemExit(7)
            _, status = os.wait()
            client.publish("a", b"still here", qos=1)
            say("status", os.waitstatus_to_exitcode(status))
        """,
    "aio": """
        import asyncio, os, warnings
        from tars_mqtt.aio import MQTTClient

        warnings.simplefilter("ignore", DeprecationWarning)

        async def leave(client):
            try:
                await client.__aexit__(None, None, None)
            finally:
                os._exit(7 if sys.exc_info()[0] is None else 1)

        async def enter():
            return await MQTTClient(sys.argv[1], "parent").__aenter__()

        async def goodbye(client):
            await client.publish("a", b"still here", qos=1)
            await client.__aexit__(None, None, None)

        loop = asyncio.new_event_loop()
        client = loop.run_until_complete(enter())
        if os.fork() == 0:
            asyncio.run(leave(client))
        _, status = os.wait()
        loop.run_until_complete(goodbye(client))
        loop.close()
        say("status", os.waitstatus_to_exitcode(status))
        """,
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_leaves_the_block_of_its_parent_as_it_wants(colour, broker):
    """What it raises is not hidden behind an error about a client that is not its own."""
    with Program(FORK_IN_BLOCK[colour], broker.url) as program:
        assert program.wait() == 0, program.output
        output = program.output
    assert "status 7" in output
    assert "Traceback" not in output
    assert broker.log.count("Sending CONNACK to parent") == 1
    assert broker.log.count("Received DISCONNECT from parent") == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_is_told_at_once_and_the_parent_goes_on(colour, broker):
    """The child has neither the threads nor the connection; its own client works."""
    with Program(FORK[colour], broker.url) as program:
        assert program.wait() == 0, program.output
        output = program.output
    told = [line for line in output.splitlines() if line.startswith("child: True this client belongs")]
    assert len(told) == 9, output
    assert all("make a new one after os.fork()" in line for line in told)
    assert "wrong error" not in output
    assert "[b\"from the child's own\", b'from the parent'] 0" in output
    assert broker.log.count("Sending CONNACK to parent") == 1
    assert "Received DISCONNECT from parent" in broker.log
