"""The wire: every kind of plain data comes back, everything else is refused, and nothing else is ever raised."""

from __future__ import annotations

import json
import math
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

import numpy
import pytest
import torch

from llmcourse import wire
from llmcourse.wire import Ended, Opaque, ProtocolError

PLENTY = 1 << 26


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def through(pair, data):
    """The data after a trip over the socket; small enough for its buffer, so that one thread can do both ends."""
    left, right = pair
    wire.send(left, {"hello": 1}, {"data": data})
    message, received = wire.receive(right, max_bytes=PLENTY, deadline=time.monotonic() + 30)
    assert message == {"hello": 1}
    return received["data"]


def same(observed, expected) -> bool:
    """Equal in type and value, NaN included."""
    if type(observed) is not type(expected):
        return False
    if isinstance(expected, torch.Tensor):
        if observed.dtype != expected.dtype or observed.shape != expected.shape:
            return False
        fresh = [
            torch.empty(expected.shape, dtype=expected.dtype).copy_(part) for part in (observed, expected)
        ]
        return not expected.numel() or torch.equal(*(part.reshape(-1).view(torch.uint8) for part in fresh))
    if isinstance(expected, dict):
        return list(observed) == list(expected) and all(
            same(observed[key], expected[key]) for key in expected
        )
    if isinstance(expected, list | tuple):
        return len(observed) == len(expected) and all(map(same, observed, expected))
    return observed == expected or (observed != observed and expected != expected)


# ------------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize(
    "data",
    [
        None,
        True,
        False,
        0,
        -1,
        2**63,
        -(2**13_000),
        0.0,
        -0.0,
        0.1,
        math.nan,
        math.inf,
        -math.inf,
        5e-324,
        "",
        "权重 \x00 \u2028",
        "lone \ud800 surrogate",
        b"",
        b"\x00\xff",
        [],
        (),
        {},
        {"": {"\udfff": [(), [None]]}},
        [1, (2, [3.5, {"four": b"5"}])],
    ],
    ids=lambda data: repr(data)[:20].encode("ascii", "backslashreplace").decode(),
)
def test_plain_data_comes_back_equal_in_type_and_value(pair, data):
    assert same(through(pair, data), data)


def test_negative_zero_keeps_its_sign(pair):
    assert math.copysign(1, through(pair, -0.0)) == -1


@pytest.mark.parametrize("name", sorted(wire.DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)], ids=str)
def test_tensors_of_every_dtype_and_shape_come_back_bit_for_bit(pair, name, shape, seed):
    dtype = wire.DTYPES[name]
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
    tensor = raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    assert same(through(pair, tensor), tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12).reshape(3, 4).T,
        torch.arange(12)[::3],
        torch.ones(1).expand(5),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2, requires_grad=True) * 2,
    ],
    ids=["transposed", "strided", "expanded", "conjugate", "negative view", "parameter", "with history"],
)
def test_views_and_parameters_arrive_as_their_values(pair, tensor):
    plain = tensor.detach().resolve_conj().resolve_neg().clone()
    received = through(pair, tensor)
    assert same(received, plain) and not received.requires_grad


def test_a_received_tensor_can_be_written_to(pair):
    through(pair, torch.ones(3)).zero_()


class Loud(str):
    """A subclass of a plain type: not plain."""


class ManyTensor(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (Loud("x"), "Loud"),
        (ManyTensor([1.0]), "ManyTensor"),
        (numpy.float64(1.0), "numpy.float64"),
        (numpy.ones(2), "numpy.ndarray"),
        (torch.Size([1]), "torch.Size"),
        (torch.ones(2).max(dim=0), "torch.return_types.max"),
        (torch.ones(2, device="meta"), "float32 tensor on meta"),
        (torch.eye(2).to_sparse(), "sparse_coo"),
        (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged), "NestedTensor"),
        (torch.ones(1).expand(1 << 40), "too large to be compared"),
        ({1: 2}, "dict"),
        ({Loud("key"): 2}, "dict"),
        ({1, 2}, "set"),
        (bytearray(b"x"), "bytearray"),
        (object(), "object"),
        (math.sqrt, "builtin_function_or_method"),
        (1 + 2j, "complex"),
        (2**20_000, "4,000 decimal digits"),
        ([0] * (wire.MAX_ITEMS + 1), "too many to be compared"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_plain_arrives_as_the_name_of_its_kind(pair, data, kind):
    received = through(pair, [data])[0]
    assert isinstance(received, Opaque) and kind in received.kind


def test_a_structure_that_holds_itself_is_cut_off(monkeypatch):
    monkeypatch.setattr(wire, "MAX_ITEMS", 2_000)
    endless: list = [1]
    endless += [endless, endless]
    received = wire.copied(endless)
    assert received[0] == 1 and wire.holds_opaque(received)


def test_data_nested_beyond_the_limit_is_cut_off_and_to_the_limit_is_not(pair):
    def nested(depth):
        return [nested(depth - 1)] if depth else 7

    assert same(through(pair, nested(wire.MAX_DEPTH)), nested(wire.MAX_DEPTH))
    assert wire.holds_opaque(through(pair, nested(wire.MAX_DEPTH + 1)))


def test_the_device_a_tensor_was_on_is_told_beside_its_values():
    node = ["t", "float32", [1], "cuda", 0]
    received = wire.decode(node, [struct.pack("<f", 2.0)])
    assert wire.device_of(received) == "cuda" and received.item() == 2.0
    assert wire.device_of(torch.ones(1)) == "cpu"


def test_copied_gives_what_the_other_side_would_receive_and_shares_no_memory():
    tensor = torch.ones(2)
    received = wire.copied({"a": (tensor, numpy.ones(1))})
    tensor.zero_()
    assert same(received["a"][0], torch.ones(2)) and isinstance(received["a"][1], Opaque)


def test_payload_bytes_are_those_of_the_values_alone():
    data = {"ab": [torch.ones(3), b"four"], "c": (1, 2.0, True, None, "é")}
    # Keys 2 + 1, tensor 12, bytes 4, three numbers of 8, two bytes of UTF-8.
    assert wire.payload_bytes(data) == 3 + 12 + 4 + 24 + 2
    assert wire.payload_bytes("\ud800") == 3


def test_printable_text_cannot_move_a_terminals_cursor():
    assert wire.printable("ok\n\x1b[2J\ud800\u202e") == "ok\n\\x1b[2J\\ud800\\u202e"


# --------------------------------------------------------------------------------------------------------- refusals


def frame(header: object, blobs: bytes = b"", *, magic: bytes = wire.MAGIC) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return wire.PREFIX.pack(magic, len(raw), len(blobs)) + raw + blobs


def of(node: object, *blobs: bytes) -> bytes:
    """A frame whose one value is the tagged node."""
    header = {"message": {}, "data": {"x": node}, "blobs": [len(blob) for blob in blobs]}
    return frame(header, b"".join(blobs))


def received(raw: bytes, *, max_bytes: int = PLENTY):
    left, right = socket.socketpair()
    with left, right:
        sender = threading.Thread(target=lambda: (left.sendall(raw), left.shutdown(socket.SHUT_WR)))
        sender.start()
        try:
            return wire.receive(right, max_bytes=max_bytes, deadline=time.monotonic() + 30)
        finally:
            right.close()
            sender.join()


def nest(depth: int) -> list:
    node: list = ["n"]
    for _ in range(depth):
        node = ["l", [node]]
    return node


def tensor_node(name="float32", shape=(1,), device="cpu", blob=0):
    return ["t", name, list(shape) if isinstance(shape, tuple) else shape, device, blob]


FOUR = b"\0\0\0\0"
REFUSED = {
    "bad magic": frame({"message": {}, "data": {}, "blobs": []}, magic=b"HTTP"),
    "header over its limit": wire.PREFIX.pack(wire.MAGIC, wire.MAX_HEADER_BYTES + 1, 0),
    "blobs over the bound": wire.PREFIX.pack(wire.MAGIC, 2, 1 << 60),
    "not JSON": frame(b"{"),
    "JSON in UTF-16": frame(json.dumps({"message": {}, "data": {}, "blobs": []}).encode("utf-16")),
    "not UTF-8": frame(b'{"\xff": 1}'),
    "nested JSON of great depth": frame(b"[" * 200_000),
    "a number of too many digits": frame(b"1" * 10_000),
    "a list instead of a header": frame([]),
    "a header without data": frame({"message": {}, "blobs": []}),
    "a message that is no object": frame({"message": [], "data": {}, "blobs": []}),
    "data that is no object": frame({"message": {}, "data": [], "blobs": []}),
    "a key that occurs twice": frame(b'{"message": {"a": 1, "a": 2}, "data": {}, "blobs": []}'),
    "lengths that are no list": frame({"message": {}, "data": {}, "blobs": {}}),
    "lengths that do not add up": frame({"message": {}, "data": {"x": ["y", 0]}, "blobs": [3]}, FOUR),
    "a negative length": frame({"message": {}, "data": {"x": ["y", 0]}, "blobs": [5, -1]}, FOUR),
    "a length that is a bool": frame({"message": {}, "data": {"x": ["y", 0]}, "blobs": [True]}, b"x"),
    "a blob that no value uses": frame({"message": {}, "data": {}, "blobs": [4]}, FOUR),
    "a blob used twice": of(["l", [["y", 0], ["y", 0]]], FOUR),
    "a blob that was not sent": of(["y", 1], FOUR),
    "a blob of negative number": of(["y", -1], FOUR),
    "a blob whose number is a bool": of(["y", False], FOUR),
    "a value without a tag": of([]),
    "a value that is no list": of("n"),
    "a tag that is no text": of([1, 2]),
    "an unknown tag": of(["z", 1]),
    "none with a value": of(["n", 1]),
    "a bool that is a number": of(["b", 1]),
    "an int that is a number": of(["i", 1]),
    "an int that is no number": of(["i", "seven"]),
    "an int of too many digits": of(["i", "0x" + "f" * wire.MAX_INT_DIGITS]),
    "a float that is no number": of(["f", "0x1.8p"]),
    "a float beyond all floats": of(["f", "0x1p99999"]),
    "text that is no text": of(["s", 1]),
    "too many parts": of(["s", "a", "b"]),
    "a list that is none": of(["l", {}]),
    "a dict with a key that occurs twice": of(["d", [["a", ["n"]], ["a", ["n"]]]]),
    "a dict with a key that is no text": of(["d", [[1, ["n"]]]]),
    "a dict of triples": of(["d", [["a", ["n"], 1]]]),
    "a dict that is none": of(["d", {"a": ["n"]}]),
    "values nested too deeply": of(nest(wire.MAX_DEPTH + 2)),
    "an unknown dtype": of(tensor_node("qint8"), FOUR),
    "a dtype that is no text": of(tensor_node(["float32"]), FOUR),
    "a device that is no text": of(tensor_node(device=0), FOUR),
    "a device of a long name": of(tensor_node(device="x" * 17), FOUR),
    "a shape that is no list": of(tensor_node(shape=1), FOUR),
    "a negative size": of(tensor_node(shape=(-1,)), FOUR),
    "two negative sizes": of(tensor_node(shape=(-1, -1)), FOUR),
    "a size that is a bool": of(tensor_node(shape=(True,)), FOUR),
    "a size that is a float": of(tensor_node(shape=(1.0,)), FOUR),
    "a shape of too many sizes": of(tensor_node(shape=(1,) * 65), FOUR),
    "a shape larger than its bytes": of(tensor_node(shape=(2,)), FOUR),
    "a shape smaller than its bytes": of(tensor_node("uint8", shape=(3,)), FOUR),
    "a size beyond all memory": of(tensor_node(shape=(1 << 62,)), FOUR),
    "an empty tensor of huge sizes": of(tensor_node(shape=(0, 1 << 47, 1 << 47)), b""),
    "a bool that is neither 0 nor 1": of(tensor_node("bool", shape=(4,)), b"\0\1\2\1"),
}


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_a_frame_is_refused(raw):
    with pytest.raises(ProtocolError):
        received(raw)


def test_the_frames_that_are_refused_differ_from_good_ones_in_one_point():
    assert received(of(["y", 0], FOUR)) == ({}, {"x": FOUR})
    assert same(received(of(tensor_node(), FOUR))[1]["x"], torch.zeros(1))
    assert same(
        received(of(tensor_node("bool", shape=(4,)), b"\0\1\0\1"))[1]["x"].tolist(), [False, True] * 2
    )
    assert received(of(nest(wire.MAX_DEPTH)))[0] == {}


def test_a_frame_over_its_bound_is_refused_before_it_is_read():
    raw = of(["y", 0], b"x" * 1000)
    assert received(raw, max_bytes=len(raw) - wire.PREFIX.size)[1] == {"x": b"x" * 1000}
    with pytest.raises(ProtocolError, match="at most"):
        received(raw, max_bytes=len(raw) - wire.PREFIX.size - 1)


@pytest.mark.parametrize("kept", [0, 1, 15, 16, 17, 40, -1])
def test_a_frame_cut_off_anywhere_says_that_the_other_side_ended(kept):
    with pytest.raises(Ended):
        received(of(["y", 0], b"blob")[:kept])


def test_a_connection_that_was_reset_or_closed_here_has_ended(pair):
    left, right = pair
    left.sendall(b"x")
    right.close()
    with pytest.raises(Ended):
        wire.receive(left, max_bytes=PLENTY)
    with pytest.raises(Ended):
        wire.send(left, {}, {"x": b"y" * (1 << 20)})
    left.close()
    with pytest.raises(Ended):
        wire.receive(left, max_bytes=PLENTY)


def test_the_deadline_ends_waiting_for_a_frame_and_for_the_rest_of_one(pair):
    left, right = pair
    with pytest.raises(TimeoutError):
        wire.receive(right, max_bytes=PLENTY, deadline=time.monotonic() - 1)
    left.sendall(of(["n"])[:20])
    with pytest.raises(TimeoutError):
        wire.receive(right, max_bytes=PLENTY, deadline=time.monotonic() + 0.01)


def test_the_deadline_ends_sending_to_someone_who_does_not_read(pair):
    with pytest.raises(TimeoutError):
        wire.send(pair[0], {}, {"x": bytes(1 << 24)}, deadline=time.monotonic() + 0.01)


def test_a_header_too_large_for_a_frame_is_refused_by_the_sender(pair):
    with pytest.raises(ProtocolError, match="header"):
        wire.send(pair[0], {"text": "x" * wire.MAX_HEADER_BYTES})


def test_one_thread_sends_while_another_receives_on_the_same_socket(pair):
    """A receive with a deadline must not leave a timeout, or a non-blocking mode, that a sender trips over."""
    left, right = pair
    count, payload = 50, bytes(300_000)  # larger than a socket's buffer, so that both sides block at times
    errors: list[BaseException] = []

    def sends(channel):
        try:
            for _ in range(count):
                wire.send(channel, {}, {"x": payload})
        except BaseException as error:  # noqa: BLE001 - any error at all fails the test
            errors.append(error)

    threads = [threading.Thread(target=sends, args=(channel,)) for channel in (left, right)]
    for thread in threads:
        thread.start()

    def receives(channel):
        for _ in range(count):
            wire.receive(channel, max_bytes=PLENTY, deadline=time.monotonic() + 60)

    reader = threading.Thread(target=receives, args=(left,))
    reader.start()
    receives(right)
    for thread in [*threads, reader]:
        thread.join(60)
    assert not errors and not any(thread.is_alive() for thread in [*threads, reader])


# ------------------------------------------------------------------------------------------------------- properties


def drawn(choose: random.Random, depth: int = 0) -> object:
    """Random plain data."""
    kinds = ["none", "bool", "int", "float", "text", "bytes", "tensor"] + ["list", "tuple", "dict"] * (
        depth < 4
    )
    kind = choose.choice(kinds)
    if kind in ("list", "tuple", "dict"):
        parts = [drawn(choose, depth + 1) for _ in range(choose.randrange(5))]
        if kind == "dict":
            return {f"{choose.randrange(9)}{index}": part for index, part in enumerate(parts)}
        return parts if kind == "list" else tuple(parts)
    if kind == "tensor":
        dtype = wire.DTYPES[choose.choice([name for name in wire.DTYPES if name != "bool"])]
        shape = [choose.randrange(4) for _ in range(choose.randrange(4))]
        raw = choose.randbytes(math.prod(shape) * dtype.itemsize)
        empty = torch.empty(shape, dtype=dtype)
        return (
            torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).reshape(shape) if raw else empty
        )
    return {
        "none": None,
        "bool": choose.random() < 0.5,
        "int": choose.randrange(-(1 << choose.randrange(1, 200)), 1 << 200),
        "float": struct.unpack("<d", choose.randbytes(8))[0],
        "text": "".join(chr(choose.randrange(0x110000)) for _ in range(choose.randrange(6))),
        "bytes": choose.randbytes(choose.randrange(20)),
    }[kind]


def test_random_data_comes_back_equal(pair, seed):
    choose = random.Random(seed)
    for _ in range(300):
        data = drawn(choose)
        assert same(through(pair, data), data)


def frame_of(data) -> bytes:
    left, right = socket.socketpair()
    with left, right:
        wire.send(left, {"done": True}, {"observed": data})
        return right.recv(1 << 20)


def corrupted(raw: bytes, choose: random.Random) -> bytes:
    """The frame with bytes changed, dropped, repeated or cut."""
    changed = bytearray(raw)
    for _ in range(choose.choice([1, 1, 2, 8])):
        at = choose.randrange(len(changed)) if changed else 0
        what = choose.randrange(5)
        if what == 0:
            changed[at : at + 1] = choose.randbytes(1)
        elif what == 1:
            del changed[at : at + choose.randrange(1, 4)]
        elif what == 2:
            changed[at:at] = changed[at : at + choose.randrange(1, 9)]
        elif what == 3:
            changed[at : at + 1] = choose.choice([b"-", b"9", b"[", b"]", b'"', b"\\", b",", b"{", b"e"])
        else:
            del changed[at:]
    return bytes(changed)


def test_a_corrupted_frame_raises_nothing_but_the_three_refusals(seed):
    choose = random.Random(seed)
    outcomes = {"accepted": 0, "refused": 0, "ended": 0}
    for _ in range(120):
        raw = frame_of(drawn(choose))
        for _ in range(12):
            left, right = socket.socketpair()
            with left, right:
                left.sendall(corrupted(raw, choose))
                left.shutdown(socket.SHUT_WR)
                try:
                    wire.receive(right, max_bytes=1 << 20, deadline=time.monotonic() + 30)
                    outcomes["accepted"] += 1
                except ProtocolError:
                    outcomes["refused"] += 1
                except Ended:
                    outcomes["ended"] += 1
    # Each of the three must have happened, or the corruption is not what this test thinks it is.
    assert all(outcomes.values()), outcomes
