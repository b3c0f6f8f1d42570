"""The golden vectors: the bytes of the wire, which no change of the code may change.

tests/vectors/wire.json holds the exchange that proto/README.md walks through, the messages that
do not occur in it, and a batch with every form of a gap.
"""

import json
import re
from pathlib import Path

import pytest
import xxhash

from proto import messages
from proto.frames import HEADER_BYTES, FrameReader, seal
from proto.messages import DIGEST_CHUNK, MessageType, Pages, pack, unpack
from proto.session import Role, Session, State
from tests.kernels import kernel  # noqa: F401  (a fixture)

ROOT = Path(__file__).parent.parent
WIRE = json.loads((ROOT / "tests/vectors/wire.json").read_text())
EXCHANGE = WIRE["exchange"]
FRAMES = EXCHANGE["frames"] + WIRE["others"]
README = (ROOT / "proto/README.md").read_text()

each_frame = pytest.mark.parametrize(
    "vector", FRAMES, ids=[f"{i}-{v['type']}" for i, v in enumerate(FRAMES)]
)


def message_of(vector):
    """The message that a vector's fields describe."""
    kind = MessageType[vector["type"]]
    fields = dict(vector["fields"])
    if kind is MessageType.PAGES:
        return Pages(bytes.fromhex(fields["body"]))
    for name in {"digest", "state"} & fields.keys():
        fields[name] = bytes.fromhex(fields[name])
    for name in {"required", "optional"} & fields.keys():
        fields[name] = tuple(fields[name])
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
    message = message_of(vector)
    frame = seal(pack(message, HEADER_BYTES), MessageType[vector["type"]])
    assert frame.hex() == vector["frame"]


@each_frame
def test_bytes_to_message(vector):
    reader = FrameReader()
    reader.feed(bytes.fromhex(vector["frame"]))
    frame = reader.next_frame()
    assert frame.type.name == vector["type"]
    message, expected = unpack(frame.type, frame.body), message_of(vector)
    if isinstance(expected, Pages):
        assert bytes(message.body) == expected.body
    else:
        assert message == expected


@each_frame
def test_the_check_is_what_the_specification_says(vector):
    frame = bytes.fromhex(vector["frame"])
    seed = int.from_bytes(frame[4:12], "big")
    check = xxhash.xxh3_64_intdigest(frame[16:], seed) & 0xFFFFFFFF
    assert frame[12:16] == check.to_bytes(4, "big")


def test_the_exchange_walks_through_all_states():
    ends = {role.value: Session(role) for role in Role}
    seen = [State.START]
    for vector in EXCHANGE["frames"]:
        sender = ends[vector["from"]]
        receiver = ends[sender.role.peer.value]
        receiver.reader.feed(bytes(sender.send(message_of(vector))))
        assert receiver.next_frame().type.name == vector["type"]
        assert sender.state is receiver.state
        seen.append(sender.state)
    assert set(seen) == set(State) - {State.FAILED}
    assert seen[-1] is State.DONE


def test_pages_give_the_stated_memory(kernel):  # noqa: F811
    pages, page_size = EXCHANGE["pages"], EXCHANGE["page_size"]
    decoder = kernel.PageDecoder(pages, page_size, DIGEST_CHUNK // page_size)
    memory = bytearray(pages * page_size)
    rounds = 0
    for vector in EXCHANGE["frames"]:
        if vector["type"] == "PAGES":
            body = bytes.fromhex(vector["fields"]["body"])
            assert decoder.check(body) == rounds + 1
            decoder.apply(body, memory)
        elif vector["type"] == "ROUND":
            rounds += 1
            expected = EXCHANGE["memory_after_round"][str(rounds)]
            assert memory == memory_of(expected, pages, page_size)
    assert rounds == 2
    assert decoder.received_pages == pages
    assert (decoder.raw, decoder.delta, decoder.zero) == (2, 3, 199)


def test_the_digest_is_what_the_specification_says():
    memory = memory_of(EXCHANGE["memory_after_round"]["2"], EXCHANGE["pages"], 1024)
    guest = memory[: EXCHANGE["size"]]
    chunks = [guest[at : at + DIGEST_CHUNK] for at in range(0, len(guest), DIGEST_CHUNK)]
    assert len(chunks) == 4
    assert len(chunks[-1]) < DIGEST_CHUNK
    digest = xxhash.xxh3_128_digest(b"".join(map(xxhash.xxh3_128_digest, chunks)))
    assert digest.hex() == EXCHANGE["digest"]
    [complete] = [vector for vector in FRAMES if vector["type"] == "COMPLETE"]
    assert complete["fields"]["digest"] == EXCHANGE["digest"]


@pytest.mark.parametrize("vector", WIRE["batches"], ids=lambda vector: vector["name"])
def test_batches_give_the_stated_memory(kernel, vector):  # noqa: F811
    pages, page_size = vector["pages"], vector["page_size"]
    decoder = kernel.PageDecoder(pages, page_size, DIGEST_CHUNK // page_size)
    memory = bytearray(pages * page_size)
    for body in map(bytes.fromhex, vector["bodies"]):
        decoder.check(body)
        decoder.apply(body, memory)
    assert memory == memory_of(vector["memory"], pages, page_size)


def test_the_encoder_gives_the_bytes_of_the_exchange(kernel):  # noqa: F811
    """Each side of the exchange: what the source's memory is, and what it sends for it."""
    pages, page_size = EXCHANGE["pages"], EXCHANGE["page_size"]
    encoder = kernel.PageEncoder(pages, page_size, kernel.PageCache(1 << 16, page_size))
    bodies = [
        vector["fields"]["body"] for vector in EXCHANGE["frames"] if vector["type"] == "PAGES"
    ]
    dirty = [range(pages), (2, 3, 150, 199)]
    for number, (body, numbers) in enumerate(zip(bodies, dirty, strict=True), 1):
        memory = memory_of(EXCHANGE["memory_after_round"][str(number)], pages, page_size)
        snapshot = b"".join(memory[p * page_size : (p + 1) * page_size] for p in numbers)
        encoder.begin_round(number)
        words = memoryview(b"".join(p.to_bytes(8, "little") for p in numbers)).cast("Q")
        assert encoder.feed(words, len(numbers), snapshot, bytes(pages)) == len(numbers)
        assert encoder.take().hex() == body


# ---------------------------------------------------------------- the specification


def test_the_example_of_the_specification_is_the_exchange():
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


def test_the_limits_of_the_specification_are_those_of_the_code():
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (\d+) \|", README, re.MULTILINE))
    assert len(rows) == 11
    assert {name: getattr(messages, name) for name in rows} == {
        name: int(value) for name, value in rows.items()
    }


def test_the_numbers_of_the_specification_are_those_of_the_code():
    types = re.findall(r"^\| (\d+) \| ([A-Z_]+) \| (?:source|destination|both) \|", README, re.M)
    assert {name: int(number) for number, name in types} == dict(MessageType.__members__)
    codes = re.findall(r"^\| (\d+) \| ([A-Z_]+) \| (?!source|destination|both)", README, re.M)
    assert {name: int(number) for number, name in codes} == dict(messages.ErrorCode.__members__)
