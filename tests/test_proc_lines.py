"""Lines of /proc that hold names which users choose, with characters that forge lines elsewhere."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

import pytest

from migrate.files.mounts import Mount, parse_mount
from migrate.guests.guest_file import GuestFile
from migrate.runtime import proc_lines as module
from migrate.runtime import processes
from migrate.runtime.proc_lines import proc_lines

# Python ends lines at these, and the kernel does not.
BREAKS = ["\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028"]


def test_lines_end_at_newlines_only(tmp_path):
    file = tmp_path / "file"
    for text, lines in ((b"", []), (b"\n", [b""]), (b"a\rb\fc\n\nd", [b"a\rb\fc", b"", b"d"])):
        file.write_bytes(text)
        assert proc_lines(str(file)) == lines


def test_length_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 1 << 10)
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 10))
    assert proc_lines(str(file)) == [bytes(1 << 10)]
    with pytest.raises(OSError, match="too large"):
        proc_lines("/dev/zero")


@pytest.mark.parametrize("end", BREAKS)
def test_name_of_a_mapped_file_forges_no_mapping(tmp_path, end):
    """Any user could make himself a writer of a guest that he may not even read."""
    guest = tmp_path / "guest"
    guest.write_bytes(bytes(mmap.PAGESIZE))
    status = guest.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    forged = f"7f0000000000-7f0000001000 rw-s 00000000 {device} {status.st_ino} y"
    other = tmp_path / f"x{end}{forged}"
    other.write_bytes(bytes(mmap.PAGESIZE))
    with open(guest, "rb") as file, open(other, "r+b") as mapped, mmap.mmap(mapped.fileno(), 0):
        assert not GuestFile(file.fileno()).mapped_in("/proc/self")
    with open(guest, "r+b") as file, mmap.mmap(file.fileno(), 0):
        assert GuestFile(file.fileno()).mapped_in("/proc/self")


@pytest.mark.parametrize("links", [True, False])
def test_mapping_without_a_link_is_read_again(tmp_path, monkeypatch, links):
    """mprotect(2) divides a mapping between the two looks; some kernels have no map_files."""
    guest = tmp_path / "guest"
    guest.write_bytes(bytes(2 * mmap.PAGESIZE))
    looks = 0

    def changes(file: GuestFile, link: str) -> bool:
        nonlocal looks
        looks += 1
        if looks == 1 or not links:
            raise FileNotFoundError(link)
        return file.matches(os.stat(link))

    monkeypatch.setattr(GuestFile, "is_at", changes)
    with open(guest, "r+b") as file, mmap.mmap(file.fileno(), 0):
        assert GuestFile(file.fileno()).mapped_in("/proc/self")
    assert looks == 2
    with open(guest, "r+b") as file:
        assert not GuestFile(file.fileno()).mapped_in("/proc/self")


@pytest.mark.parametrize("end", BREAKS)
def test_name_of_a_cgroup_freezes_nothing(tmp_path, monkeypatch, end):
    """A writer that seems frozen is not stopped, and its writes would be lost."""
    frozen = tmp_path / "freezer" / "frozen"
    frozen.mkdir(parents=True)
    (frozen / "freezer.state").write_text("FROZEN\n")
    monkeypatch.setattr(processes, "FREEZER", str(tmp_path))
    shown = b""
    read = processes.proc_lines
    monkeypatch.setattr(
        processes, "proc_lines",
        lambda path: shown.split(b"\n") if path == "/proc/1/cgroup" else read(path),
    )  # fmt: skip
    shown = os.fsencode(f"6:freezer:/his/a{end}9:freezer:/frozen")
    assert not processes.is_frozen(1)
    shown = b"3:cpu:/\n6:freezer:/frozen"
    assert processes.is_frozen(1)


@pytest.mark.parametrize("end", BREAKS)
def test_name_of_a_program_forges_no_field(end):
    libc, name = ctypes.CDLL(None), ctypes.create_string_buffer(16)
    libc.prctl(16, name, 0, 0, 0)  # PR_GET_NAME
    libc.prctl(15, os.fsencode(f"x{end}No:\t1"), 0, 0, 0)  # PR_SET_NAME, of this thread
    try:
        found = processes.status(threading.get_native_id())
        state = processes.state(threading.get_native_id())
    finally:
        libc.prctl(15, name, 0, 0, 0)
    assert found["Name"].startswith("x")
    assert "No" not in found
    assert state == "R"


@pytest.mark.parametrize("end", BREAKS)
def test_names_of_a_mount_forge_no_words(end):
    name = os.fsencode(f"/mnt{end}1{end}/dev/sda")
    line = b"67 62 0:39 / %b rw - fuse.%b %b rw" % (name, name[1:], name)
    text = os.fsdecode(name)
    assert parse_mount(line) == Mount(67, "0:39", text, ["rw"], f"fuse.{text[1:]}", text, ["rw"])


def test_mount_with_a_type_that_is_no_text():
    assert parse_mount(b"67 62 0:39 / /mnt rw - fuse.\xff x rw").kind == "fuse.\udcff"


@pytest.mark.parametrize(
    ("device", "kind", "found"),
    [
        ("7:3", "ext4", (7, 3)),
        ("7:3", "fuseblk", (7, 3)),
        ("0:39", "fuse.sshfs", (0, 0)),
        ("0:39", "fuse", (0, 0)),
        ("0:39", "tmpfs", (0, 0)),
        ("0:39", "btrfs", (7, 5)),
    ],
)
def test_source_of_a_mount_is_believed_of_certain_types_only(monkeypatch, device, kind, found):
    """With fusermount3 any user mounts a file system that says it is on the guest's device."""
    block = os.stat_result((0o60600, 1, 1, 1, 0, 0, 0, 0, 0, 0), {"st_rdev": os.makedev(7, 5)})
    stat = os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, **more: block if path == "/dev/guest" else stat(path, **more)
    )
    mount = Mount(67, device, "/mnt", ["rw"], kind, "/dev/guest", ["rw"])
    assert mount.block_device == found
