"""The mark on a file that was relinquished to a destination."""

import os

import pytest

from migrate.guests import moved_mark


@pytest.mark.parametrize("said", [b"[" * 2500, b'{"writers":[[1e999,""]],"commanded":false}'])
def test_malformed_mark_is_ignored(tmp_path, monkeypatch, said) -> None:
    monkeypatch.setattr(os, "getxattr", lambda _fd, _name: said)
    with (tmp_path / "guest").open("w") as guest:
        moved_mark.refuse_if_moved(guest.fileno(), "guest")
