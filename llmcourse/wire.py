"""Frames between the judge and a worker: a JSON header and raw bytes, of exact types, bounded, nothing pickled.

A frame is `MAGIC`, the header's length (4 bytes), the length of all blobs together (8 bytes), both big-endian, the
header (UTF-8 JSON) and the blobs. Plain data (`Data`) is written into a header as tagged lists; tensors and bytes
go into blobs. What is not plain data is sent as its type's name alone (`Opaque`), so that a report can say what came.
"""

from __future__ import annotations

import itertools
import json
import math
import select
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

MAGIC = b"LLMC"
PREFIX = struct.Struct(">4sIQ")
MAX_HEADER_BYTES = 16 << 20
MAX_DEPTH = 32
MAX_ITEMS = 200_000
MAX_INT_DIGITS = 3_500  # hexadecimal: what Python prints in decimal without being told to (4,300 digits)
MAX_TENSOR_BYTES = 1 << 31
MAX_OPAQUE_CHARS = 200

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.uint16, torch.uint32, torch.uint64),
    )
}
Data = Union[
    None, bool, int, float, str, bytes, Tensor, list["Data"], tuple["Data", ...], dict[str, "Data"], "Opaque"
]


@dataclass(frozen=True)
class Opaque:
    """Something an answer gave that is not plain data; `kind` says what it was."""

    kind: str


class ProtocolError(Exception):
    """The other side sent something that is not a frame of this protocol, or one out of bounds."""


class Ended(Exception):
    """The other side closed the connection."""


class Encoder:
    """Turns plain data into a JSON-able header and a list of blobs."""

    def __init__(self) -> None:
        self.blobs: list[bytes] = []
        self.items = 0

    def encode(self, data: object, depth: int = 0) -> list[Any]:
        self.items += 1
        if depth > MAX_DEPTH or self.items > MAX_ITEMS:
            return ["?", "data nested too deeply or of too many parts"]
        kind = type(data)
        if data is None:
            return ["n"]
        if kind is bool:
            return ["b", data]
        if kind is int:
            text = hex(data)  # type: ignore[arg-type]
            return (
                ["i", text]
                if len(text) <= MAX_INT_DIGITS
                else ["?", "an int of more than 4,000 decimal digits"]
            )
        if kind is float:
            return ["f", data.hex()]  # type: ignore[attr-defined]
        if kind is str:
            return ["s", data]
        if kind is bytes:
            return ["y", self.blob(data)]  # type: ignore[arg-type]
        if kind is Tensor or kind is torch.nn.Parameter:
            return self.encode_tensor(data)  # type: ignore[arg-type]
        if kind in (list, tuple, dict) and self.items + len(data) > MAX_ITEMS:  # type: ignore[arg-type]
            return ["?", f"a {kind.__name__} of {len(data):,} parts, too many to be compared"]  # type: ignore[arg-type]
        if kind is list or kind is tuple:
            parts = [self.encode(part, depth + 1) for part in data]  # type: ignore[attr-defined]
            return ["l" if kind is list else "u", parts]
        if kind is dict and all(type(key) is str for key in data):  # type: ignore[attr-defined]
            pairs = [[key, self.encode(part, depth + 1)] for key, part in data.items()]  # type: ignore[attr-defined]
            return ["d", pairs]
        if kind is Opaque:
            return ["?", data.kind[:MAX_OPAQUE_CHARS]]  # type: ignore[attr-defined]
        return ["?", f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")[:MAX_OPAQUE_CHARS]]

    def encode_tensor(self, tensor: Tensor) -> list[Any]:
        name = str(tensor.dtype).removeprefix("torch.")
        odd = tensor.layout != torch.strided or name not in DTYPES or tensor.device.type == "meta"
        if odd or tensor.is_nested:
            layout = "" if tensor.layout == torch.strided else f", {tensor.layout}".replace("torch.", "")
            return ["?", f"a {name} tensor on {tensor.device.type}{layout}"]
        size_bytes = tensor.numel() * tensor.element_size()
        if size_bytes > MAX_TENSOR_BYTES:
            return ["?", f"a {name} tensor {list(tensor.shape)}, too large to be compared"[:MAX_OPAQUE_CHARS]]
        raw = bytes_of(tensor).numpy().tobytes()
        return ["t", name, list(tensor.shape), tensor.device.type, self.blob(raw)]

    def blob(self, raw: bytes) -> int:
        self.blobs.append(raw)
        return len(self.blobs) - 1


def bytes_of(tensor: Tensor) -> Tensor:
    """The values' bytes in order, uint8 [numel * itemsize], on the CPU; a view where the tensor is contiguous."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    if not plain.numel():
        return torch.empty(0, dtype=torch.uint8)
    # One element counts as contiguous whatever its stride, but cannot be viewed as bytes with a stride of 2.
    return plain.as_strided(plain.shape, (1,)).view(torch.uint8)


def decode(node: Any, blobs: list[bytes | None], depth: int = 0) -> Data:
    """Plain data back from `Encoder`'s header and blobs; ProtocolError for anything else.

    A blob is taken out of `blobs` when it is used: a small frame cannot ask for one blob a million times.
    """
    # One deeper than the encoder goes: there it says that it stopped.
    if depth > MAX_DEPTH + 1 or type(node) is not list or not node or type(node[0]) is not str:
        raise ProtocolError("a value is not a tagged list")
    tag, rest = node[0], node[1:]
    if tag == "n" and not rest:
        return None
    if tag == "t" and len(rest) == 4:
        return _decode_tensor(rest, blobs)
    if len(rest) != 1:
        raise ProtocolError(f"tag {tag!r} with {len(rest)} parts")
    value = rest[0]
    if tag == "b" and type(value) is bool:
        return value
    if tag in ("i", "f", "s", "?") and type(value) is str:
        return _decode_scalar(tag, value)
    if tag == "y":
        return _blob(value, blobs)
    if tag in ("l", "u") and type(value) is list:
        parts = [decode(part, blobs, depth + 1) for part in value]
        return parts if tag == "l" else tuple(parts)
    if tag == "d" and type(value) is list:
        pairs = [
            (pair[0], pair[1])
            for pair in value
            if type(pair) is list and len(pair) == 2 and type(pair[0]) is str
        ]
        if len(pairs) == len(value) == len({key for key, _ in pairs}):
            return {key: decode(part, blobs, depth + 1) for key, part in pairs}
    raise ProtocolError(f"tag {tag[:8]!r} does not fit its value")


def _decode_scalar(tag: str, text: str) -> Data:
    if tag == "s":
        return text
    if tag == "?":
        return Opaque(text[:MAX_OPAQUE_CHARS])
    if len(text) > MAX_INT_DIGITS:
        raise ProtocolError("a number of too many digits")
    try:
        return int(text, 16) if tag == "i" else float.fromhex(text)
    except (ValueError, OverflowError) as error:
        raise ProtocolError("a number that cannot be read") from error


def _blob(index: Any, blobs: list[bytes | None]) -> bytes:
    if type(index) is not int or not 0 <= index < len(blobs):
        raise ProtocolError("a blob that was not sent")
    found, blobs[index] = blobs[index], None
    if found is None:
        raise ProtocolError("a blob that was used twice")
    return found


def _decode_tensor(rest: list[Any], blobs: list[bytes | None]) -> Data:
    name, shape, device, index = rest
    if type(name) is not str or name not in DTYPES or type(device) is not str or len(device) > 16:
        raise ProtocolError("a tensor of unknown dtype or device")
    if (
        type(shape) is not list
        or len(shape) > 64
        or any(type(n) is not int or n < 0 for n in shape)
        or math.prod(n or 1 for n in shape) >= 1 << 48
    ):
        raise ProtocolError("a tensor whose shape is not a list of sizes")
    dtype, raw = DTYPES[name], _blob(index, blobs)
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise ProtocolError("a tensor whose bytes do not fit its shape")
    # Into memory that torch aligns, as what an answer makes is: some kernels end the process where it is not.
    flat = torch.empty(len(raw), dtype=torch.uint8)
    if raw:
        flat.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    if dtype == torch.bool and raw and int(flat.max()) > 1:
        raise ProtocolError("a bool tensor with bytes other than 0 and 1")
    tensor = flat.view(dtype).reshape(shape)
    # A judge need not own the device: where it was is kept beside the values, as a plain attribute.
    return tensor if device == "cpu" else _note_device(tensor, device)


def _note_device(tensor: Tensor, device: str) -> Tensor:
    tensor.came_from = device  # type: ignore[attr-defined]
    return tensor


def device_of(tensor: Tensor) -> str:
    """Device type a decoded tensor was on when it was observed."""
    return getattr(tensor, "came_from", tensor.device.type)


def copied(data: object) -> Data:
    """The data as the judge would receive it: exact types, subclasses and foreign objects as `Opaque`."""
    encoder = Encoder()
    return decode(encoder.encode(data), [*encoder.blobs])


def holds_opaque(data: Data) -> bool:
    """Whether anything in the data could not be sent as it is."""
    if isinstance(data, dict):
        return any(map(holds_opaque, data.values()))
    return isinstance(data, Opaque) or (isinstance(data, list | tuple) and any(map(holds_opaque, data)))


def size_bytes(data: object) -> int:
    """Bytes the data takes on the wire, header and blobs."""
    encoder = Encoder()
    return len(json.dumps(encoder.encode(data))) + sum(map(len, encoder.blobs))


def printable(text: str) -> str:
    """The text with what a terminal could not show, or would obey, written as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def payload_bytes(data: Data) -> int:
    """Bytes of the values themselves, without framing: tensors and bytes by their size, a number 8, text in UTF-8."""
    if isinstance(data, Tensor):
        return data.numel() * data.element_size()
    if isinstance(data, bytes):
        return len(data)
    if isinstance(data, str):
        return len(data.encode("utf-8", "surrogatepass"))
    if isinstance(data, dict):
        return sum(payload_bytes(key) + payload_bytes(part) for key, part in data.items())
    if isinstance(data, list | tuple):
        return sum(map(payload_bytes, data))
    return 8 if isinstance(data, int | float) else 0


def send(
    channel: socket.socket,
    message: dict[str, Any],
    data: dict[str, object] | None = None,
    *,
    deadline: float | None = None,
) -> None:
    """Send one frame: `message` is JSON, the values of `data` are plain data. Waits until sent, or the deadline.

    The socket stays in blocking mode and keeps no timeout, so that one thread may send while another receives.
    Raises TimeoutError, Ended when the other side is gone, ProtocolError for a header that is too large.
    """
    encoder = Encoder()
    body = {key: encoder.encode(value) for key, value in (data or {}).items()}
    header = json.dumps({"message": message, "data": body, "blobs": [len(b) for b in encoder.blobs]}).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {len(header)} bytes; at most {MAX_HEADER_BYTES} fit a frame")
    prefix = PREFIX.pack(MAGIC, len(header), sum(map(len, encoder.blobs)))
    for part in (prefix + header, *encoder.blobs):
        _write(channel, memoryview(part), deadline)


def receive(
    channel: socket.socket, *, max_bytes: int, deadline: float | None = None
) -> tuple[dict[str, Any], dict[str, Data]]:
    """Receive one frame: (message, data).

    max_bytes bounds header and blobs together; `deadline` is on the clock of time.monotonic. Raises TimeoutError at
    the deadline, Ended when the other side is gone, ProtocolError for what is not a frame or too large.
    """
    magic, header_bytes, blob_bytes = PREFIX.unpack(_read(channel, PREFIX.size, deadline))
    if magic != MAGIC:
        raise ProtocolError("not a frame")
    if header_bytes > MAX_HEADER_BYTES or header_bytes + blob_bytes > max_bytes:
        raise ProtocolError(
            f"a frame of {header_bytes + blob_bytes} bytes; at most {max_bytes} were expected"
        )
    raw_header = _read(channel, header_bytes, deadline)
    raw = _read(channel, blob_bytes, deadline)
    try:
        header = json.loads(raw_header.decode("utf-8"), object_pairs_hook=_without_duplicates)
        message, body, lengths = header["message"], header["data"], header["blobs"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProtocolError("a header that is not the JSON of a frame") from error
    if type(message) is not dict or type(body) is not dict or type(lengths) is not list:
        raise ProtocolError("a header that is not the JSON of a frame")
    if any(type(n) is not int or n < 0 for n in lengths) or sum(lengths) != blob_bytes:
        raise ProtocolError("blobs whose lengths do not add up")
    ends = list(itertools.accumulate(lengths))
    blobs: list[bytes | None] = [raw[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    found = {key: decode(node, blobs) for key, node in body.items()}
    if any(blob is not None for blob in blobs):
        raise ProtocolError("blobs that no value uses")
    return message, found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key that occurs twice")
    return found


def _wait(channel: socket.socket, event: int, deadline: float | None) -> None:
    """Wait until the socket can be read or written, or has ended; TimeoutError at the deadline."""
    left_s = None if deadline is None else deadline - time.monotonic()
    if left_s is not None and left_s <= 0:
        raise TimeoutError
    if channel.fileno() < 0:
        raise Ended
    waiting = select.poll()
    waiting.register(channel, event)
    if not waiting.poll(None if left_s is None else math.ceil(left_s * 1000)):
        raise TimeoutError


def _write(channel: socket.socket, part: memoryview, deadline: float | None) -> None:
    while part:
        _wait(channel, select.POLLOUT, deadline)
        try:
            part = part[channel.send(part, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            continue
        except OSError as error:  # reset, closed at the other side or here: gone in every case
            raise Ended from error


def _read(channel: socket.socket, count: int, deadline: float | None) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        _wait(channel, select.POLLIN, deadline)
        try:
            part = channel.recv(min(count - len(parts), 1 << 20))
        except OSError as error:
            raise Ended from error
        if not part:
            raise Ended
        parts += part
    return bytes(parts)
