"""Addresses: the forms that are understood, on each side, and that they print as they are read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.address import Address, parse_address
from migrate.errors import UsageError


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
def test_where_to_connect(text, address):
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
def test_where_to_listen_may_leave_out_host_and_port(text, address):
    assert parse_address(text, listen=True) == address


@pytest.mark.parametrize(
    "text",
    ["", "4444", "host:4444", "tcp:", "tcp:host", "tcp:host:", "tcp::4444", "tcp:4444",
     "tcp:host:0", "tcp:host:65536", "tcp:host:-1", "tcp:host:http", "udp:host:1", "unix:",
     "unix://", "tcp:host:" + "9" * 5000, "tcp:////host:1", "tcp:[[::1]:1",
     "tcp:]:1", "tcp://host/x:1", "tcp:host..x:1", "tcp:" + "a" * 64 + ":1", "tcp:a\0b:1",
     "tcp:\ud800:1"],
)  # fmt: skip
def test_where_nobody_can_connect(text):
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
def test_a_path_that_no_socket_can_have_is_refused_before_the_system_is_asked(path, why):
    """It would connect to what stands before the NUL, or raise what nobody expects."""
    for listen in (False, True):
        with pytest.raises(UsageError, match=why):
            parse_address(f"unix:{path}", listen=listen)
    assert parse_address("unix:" + "x" * 107).path == "x" * 107


@pytest.mark.parametrize("text", ["", "host", "host:", "65536", "tcp:", "-1", "unix:", "4444/tcp"])
def test_where_nobody_can_listen(text):
    with pytest.raises(UsageError, match=r"write \[HOST:\]PORT or unix:PATH"):
        parse_address(text, listen=True)


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
def test_an_address_prints_as_it_is_read(address):
    assert parse_address(str(address)) == address
    assert parse_address(str(address), listen=True) == address


@settings(deadline=None)
@given(st.text(max_size=20), st.booleans())
def test_any_text_is_an_address_or_a_user_error(text, listen):
    try:
        address = parse_address(text, listen=listen)
    except UsageError:
        return
    assert address.path or 0 <= address.port <= 65535
