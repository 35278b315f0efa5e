"""Feed the way in with what a fuzzer thinks up, guided by which lines it reaches: ``scripts/fuzz``.

The same harness as that of ``tests/faults/test_fuzz.py``, without a limit: it stops at the first thing that the
client was not prepared for. It needs atheris, from the extra ``tars-mqtt[fuzz]``. ``-help=1`` has the options,
which are libFuzzer's. What it finds interesting stays in ``.fuzz``, and is where the next run begins.
"""

from __future__ import annotations

import logging
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / ".fuzz"

try:
    import atheris
except ImportError:
    sys.exit("nothing is fuzzed: atheris is not installed, which is in tars-mqtt[fuzz] and for Linux only")

sys.path.insert(0, str(ROOT))
with atheris.instrument_imports(include=["tars_mqtt"]):
    from tests.support import packet as mqtt
    from tests.support.hostile import besiege, valid_packets


def try_one(data: bytes) -> None:
    """The first byte chooses version, transport and beginning of the connection, the second the slices."""
    if len(data) < 2:
        return
    v5, begins_well, framed = bool(data[0] & 1), not data[0] & 2, bool(data[0] & 8)
    stream = data[2:]
    if begins_well:
        connack = mqtt.connack(level=5 if v5 else 4, session_present=bool(data[0] & 4))
        stream = (in_frame(connack) if framed else connack) + stream
    size = data[1] or len(stream) or 1
    slices = [stream[start : start + size] for start in range(0, len(stream), size)]
    besiege(slices, v5=v5, framed=framed, max_payload_bytes=100 if data[0] & 16 else 1 << 20)


def in_frame(packet: bytes) -> bytes:
    """One frame of a websocket."""
    return struct.pack("!BBH", 0x82, 126, len(packet)) + packet


def main() -> None:
    logging.disable()
    CORPUS.mkdir(exist_ok=True)
    for v5 in (False, True):
        for number, packet in enumerate(valid_packets(v5)):
            (CORPUS / f"valid-{int(v5)}-{number}").write_bytes(bytes((v5, 0)) + packet)
            (CORPUS / f"framed-{int(v5)}-{number}").write_bytes(bytes((v5 | 8, 0)) + in_frame(packet))
    atheris.Setup([*sys.argv, str(CORPUS)], try_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
