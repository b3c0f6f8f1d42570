"""Journals as files: what a crash leaves, what damage looks like, and whose they are."""

import zlib

import pytest

from migrate.journal import MAX_BYTES, Journal, JournalError, claim_in, damaged, journals
from proto.ownership import Claim, Event, Role

IDENTITY = bytes(16)


def line(text: str) -> bytes:
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


PREPARED, OWNER = line('{"claim": "PREPARED"}'), line('{"claim": "OWNER"}')


def stored(directory, content: bytes) -> str:
    path = directory / f"{IDENTITY.hex()}.destination"
    path.write_bytes(content)
    return str(path)


@pytest.fixture
def journal(tmp_path):
    found = Journal(Role.DESTINATION, IDENTITY, str(tmp_path))
    yield found
    found.close()


@pytest.mark.parametrize("cut", range(1, len(OWNER) + 1))
def test_what_a_crash_cut_off_is_gone_and_the_next_line_stands(tmp_path, journal, cut):
    path = stored(tmp_path, PREPARED + OWNER[:-cut])
    journal.open()
    assert journal.claim is Claim.PREPARED
    journal.move(Event.GO)
    assert claim_in(path)[2] is Claim.OWNER


@pytest.mark.parametrize("torn", [bytes(40) + b"\n", OWNER[:20] + bytes(20) + b"\n"])
def test_a_torn_last_line_may_have_its_end(tmp_path, journal, torn):
    path = stored(tmp_path, PREPARED + torn)
    journal.open()
    assert journal.claim is Claim.PREPARED
    journal.move(Event.GO)
    assert claim_in(path)[2] is Claim.OWNER


@pytest.mark.parametrize("at", range(0, len(PREPARED) - 1, 5))
def test_a_claim_behind_damage_is_not_forgotten(tmp_path, journal, at):
    """OWNER, forgotten for a bit that flipped in the line before it, would be given up."""
    content = bytearray(PREPARED + OWNER)
    content[at] ^= 1
    path = stored(tmp_path, bytes(content))
    with pytest.raises(JournalError, match="damaged"):
        journal.open()
    journal.close()
    assert list(journals(Role.DESTINATION, str(tmp_path))) == []
    [said] = damaged(Role.DESTINATION, str(tmp_path))
    assert "damaged" in said
    assert damaged(Role.SOURCE, str(tmp_path)) == []
    with open(path, "rb") as file:
        assert file.read() == content


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "null", '"x"', '{"claim": 7}', '{"claim": "ours"}', '{"claim": []}',
     '{"claim": null}', '{"facts": 7}', '{"facts": {"guest": 7}}', '{"facts": {"place": null}}',
     '{"facts": {"address": []}}', '{"started": "yes"}', "[" * 100_000,
     '{"claim": ' + "9" * 5000 + "}", '{"x": "\udcff"}'],
)  # fmt: skip
def test_a_line_of_anything_else_is_refused(tmp_path, journal, text):
    bare = text.encode(errors="surrogateescape")
    path = stored(tmp_path, PREPARED + f"{zlib.crc32(bare):08x} ".encode() + bare + b"\n")
    with pytest.raises(JournalError, match="not understood"):
        journal.open()
    with pytest.raises(JournalError, match="not understood"):
        claim_in(path)
    assert list(journals(Role.DESTINATION, str(tmp_path))) == []


def test_a_file_that_is_too_long_keeps_its_end(tmp_path, journal):
    path = stored(tmp_path, PREPARED * (MAX_BYTES // len(PREPARED) + 1) + OWNER)
    with pytest.raises(JournalError, match="longer than any journal"):
        journal.open()
    with open(path, "rb") as file:
        assert file.read().endswith(OWNER)


def test_the_journal_of_another_program_is_not_removed(tmp_path, journal):
    """It would be the only record of whose the guest is."""
    journal.begin(place={})
    journal.move(Event.VERIFIED)
    other = Journal(Role.DESTINATION, IDENTITY, str(tmp_path))
    with pytest.raises(JournalError, match="in the hands of another program"):
        other.open(create=False)
    other.close()
    [found] = journals(Role.DESTINATION, str(tmp_path))
    assert found.claim is Claim.PREPARED
