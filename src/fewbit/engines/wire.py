"""Messages between a program and its engine process: a JSON object and bytes, each preceded by its length."""

from __future__ import annotations

import json
import struct
from typing import Any, BinaryIO

_LENGTHS = struct.Struct("<IQ")

SLOTS = 2
SLOT_BYTES = 64 * 2**20


def send(stream: BinaryIO, message: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    """Write one message and flush."""
    text = json.dumps(message).encode()
    stream.write(_LENGTHS.pack(len(text), len(payload)))
    stream.write(text)
    stream.write(payload)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """Read one message; none where the other side is gone, in the middle of a message too."""
    head = stream.read(_LENGTHS.size)
    if len(head) < _LENGTHS.size:
        return None
    text_bytes, payload_bytes = _LENGTHS.unpack(head)
    text, payload = stream.read(text_bytes), stream.read(payload_bytes)
    if len(text) < text_bytes or len(payload) < payload_bytes:
        return None
    message: dict[str, Any] = json.loads(text)
    return message, payload
