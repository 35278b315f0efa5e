"""The examples of a Markdown page: find them, and run them as a reader would.

- The ``python`` blocks of a page are one session: what a block defines, the next ones know. ``await`` works
  at the top level.
- A block that calls ``run()`` or ``asyncio.run()`` is a program: it runs in a process of its own.
- ``print(...)  # text`` says what is printed, and so does a ``text`` block right behind; the example fails
  if one of those lines does not appear.
- The broker at ``localhost:1883``, or ``"localhost", 1883``, is the test's broker; what else a page names and the
  test has elsewhere, it says with ``where``.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import gc
import inspect
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

PATIENCE = 15.0

_BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```$(\n\n```text\n(?P<output>.*?)^```$)?", re.MULTILINE | re.DOTALL
)
_HEADING = re.compile(r"^#+ +(.*?) *$", re.MULTILINE)
_RUNS = re.compile(r"\.run\(")
_PRINTS = re.compile(r"print\(.*\)  # (?P<text>.+)$", re.MULTILINE)


@attrs.frozen
class Example:
    """One block of a page."""

    page: Path
    line: int
    """Of the page, where the code begins."""
    heading: str
    code: str
    output: str = ""

    @property
    def is_program(self) -> bool:
        return _RUNS.search(self.code) is not None

    @property
    def prints(self) -> list[str]:
        """The lines that it says it prints."""
        return [match["text"] for match in _PRINTS.finditer(self.code)] + self.output.splitlines()

    def at(self, address: str) -> Example:
        """The same, for the broker at *address*."""
        host, _, port = address.partition(":")
        return self.where({"localhost:1883": address, '"localhost", 1883': f'"{host}", {port}'})

    def where(self, places: Mapping[str, str]) -> Example:
        """The same, with each place of the page replaced by that of the test, in what is printed too."""
        code, output = self.code, self.output
        for place, ours in places.items():
            code, output = code.replace(place, ours), output.replace(place, ours)
        return attrs.evolve(self, code=code, output=output)

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def examples_in(page: Path) -> list[Example]:
    """The python blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Example(
            page=page,
            line=text.count("\n", 0, match.start("code")) + 1,
            heading=_heading_before(text, match.start()),
            code=match["code"],
            output=match["output"] or "",
        )
        for match in _BLOCK.finditer(text)
    ]


def _heading_before(text: str, position: int) -> str:
    outside = _BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text[:position])
    headings = _HEADING.findall(outside)
    return headings[-1] if headings else ""


async def run_block(example: Example, namespace: dict[str, Any]) -> None:
    """Run a block in *namespace*, on the running loop."""
    # As if it stood in the page at its line: tracebacks lead there.
    source = "\n" * (example.line - 1) + example.code
    code = compile(source, str(example.page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    outcome = eval(code, namespace)
    if inspect.isawaitable(outcome):
        await outcome


def run_page(examples: list[Example], namespace: dict[str, Any], environment: Mapping[str, str]) -> None:
    """Run the examples of a page, in order; check what they print, and shut down what they left running.

    Their environment is *environment*; programs see it as it was, whatever the blocks before them did to it.
    """

    async def run() -> None:
        try:
            for example in examples:
                if example.is_program:
                    await asyncio.to_thread(run_program, example, environment)
                    continue
                with printed() as output:
                    await run_block(example, namespace)
                    await _until_printed(example, output)
        finally:
            await shut_down_clients()

    before = dict(os.environ)
    os.environ.update(environment)
    try:
        asyncio.run(run())
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def running(example: Example, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program: inside it serves, and has printed what it says it prints; at the end Ctrl-C is pressed.

    A program that ends by itself, or is killed inside, is left at that.
    """
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", example.code],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": package_directory(), **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
        )

        def output() -> str:
            return os.pread(file.fileno(), 1_000_000, 0).decode()

        def missing() -> list[str]:
            return [text for text in example.prints if text not in output().splitlines()]

        def is_up() -> bool:
            return process.poll() is not None or (
                not missing() and _awaits_signals(process.pid) and _rests(process.pid)
            )

        try:
            eventually(is_up, PATIENCE, lambda: f"{example} prints {missing()}:\n{output()}")
            yield process
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(PATIENCE)
        finally:
            process.kill()
            process.wait()
        assert process.returncode in (0, -signal.SIGKILL), f"{example} failed:\n{output()}"
        assert not missing(), f"{example} ended without printing {missing()}:\n{output()}"


def _awaits_signals(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM: before that, Ctrl-C would end it the hard way."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        time.sleep(1.0)
        return True
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status.read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def _rests(pid: int) -> bool:
    """Whether a process has nothing more to do for now.

    The programs of other clients are shown as well, and some miss a Ctrl-C while they connect: up to Python 3.11
    ``asyncio.wait_for`` swallows a cancellation that comes together with the result.
    """
    path = Path(f"/proc/{pid}/stat")

    def work() -> list[str]:
        fields = path.read_text().rpartition(")")[2].split()
        return [fields[0], *fields[11:13]]  # state, and processor time in user and in system mode

    try:
        before = work()
        time.sleep(0.2)
        return before == work() and before[0] == "S"
    except OSError:  # it has ended, or the system does not tell
        return True


def run_program(example: Example, environment: Mapping[str, str]) -> None:
    """Run a program until it has printed what it says, and press Ctrl-C."""
    with running(example, environment):
        pass


def package_directory() -> str:
    """Where this process has its ``tars_mqtt`` from."""
    import tars_mqtt

    return str(Path(tars_mqtt.__file__).parents[1])


@contextlib.contextmanager
def printed() -> Iterator[Callable[[], list[str]]]:
    """Catch what is printed inside, on any thread; gives a function that returns the lines so far."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        yield lambda: text.getvalue().splitlines()


async def _until_printed(example: Example, output: Callable[[], list[str]]) -> None:
    deadline = time.monotonic() + PATIENCE
    while missing := [text for text in example.prints if text not in output()]:
        assert time.monotonic() < deadline, f"{example} did not print {missing}, but {output()}"
        await asyncio.sleep(0.01)


async def shut_down_clients() -> None:
    """Shut down every client that somebody left running."""
    from tars_mqtt import ConnectionState, MQTTClient, aio

    for thing in gc.get_objects():
        # Not isinstance(), which asks a proxy for what it stands for.
        if type(thing) is MQTTClient and thing.state is not ConnectionState.CLOSED:
            await asyncio.to_thread(thing.shutdown, 2.0)
        elif type(thing) is aio.MQTTClient and thing.state is not ConnectionState.CLOSED:
            await thing.shutdown(2.0)
