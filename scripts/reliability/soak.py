"""One run: faults, one after the other, and the account of it."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Sequence

import attrs

from reliability.account import Account
from reliability.fault import faults
from reliability.stage import Cast, Stage, StageError


@attrs.frozen(kw_only=True)
class Length:
    """How long a run is: so many faults, or so many seconds."""

    count: int | None = None
    duration: float | None = None


def soak(
    cast: Cast, seed: int, kinds: Sequence[str], length: Length, say: Callable[[str], None]
) -> tuple[Account, list[str]]:
    """Run it; returns the account and the promises broken."""
    broken: list[str] = []
    stage = Stage(cast)
    with stage:
        begun = time.monotonic()
        plan = itertools.islice(faults(seed, kinds), length.count)
        try:
            for number, fault in enumerate(plan, 1):
                time.sleep(fault.quiet)
                if length.duration is not None and time.monotonic() - begun > length.duration:
                    break
                account = stage.read()
                say(
                    f"{time.monotonic() - begun:7.1f} s  {number:4} {fault}"
                    f" sent {account.total('accepted'):7}  handled {account.handled:7}"
                )
                stage.perform(fault)
            stage.finish()
        except StageError as error:
            broken.append(str(error))
    account = stage.read()
    broken += account.broken_promises(once=cast.ours and cast.dedupe == "durable", outbox=cast.ours)
    if broken:
        say(f"journals and logs are kept in {stage.directory}")
    else:
        shutil.rmtree(stage.directory, ignore_errors=True)
    return account, broken
