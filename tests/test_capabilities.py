"""What two sides agree on: every combination of switches, and each refusal by name."""

import itertools

import pytest

from proto import capabilities as caps
from proto.errors import CapabilityError, ErrorCode, LocalError
from proto.messages import BATCH_BYTES, PROTOCOL_VERSION, Hello

REQUIRED = tuple(sorted(caps.REQUIRED))
XBZRLE = frozenset({"xbzrle"})


def hello(required=REQUIRED, optional=(), version=PROTOCOL_VERSION, **limits):
    return Hello(version, tuple(required), tuple(optional), **limits)


@pytest.mark.parametrize(
    ("source", "destination"), list(itertools.product([True, False], repeat=2))
)
def test_both_sides_come_to_the_same_agreement(source, destination):
    offer = caps.offer(caps.switched_on({"xbzrle": source}))
    answer, there = caps.answer(offer, caps.switched_on({"xbzrle": destination}))
    here = caps.agree(offer, answer)
    assert here == there
    assert here.xbzrle is (source and destination)
    assert here.used - caps.REQUIRED == (XBZRLE if source and destination else frozenset())
    assert here.dropped == (XBZRLE if source and not destination else frozenset())


def test_all_is_on_that_is_not_switched_off():
    assert caps.switched_on({}) == caps.OPTIONAL
    assert caps.switched_on(dict.fromkeys(caps.OPTIONAL, False)) == frozenset()


@pytest.mark.parametrize("name", ["zstd", "digest-xxh3", ""])
def test_an_unknown_switch_is_refused_with_the_known_ones(name):
    with pytest.raises(LocalError, match=f"no capability '{name}': known are xbzrle"):
        caps.switched_on({name: True})


def test_an_unknown_optional_capability_is_dropped_and_reported():
    offer = hello(optional=("postcopy", "xbzrle"))
    answer, there = caps.answer(offer, caps.OPTIONAL)
    assert answer.optional == ("xbzrle",)
    assert there.dropped == {"postcopy"}
    assert caps.agree(offer, answer) == there


@pytest.mark.parametrize("optional", [caps.OPTIONAL, frozenset()])
def test_an_unknown_required_capability_is_refused_by_name(optional):
    with pytest.raises(CapabilityError, match="source requires capability 'postcopy'"):
        caps.answer(hello(required=(*REQUIRED, "postcopy")), optional)


def test_an_optional_capability_may_be_required_by_the_source():
    offer = hello(required=(*REQUIRED, "xbzrle"))
    answer, there = caps.answer(offer, XBZRLE)
    assert caps.agree(offer, answer) == there
    assert there.xbzrle
    with pytest.raises(CapabilityError, match="source requires capability 'xbzrle'"):
        caps.answer(offer, frozenset())


def test_what_is_required_here_may_be_optional_there():
    offer = hello(required=(), optional=REQUIRED)
    answer, there = caps.answer(offer, frozenset())
    assert there.used == caps.REQUIRED
    assert caps.agree(offer, answer) == there


@pytest.mark.parametrize("name", REQUIRED)
def test_a_source_without_what_is_required_here_is_refused_by_name(name):
    with pytest.raises(CapabilityError, match=f"source lacks capability '{name}'"):
        caps.answer(hello(required=set(REQUIRED) - {name}), caps.OPTIONAL)


@pytest.mark.parametrize("name", REQUIRED)
def test_an_answer_without_what_is_required_here_is_refused_by_name(name):
    with pytest.raises(CapabilityError, match=f"destination lacks capability '{name}'"):
        caps.agree(caps.offer(XBZRLE), hello(required=set(REQUIRED) - {name}))


@pytest.mark.parametrize("where", ["required", "optional"])
def test_an_answer_with_what_was_not_offered_is_refused_by_name(where):
    lists = {"required": REQUIRED, "optional": ()}
    lists[where] = (*lists[where], "xbzrle")
    with pytest.raises(CapabilityError, match="wants capability 'xbzrle', which was not offered"):
        caps.agree(caps.offer(frozenset()), hello(**lists))


def test_it_makes_no_difference_in_which_list_the_answer_names_it():
    offer = caps.offer(XBZRLE)
    assert caps.agree(offer, hello(required=(*REQUIRED, "xbzrle"))).xbzrle
    assert caps.agree(offer, hello(required=(), optional=(*REQUIRED, "xbzrle"))).xbzrle


@pytest.mark.parametrize("version", [PROTOCOL_VERSION + 1, 65535])
def test_another_version_is_refused_on_both_sides(version):
    other = hello(version=version)
    for refuse in (
        lambda: caps.answer(other, caps.OPTIONAL),
        lambda: caps.agree(caps.offer(caps.OPTIONAL), other),
    ):
        with pytest.raises(CapabilityError, match=f"protocol version {version}, here 1") as info:
            refuse()
        assert info.value.code is ErrorCode.CAPABILITY


def test_a_destination_that_takes_no_whole_batch_is_refused():
    offer = caps.offer(frozenset())
    caps.agree(offer, hello(max_body=BATCH_BYTES))
    with pytest.raises(CapabilityError, match=f"takes batches of {BATCH_BYTES - 1} bytes"):
        caps.agree(offer, hello(max_body=BATCH_BYTES - 1))
