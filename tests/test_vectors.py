"""The golden vectors: the bytes of the wire, which no change of the code may change.

tests/vectors/wire.json holds the exchange that proto/README.md walks through, the messages that
do not occur in it, page hashes, a batch with every form of a gap, and the items of a stream.
"""

import hashlib
import json
import re
import struct
from array import array
from pathlib import Path

import pytest
import xxhash

from proto.wire import messages
from proto.wire.frames import HEADER_BYTES, FrameReader, seal
from proto.wire.messages import MessageType, Pages, pack, unpack
from proto.wire.session import Role, Session, State
from tests.kernels import kernel  # noqa: F401  (a fixture)

ROOT = Path(__file__).parent.parent
WIRE = json.loads((ROOT / "tests/vectors/wire.json").read_text())
EXCHANGE = WIRE["exchange"]
FRAMES = EXCHANGE["frames"] + WIRE["others"]
README = (ROOT / "proto/README.md").read_text()

each_frame = pytest.mark.parametrize(
    "vector", FRAMES, ids=[f"{i}-{v['type']}" for i, v in enumerate(FRAMES)]
)


def batch_of(fields):
    """The head and the raw pages of a batch."""
    return bytes.fromhex(fields["head"]), bytes.fromhex(fields["data"])


def blocks_of(listed):
    return tuple((bytes.fromhex(name), pages) for name, pages in listed)


def message_of(vector):
    """The message that a vector's fields describe."""
    kind = MessageType[vector["type"]]
    fields = dict(vector["fields"])
    if kind is MessageType.PAGES:
        return Pages()
    binary = {"digest", "state", "token", "hash_seed", "resume", "hashes", "padding", "data"}
    for name in binary & fields.keys():
        if kind not in (MessageType.PING, MessageType.PONG):
            fields[name] = bytes.fromhex(fields[name])
    for name in {"required", "optional"} & fields.keys():
        fields[name] = tuple(fields[name])
    if "blocks" in fields:
        fields["blocks"] = blocks_of(fields["blocks"])
    if "code" in fields:
        fields["code"] = messages.ErrorCode(fields["code"])
    [cls] = [cls for cls, other in messages.TYPE_OF.items() if other is kind]
    return cls(**fields)


def memory_of(contents, pages, page_size):
    memory = bytearray(pages * page_size)
    for page, content in contents.items():
        at = int(page) * page_size
        memory[at : at + page_size] = bytes.fromhex(content)
    return memory


def test_every_type_has_a_vector():
    assert {vector["type"] for vector in FRAMES} == {kind.name for kind in MessageType}


@each_frame
def test_message_to_bytes(vector):
    message, kind = message_of(vector), MessageType[vector["type"]]
    frame, data = bytearray(HEADER_BYTES), b""
    if isinstance(message, Pages):
        head, data = batch_of(vector["fields"])
        frame += head
    else:
        frame = pack(message, HEADER_BYTES)
    seal(frame, kind, vector.get("channel", 0), len(data))
    assert (frame + data).hex() == vector["frame"]


@each_frame
def test_bytes_to_message(vector):
    reader = FrameReader()
    reader.channel = vector.get("channel", 0)
    reader.feed(bytes.fromhex(vector["frame"]))
    frame = reader.next_frame()
    assert frame.type.name == vector["type"]
    message, expected = unpack(frame.type, frame.head), message_of(vector)
    if isinstance(expected, Pages):
        assert (bytes(frame.head), bytes(frame.data)) == batch_of(vector["fields"])
    else:
        assert message == expected
        assert not frame.data


@each_frame
def test_frame_check_matches_the_specification(vector):
    frame = bytes.fromhex(vector["frame"])
    seed = int.from_bytes(frame[4:12], "big")
    length, head = int.from_bytes(frame[8:12], "big"), int.from_bytes(frame[12:16], "big")
    assert len(frame) == 24 + length
    assert head == length or vector["type"] == "PAGES"
    check = xxhash.xxh3_64_intdigest(frame[24 : 24 + head], seed)
    assert frame[16:24] == check.to_bytes(8, "big")


def test_exchange_vector_visits_all_states():
    ends = {role.value: Session(role) for role in Role}
    seen = [State.START]
    for vector in EXCHANGE["frames"]:
        sender = ends[vector["from"]]
        receiver = ends[sender.role.peer.value]
        message = message_of(vector)
        if isinstance(message, Pages):
            sender.send_pages()
        else:
            assert sender.send(message).hex() == vector["frame"]
        receiver.reader.feed(bytes.fromhex(vector["frame"]))
        assert receiver.next_frame().type.name == vector["type"]
        assert sender.state is receiver.state
        seen.append(sender.state)
    assert set(seen) == set(State) - {
        State.FAILED, State.JOINING, State.CHANNEL, State.ASKED, State.ANSWERED,
    }  # fmt: skip
    assert seen[-1] is State.DONE


def hashes_of(kernel, vector):
    return kernel.PageHashes(
        vector["pages"], vector["page_size"], bytes.fromhex(vector["hash_seed"])
    )


def test_pages_give_the_stated_memory(kernel):
    pages, page_size = EXCHANGE["pages"], EXCHANGE["page_size"]
    decoder = kernel.PageDecoder(hashes_of(kernel, EXCHANGE), EXCHANGE["size"])
    memory = bytearray(pages * page_size)
    rounds = 0
    for vector in EXCHANGE["frames"]:
        if vector["type"] == "PAGES":
            head, data = batch_of(vector["fields"])
            assert decoder.check(head, len(data))[0] == rounds + 1
            decoder.apply(head, data, memory)
        elif vector["type"] == "ROUND":
            rounds += 1
            expected = EXCHANGE["memory_after_round"][str(rounds)]
            assert memory == memory_of(expected, pages, page_size)
    assert rounds == 2
    assert decoder.received_pages == pages
    assert (decoder.raw, decoder.delta, decoder.zero) == (2, 3, 199)


def hash_as_specified(content, seed):
    """Written from proto/README.md ("Page hashes") alone."""
    words = [int.from_bytes(content[i : i + 8], "little") for i in range(0, len(content), 8)]
    stream = hashlib.shake_256(seed).digest(len(content) + 32)
    key = [int.from_bytes(stream[i : i + 8], "little") for i in range(0, len(stream), 8)]
    total, m, n = 0, 2**64, len(words)
    for i in range(0, n, 2):
        total += (words[i] + key[i]) % m * ((words[i + 1] + key[i + 1]) % m)
    total %= 2**128
    low, high = total % m, total // m
    a, b = key[n] + key[n + 1] * m, key[n + 2] + key[n + 3] * m
    return (a * low + b * high) % 2**128 // m


@pytest.mark.parametrize("vector", WIRE["page_hashes"], ids=lambda vector: vector["name"])
def test_page_hashes_are_what_the_specification_says(kernel, vector):
    size, seed = vector["page_size"], bytes.fromhex(EXCHANGE["hash_seed"])
    piece = bytes.fromhex(vector["repeat"])
    content = (piece * (size // len(piece) + 1))[:size]
    value = int(vector["hash"], 16)
    assert hash_as_specified(content, seed) == value
    hashes = kernel.PageHashes(3, size, seed)
    assert hashes.table == hash_as_specified(bytes(size), seed).to_bytes(8, "little") * 3
    hashes.hash_pages(memoryview(array("Q", [1])), 1, content)
    assert hashes.table[8:16] == value.to_bytes(8, "little")
    if size == EXCHANGE["page_size"]:
        assert f"| `{vector['hash']}` |" in README


@pytest.mark.parametrize(
    "fields",
    [vector["fields"] for vector in FRAMES if vector["type"] == "PAGES"]
    + [body for vector in WIRE["batches"] for body in vector["bodies"]],
    ids=lambda fields: fields["head"][:24],
)
def test_batch_check_matches_the_specification(fields):
    head, data = batch_of(fields)
    check = 0
    for at in range(0, len(data), 1024):
        value = hash_as_specified(data[at : at + 1024], bytes(range(16)))
        check = (check * 0x9E3779B97F4A7C15 + value) % 2**64
    assert head[12:20] == check.to_bytes(8, "big")


def test_digest_matches_the_specification():
    size, seed = EXCHANGE["page_size"], bytes.fromhex(EXCHANGE["hash_seed"])
    memory = memory_of(EXCHANGE["memory_after_round"]["2"], EXCHANGE["pages"], size)
    assert not any(memory[EXCHANGE["size"] :]), "what fills up the last page"
    values = [hash_as_specified(memory[at : at + size], seed) for at in range(0, len(memory), size)]
    table = b"".join(value.to_bytes(8, "little") for value in values)
    digest = xxhash.xxh3_128_digest(table)
    assert digest.hex() == EXCHANGE["digest"]
    [complete] = [vector for vector in FRAMES if vector["type"] == "COMPLETE"]
    assert complete["fields"]["digest"] == EXCHANGE["digest"]


def test_digest_sum_matches_the_specification(kernel):
    """Written from proto/README.md ("The digest") alone, then asked of the kernel."""
    size, seed = EXCHANGE["page_size"], bytes.fromhex(EXCHANGE["hash_seed"])
    memory = bytes(memory_of(EXCHANGE["memory_after_round"]["2"], EXCHANGE["pages"], size))
    contents = [memory[at : at + size] for at in range(0, len(memory), size)]
    zero = hash_as_specified(bytes(size), seed)
    terms = {len(contents): zero} | {
        page: hash_as_specified(content, seed)
        for page, content in enumerate(contents)
        if any(content)
    }
    total = 0
    for page, value in terms.items():
        term = xxhash.xxh3_128_intdigest(page.to_bytes(8, "little") + value.to_bytes(8, "little"))
        assert f"| {page} | `{value:016x}` | `{term:032x}` |" in README
        total += term
    digest = (total % 2**128).to_bytes(16, "big")
    assert digest.hex() == EXCHANGE["sum"]
    assert EXCHANGE["sum"] in README
    hashes = hashes_of(kernel, EXCHANGE)
    hashes.hash_pages(memoryview(array("Q", range(len(contents)))), len(contents), memory)
    assert hashes.sum == digest


@pytest.mark.parametrize("vector", WIRE["batches"], ids=lambda vector: vector["name"])
def test_batches_give_the_stated_memory(kernel, vector):
    pages, page_size = vector["pages"], vector["page_size"]
    decoder = kernel.PageDecoder(hashes_of(kernel, vector), pages * page_size)
    memory = bytearray(pages * page_size)
    for head, data in map(batch_of, vector["bodies"]):
        decoder.check(head, len(data))
        decoder.apply(head, data, memory)
    assert memory == memory_of(vector["memory"], pages, page_size)


@pytest.mark.parametrize("merge", [False, True])
def test_encoder_reproduces_the_exchange_vector(kernel, merge):
    """The source's memory in the exchange, and the batches that it sends for it."""
    pages, page_size = EXCHANGE["pages"], EXCHANGE["page_size"]
    cache = kernel.PageCache(1 << 16, page_size)
    encoder = kernel.PageEncoder(hashes_of(kernel, EXCHANGE), cache, merge=merge)
    batches = [
        batch_of(vector["fields"]) for vector in EXCHANGE["frames"] if vector["type"] == "PAGES"
    ]
    dirty = [range(pages), (2, 3, 150, 199)]
    for number, (batch, numbers) in enumerate(zip(batches, dirty, strict=True), 1):
        memory = memory_of(EXCHANGE["memory_after_round"][str(number)], pages, page_size)
        encoder.begin_round(number)
        snapshot, places = encoder.space()
        for i, page in enumerate(numbers):
            places[i] = page
            at = page * page_size
            snapshot[i * page_size : (i + 1) * page_size] = memory[at : at + page_size]
        encoder.feed(len(numbers), bytes(pages))
        head, data = encoder.finish_batch()
        assert (bytes(head), bytes(data)) == batch


def record_as_specified(blocks, page, size, op, body, last):
    """Written from proto/README.md ("Streams") alone: (the record, its block)."""
    first = 0
    while page >= first + blocks[0][1]:
        first += blocks[0][1]
        blocks = blocks[1:]
    name = blocks[0][0]
    flags = {0: 0x02, 1: 0x08, 2: 0x40}[op] | (0x20 if name == last else 0)
    out = ((page - first) * size | flags).to_bytes(8, "big")
    if name != last:
        out += bytes([len(name)]) + name
    return out + (b"\1" + len(body).to_bytes(2, "big") + body if op == 2 else body), name


def test_encoder_reproduces_the_stream_vector(kernel):
    vector = WIRE["stream"]
    cache = kernel.PageCache(1 << 16, vector["page_size"])
    encoder = kernel.PageEncoder(hashes_of(kernel, vector), cache)
    batches = [item for item in vector["items"] if item["type"] == "PAGES"]
    for number, item in enumerate(batches, 1):
        encoder.begin_round(number)
        data, table = b"", b""
        for page, op, body in item["pages"]:
            length = len(body) // 2 if op else 0
            table += struct.pack("=QQII", page, len(data), length, op)
            data += bytes.fromhex(body)
        assert encoder.feed_records(data, table, 0, len(item["pages"])) == (
            len(item["pages"]), False,
        )  # fmt: skip
        head, raw = encoder.finish_batch()
        assert (bytes(head), bytes(raw)) == batch_of(item["fields"])


def test_forwarded_stream_matches_the_specification(kernel):
    """Every item, what QEMU gets for it, and the digest of them all."""
    vector = WIRE["stream"]
    blocks = blocks_of(vector["blocks"])
    writer = kernel.RamWriter(hashes_of(kernel, vector), blocks)
    digest, last = xxhash.xxh3_128(), None
    for item in vector["items"]:
        if "data" in item["fields"] and "head" not in item["fields"]:
            data = bytes.fromhex(item["fields"]["data"])
            digest.update(data)
            assert item["passed_on"] == ("" if item["fields"]["held"] else data.hex())
            continue
        head, data = batch_of(item["fields"])
        digest.update(head)
        writer.begin(head, data)
        out, written = bytearray(1 << 16), b""
        while count := writer.fill(out):
            written += out[:count]
        assert written.hex() == item["passed_on"]
        expected = b""
        for page, op, body in item["pages"]:
            one, last = record_as_specified(
                blocks, page, vector["page_size"], op, bytes.fromhex(body), last
            )
            expected += one
        assert expected == written
    assert digest.hexdigest() == vector["digest"]
    count, return_path = len(vector["items"]), vector["return_path"]
    assert vector["state"] == (count.to_bytes(8, "big") + bytes([return_path])).hex()
    assert writer.received_pages == vector["pages"]


# ---------------------------------------------------------------- the specification


def test_specification_example_is_the_exchange_vector():
    blocks, open_block = [], False
    for line in README[README.index("## An example") :].splitlines():
        if line.startswith(("    -> ", "    <- ")):
            sender = "source" if line[4:6] == "->" else "destination"
            blocks.append((sender, line[7:]))
            open_block = True
        elif open_block and line.startswith("       "):
            blocks[-1] = (blocks[-1][0], blocks[-1][1] + line)
        else:
            open_block = False
    assert len(blocks) == len(EXCHANGE["frames"])
    for (sender, text), vector in zip(blocks, EXCHANGE["frames"], strict=True):
        pattern = text.replace("...2048 bytes...", "[0-9a-f]{4096}").replace(" ", "")
        assert sender == vector["from"]
        assert re.fullmatch(pattern, vector["frame"]), vector["type"]


def test_limits_match_the_specification():
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (\d+) \|", README, re.MULTILINE))
    assert len(rows) == 23
    assert {name: getattr(messages, name) for name in rows} == {
        name: int(value) for name, value in rows.items()
    }


def test_numbers_match_the_specification():
    types = re.findall(r"^\| (\d+) \| ([A-Z_]+) \| (?:source|destination|both) \|", README, re.M)
    assert {name: int(number) for number, name in types} == dict(MessageType.__members__)
    codes = re.findall(r"^\| (\d+) \| ([A-Z_]+) \| (?!source|destination|both)", README, re.M)
    assert {name: int(number) for number, name in codes} == dict(messages.ErrorCode.__members__)
