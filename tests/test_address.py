"""Addresses: the accepted forms on each side, and their round trip through text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.errors import UsageError
from migrate.transport.address import Address, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp:host:4444", Address("host", 4444)),
        ("tcp://10.0.0.1:80", Address("10.0.0.1", 80)),
        ("tcp:[::1]:4444", Address("::1", 4444)),
        ("unix:/run/x.sock", Address(path="/run/x.sock")),
        ("unix:///run/x.sock", Address(path="/run/x.sock")),
        ("unix:here", Address(path="here")),
        ("unix:////run/x.sock", Address(path="//run/x.sock")),
    ],
)
def test_parse_connect_address(text, address):
    assert parse_address(text) == address
    assert parse_address(text, listen=True) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("4444", Address("", 4444)), ("0", Address("", 0)), (":4444", Address("", 4444)),
        ("127.0.0.1:0", Address("127.0.0.1", 0)), ("[::]:9", Address("::", 9)),
        ("tcp::4444", Address("", 4444)), ("tcp:4444", Address("", 4444)),
    ],
)  # fmt: skip
def test_listen_address_may_omit_host_and_port(text, address):
    assert parse_address(text, listen=True) == address


@pytest.mark.parametrize(
    "text",
    ["", "4444", "host:4444", "tcp:", "tcp:host", "tcp:host:", "tcp::4444", "tcp:4444",
     "tcp:host:0", "tcp:host:65536", "tcp:host:-1", "tcp:host:http", "udp:host:1", "unix:",
     "unix://", "tcp:host:" + "9" * 5000, "tcp:////host:1", "tcp:[[::1]:1",
     "tcp:]:1", "tcp://host/x:1", "tcp:host..x:1", "tcp:" + "a" * 64 + ":1", "tcp:a\0b:1",
     "tcp:\ud800:1"],
)  # fmt: skip
def test_invalid_connect_address_is_refused(text):
    with pytest.raises(UsageError, match="write tcp:HOST:PORT or unix:PATH"):
        parse_address(text)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("a\0b", "a path has no NUL byte"),
        ("\ud800", "cannot be written in the encoding of file names"),
        ("é" * 54, "no more than 107 bytes, this one has 108"),
    ],
)
def test_overlong_socket_path_is_refused_by_the_parser(path, why):
    """The system would use the part before a NUL, or raise an unexpected exception."""
    for listen in (False, True):
        with pytest.raises(UsageError, match=why):
            parse_address(f"unix:{path}", listen=listen)
    assert parse_address("unix:" + "x" * 107).path == "x" * 107


@pytest.mark.parametrize("text", ["", "host", "host:", "65536", "tcp:", "-1", "unix:", "4444/tcp"])
def test_invalid_listen_address_is_refused(text):
    with pytest.raises(UsageError, match=r"write \[HOST:\]PORT or unix:PATH"):
        parse_address(text, listen=True)


@pytest.mark.exhaustive
@settings(deadline=None)
@given(
    st.one_of(
        st.builds(
            Address,
            host=st.sampled_from(["localhost", "10.0.0.1", "::1", "fe80::1%eth0", "a-b.example"]),
            port=st.integers(1, 65535),
        ),
        st.builds(
            Address,
            path=st.text(
                st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=25
            ).filter(lambda path: path[:2] != "//"),
        ),
    )
)
def test_address_round_trips_through_text(address):
    assert parse_address(str(address)) == address
    assert parse_address(str(address), listen=True) == address


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tcp:fe80::1", r"in brackets: write tcp:\[fe80::1\]:PORT$"),
        ("tcp:fe80::1%eth0", r"in brackets: write tcp:\[fe80::1%eth0\]:PORT$"),
        ("tcp:::1:4444", r"write tcp:\[::1\]:4444 or tcp:\[::1:4444\]:PORT$"),
        ("tcp:1:2:3:4:5:6:7:8:99", r"write tcp:\[1:2:3:4:5:6:7:8\]:99$"),
        ("tcp:[::1]", r"names no port: write tcp:\[::1\]:PORT$"),
        ("tcp:[::1]4444", r"names no port: write tcp:\[::1\]:PORT$"),
        ("tcp:[::1]:", "names no port"),
        ("tcp:[::1:4444", "brackets are not in pairs"),
        ("tcp:::1]:4444", "brackets are not in pairs"),
        ("tcp:[::1]]:4444", "brackets are not in pairs"),
        ("tcp:host[1]:4444", "brackets are not in pairs, or not at its beginning"),
        ("tcp:[]:4444", "nothing in its brackets"),
        ("tcp:[a:b]:4444", "a:b is no IPv6 address"),
        ("tcp:[fe80::1%]:4444", "fe80::1% is no IPv6 address"),
        ("tcp:a:b:4444", "too many colons"),
        ("tcp:ho st:4444", "there is a blank in it"),
        ("tcp:host :4444", "there is a blank in it"),
        ("tcp:host: 4444", "there is a blank in it"),
        ("tcp:host:٤", "is no port"),
        ("tcp:ho\x1bst:1", "is no name of a host"),
    ],
)
def test_invalid_address_is_explained(text, why):
    with pytest.raises(UsageError, match=why):
        parse_address(text)
    with pytest.raises(UsageError, match=why.replace("tcp:", "")):
        parse_address(text, listen=True)
    with pytest.raises(UsageError, match=why.replace("tcp:", "")):
        parse_address(text.removeprefix("tcp:"), listen=True)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (" tcp:host:4444 ", Address("host", 4444)),
        ("tcp:[fe80::1%eth0]:4444\n", Address("fe80::1%eth0", 4444)),
        ("\ttcp:[::ffff:10.0.0.1]:4444", Address("::ffff:10.0.0.1", 4444)),
        (" unix:/run/x y ", Address(path="/run/x y ")),
        ("tcp:[host]:4444", Address("host", 4444)),
    ],
)
def test_blanks_around_an_address_are_ignored(text, address):
    assert parse_address(text) == address
    assert parse_address(text, listen=True) == address


HOSTS = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
    st.builds("{}%{}".format, st.ip_addresses(v=6), st.sampled_from(["eth0", "br-1", "2", "a.b"])),
    st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z]{1,10})?", fullmatch=True),
)


@settings(deadline=None)
@given(HOSTS, st.integers(1, 65535), st.sampled_from(["", " ", "\n"]), st.booleans())
def test_any_host_and_port_round_trips(host, port, blank, listen):
    address = Address(host, port)
    assert parse_address(f"{blank}{address}{blank}", listen=listen) == address
    if listen:
        assert parse_address(str(address).removeprefix("tcp:"), listen=True) == address


@settings(deadline=None)
@given(st.ip_addresses(v=6), st.one_of(st.just(""), st.integers(0, 70000).map(":{}".format)))
def test_ipv6_without_brackets_is_never_misread(host, port):
    for listen in (False, True):
        with pytest.raises(UsageError, match="in brackets|too many colons"):
            parse_address(f"tcp:{host}{port}", listen=listen)


@settings(deadline=None)
@given(st.text(max_size=20), st.booleans())
def test_any_text_is_an_address_or_a_usage_error(text, listen):
    try:
        address = parse_address(text, listen=listen)
    except UsageError:
        return
    assert address.path or 0 <= address.port <= 65535
