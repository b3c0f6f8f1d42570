"""What two sides agree on: every combination of switches, and each refusal by name."""

import itertools

import pytest

from proto.wire import capabilities as caps
from proto.wire.errors import CapabilityError, ErrorCode, LocalError
from proto.wire.messages import BATCH_BYTES, PROTOCOL_VERSION, Hello

REQUIRED = tuple(sorted(caps.REQUIRED))
XBZRLE = frozenset({"xbzrle"})


def hello(required=REQUIRED, optional=(), version=PROTOCOL_VERSION, **limits):
    return Hello(version, tuple(required), tuple(optional), **limits)


@pytest.mark.parametrize("name", sorted(caps.OPTIONAL))
@pytest.mark.parametrize(
    ("source", "destination"), list(itertools.product([True, False], repeat=2))
)
def test_both_sides_come_to_the_same_agreement(name, source, destination):
    offer = caps.offer(caps.switched_on({name: source}))
    answer, there = caps.answer(offer, caps.switched_on({name: destination}))
    here = caps.agree(offer, answer)
    one, others = frozenset({name}), caps.OPTIONAL - {name}
    assert here == there
    assert here.used == caps.REQUIRED | others | (one if source and destination else frozenset())
    assert here.dropped == (one if source and not destination else frozenset())
    assert here.xbzrle is (name != "xbzrle" or (source and destination))
    assert here.zstd is (name != "zstd" or (source and destination))
    merges = name == "zstd" or (source and destination)
    assert here.merge is merges, "merging means nothing without xbzrle"


@pytest.mark.parametrize(
    ("used", "xbzrle", "merge"),
    [
        ((), False, False), (("xbzrle",), True, False), (("xbzrle-merge",), False, False),
        (("xbzrle", "xbzrle-merge"), True, True),
    ],
)  # fmt: skip
def test_merging_needs_both_names(used, xbzrle, merge):
    agreement = caps.Agreement(frozenset(used))
    assert (agreement.xbzrle, agreement.merge) == (xbzrle, merge)


def test_optional_capabilities_are_on_by_default():
    assert caps.switched_on({}) == caps.OPTIONAL
    assert caps.switched_on(dict.fromkeys(caps.OPTIONAL, False)) == frozenset()


@pytest.mark.parametrize("name", [caps.PROBE, caps.STREAM])
def test_every_destination_knows_probe_and_stream(name):
    offer = caps.offer(XBZRLE, frozenset({name}))
    assert offer.required == (*REQUIRED, name)
    answer, there = caps.answer(offer, frozenset())
    here = caps.agree(offer, answer)
    assert here == there
    assert (here.probe, here.stream) == (name == "probe", name == "stream")
    with pytest.raises(CapabilityError, match=f"the destination lacks capability '{name}'"):
        caps.agree(offer, hello(optional=XBZRLE))
    plain, agreed = caps.answer(caps.offer(XBZRLE), XBZRLE)
    assert name not in plain.required + plain.optional
    assert not agreed.probe
    assert not agreed.stream


@pytest.mark.parametrize("name", ["lz4", "page-hash-nh", ""])
def test_unknown_capability_switch_is_refused_with_the_known_ones(name):
    with pytest.raises(LocalError, match=f"no capability '{name}': known are xbzrle, xbzrle-merge"):
        caps.switched_on({name: True})


def test_unknown_optional_capability_is_dropped_and_reported():
    offer = hello(optional=("postcopy", "xbzrle"))
    answer, there = caps.answer(offer, caps.OPTIONAL)
    assert answer.optional == ("xbzrle",)
    assert there.dropped == {"postcopy"}
    assert caps.agree(offer, answer) == there


@pytest.mark.parametrize("optional", [caps.OPTIONAL, frozenset()])
def test_unknown_required_capability_is_refused_by_name(optional):
    with pytest.raises(CapabilityError, match="source requires capability 'postcopy'"):
        caps.answer(hello(required=(*REQUIRED, "postcopy")), optional)


def test_optional_capability_may_be_required_by_the_source():
    offer = hello(required=(*REQUIRED, "xbzrle"))
    answer, there = caps.answer(offer, XBZRLE)
    assert caps.agree(offer, answer) == there
    assert there.xbzrle
    with pytest.raises(CapabilityError, match="source requires capability 'xbzrle'"):
        caps.answer(offer, frozenset())


def test_required_capability_may_be_optional_at_the_peer():
    offer = hello(required=(), optional=REQUIRED)
    answer, there = caps.answer(offer, frozenset())
    assert there.used == caps.REQUIRED
    assert caps.agree(offer, answer) == there


@pytest.mark.parametrize("name", REQUIRED)
def test_source_without_required_capability_is_refused_by_name(name):
    with pytest.raises(CapabilityError, match=f"source lacks capability '{name}'"):
        caps.answer(hello(required=set(REQUIRED) - {name}), caps.OPTIONAL)


@pytest.mark.parametrize("name", REQUIRED)
def test_answer_without_required_capability_is_refused_by_name(name):
    with pytest.raises(CapabilityError, match=f"destination lacks capability '{name}'"):
        caps.agree(caps.offer(XBZRLE), hello(required=set(REQUIRED) - {name}))


@pytest.mark.parametrize("where", ["required", "optional"])
def test_answer_with_unoffered_capability_is_refused_by_name(where):
    lists = {"required": REQUIRED, "optional": ()}
    lists[where] = (*lists[where], "xbzrle")
    with pytest.raises(CapabilityError, match="wants capability 'xbzrle', which was not offered"):
        caps.agree(caps.offer(frozenset()), hello(**lists))


def test_answer_may_use_either_list():
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


def test_destination_with_small_max_body_is_refused():
    offer = caps.offer(frozenset())
    caps.agree(offer, hello(max_body=BATCH_BYTES))
    with pytest.raises(CapabilityError, match=f"takes batches of {BATCH_BYTES - 1} bytes"):
        caps.agree(offer, hello(max_body=BATCH_BYTES - 1))


def test_sparse_is_used_if_both_sides_know_it():
    """It has no switch. A peer without it is served as before."""
    assert caps.SPARSE not in caps.OPTIONAL
    sparse = frozenset({caps.SPARSE})
    for source, destination in itertools.product([XBZRLE, XBZRLE | sparse], repeat=2):
        offer = caps.offer(source)
        answer, there = caps.answer(offer, destination)
        here = caps.agree(offer, answer)
        assert here.sparse is there.sparse is bool(source & destination & sparse)
        assert here.xbzrle
