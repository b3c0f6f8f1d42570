"""The numbers of one migration, and how they are printed.

`info_migrate` prints the seed's lines, in its order and with its meaning, and after them those that
QEMU has added since. `query_migrate` uses QEMU's QMP names. QEMU's own numbers are not always what
their names say (counters that are never reset, deltas without their headers, skipped pages counted
as sent). Here they are:

    transferred           all bytes written to the socket, with framing and control messages
    multifd bytes         those of them that went over channels other than the first
    duplicate             pages sent as zero
    normal                pages sent whole
    xbzrle pages          pages sent as deltas
    throughput            of the current round; at the end, of the whole migration without its setup
    skipped               pages that were dirty but equal to what the peer has: they cost nothing
    cache miss            pages sent before whose old content was not in the cache
    compression busy      batches that their sender has waited for while they were compressed
    compression rate      bytes of batches before, per byte after compression; QEMU counts pages
    overflow skipped      pages sent whole without an attempt, because their last deltas overflowed
    cpu throttle highest  the highest throttle: the current percentage is 0 in the end
    xbzrle active         whether deltas are made: they are switched off if they cost more than they
                          save
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

KIB = 1024


class Status(StrEnum):
    """The state of a migration, by QEMU's names."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    DEVICE = "device"
    """The guest is stopped for the last round, or about to be."""
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


OVER = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})


@dataclass(frozen=True)
class Statistics:
    """A snapshot of the numbers. Times are in seconds, sizes in bytes, counts in pages."""

    status: Status = Status.NONE
    capabilities: dict[str, bool] = field(default_factory=dict)
    error: str = ""
    total_time: float = 0.0
    setup_time: float = 0.0
    downtime: float | None = None
    expected_downtime: float | None = None
    downtime_aim: float | None = None
    tracking: str = ""
    tracking_time: float = 0.0
    transferred: int = 0
    remaining: int = 0
    total: int = 0
    duplicate: int = 0
    normal: int = 0
    skipped: int = 0
    page_size: int = 4096
    dirty_sync_count: int = 0
    dirty_pages_rate: float = 0.0
    pages_per_second: float = 0.0
    mbps: float = 0.0
    precopy_bytes: int = 0
    downtime_bytes: int = 0
    cache_size: int = 0
    xbzrle_bytes: int = 0
    xbzrle_pages: int = 0
    cache_hits: int = 0
    cache_miss: int = 0
    overflow: int = 0
    overflow_skipped: int = 0
    xbzrle_active: bool = True
    evictions: int = 0
    compression_pages: int = 0
    compression_batches: int = 0
    compression_busy: int = 0
    compressed_size: int = 0
    compressed_content: int = 0
    channels: int = 1
    channel_bytes: int = 0
    reconnects: int = 0
    advice: tuple[str, ...] = ()
    cpu_throttle_percentage: int = 0
    cpu_throttle_highest: int = 0

    @property
    def cache_miss_rate(self) -> float:
        looked_up = self.cache_hits + self.cache_miss
        return self.cache_miss / looked_up if looked_up else 0.0

    @property
    def encoding_rate(self) -> float:
        """Bytes of encoded pages per byte of delta."""
        return self.xbzrle_pages * self.page_size / self.xbzrle_bytes if self.xbzrle_bytes else 0.0

    @property
    def xbzrle(self) -> bool:
        return self.capabilities.get("xbzrle", False)

    @property
    def compression_busy_rate(self) -> float:
        batches = self.compression_batches
        return self.compression_busy / batches if batches else 0.0

    @property
    def compression_saved(self) -> int:
        """Bytes that compression has saved."""
        return self.compressed_content - self.compressed_size

    @property
    def compression_rate(self) -> float:
        """Bytes of batches per byte that they were compressed to."""
        size = self.compressed_size
        return self.compressed_content / size if size else 0.0

    def with_(self, **changes: Any) -> Statistics:
        return replace(self, **changes)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def status_line(s: Statistics) -> str:
    return f"Migration status: {s.status}" + (f" ({s.error})" if s.error else "")


def info_migrate(s: Statistics) -> str:
    """Return the seed's `info migrate`, followed by QEMU's later lines."""
    switches = " ".join(f"{name}: {'on' if on else 'off'}" for name, on in s.capabilities.items())
    lines = [
        f"capabilities: {switches}",
        status_line(s),
        f"transferred ram: {s.transferred // KIB} kbytes",
        f"remaining ram: {s.remaining // KIB} kbytes",
        f"total ram: {s.total // KIB} kbytes",
        f"total time: {_milliseconds(s.total_time)} milliseconds",
        f"duplicate: {s.duplicate} pages",
        f"normal: {s.normal} pages",
        f"normal bytes: {s.normal * s.page_size // KIB} kbytes",
    ]
    if s.xbzrle:
        lines += [
            f"cache size: {s.cache_size} bytes",
            f"xbzrle transferred: {s.xbzrle_bytes // KIB} kbytes",
            f"xbzrle pages: {s.xbzrle_pages} pages",
            f"xbzrle cache miss: {s.cache_miss}",
            f"xbzrle overflow : {s.overflow}",
        ]
    if s.downtime is not None:
        lines.append(f"downtime: {_milliseconds(s.downtime)} milliseconds")
    if s.expected_downtime is not None:
        lines.append(f"expected downtime: {_milliseconds(s.expected_downtime)} milliseconds")
    if s.downtime_aim is not None:
        lines.append(f"downtime aim: {_milliseconds(s.downtime_aim)} milliseconds")
    if s.tracking:
        lines.append(f"dirty tracking: {s.tracking}, {s.tracking_time * 1e3:.1f} milliseconds")
    lines += [
        f"setup: {_milliseconds(s.setup_time)} milliseconds",
        f"throughput: {s.mbps:.2f} mbps",
        f"skipped: {s.skipped} pages",
        f"dirty sync count: {s.dirty_sync_count}",
        f"page size: {s.page_size // KIB} kbytes",
        f"pages-per-second: {s.pages_per_second:.0f}",
        f"dirty pages rate: {s.dirty_pages_rate:.0f} pages",
        f"precopy ram: {s.precopy_bytes // KIB} kbytes",
        f"downtime ram: {s.downtime_bytes // KIB} kbytes",
    ]
    if s.xbzrle:
        lines += [
            f"xbzrle cache miss rate: {s.cache_miss_rate:.2f}",
            f"xbzrle encoding rate: {s.encoding_rate:.2f}",
            f"xbzrle cache evictions: {s.evictions}",
            f"xbzrle overflow skipped: {s.overflow_skipped} pages",
            f"xbzrle active: {'on' if s.xbzrle_active else 'off'}",
        ]
    if s.compression_pages:
        lines += [
            f"compression pages: {s.compression_pages} pages",
            f"compression busy: {s.compression_busy}",
            f"compression busy rate: {s.compression_busy_rate:.2f}",
            f"compressed size: {s.compressed_size // KIB} kbytes",
            f"compression rate: {s.compression_rate:.2f}",
        ]
    if s.cpu_throttle_percentage:
        lines.append(f"cpu throttle percentage: {s.cpu_throttle_percentage}")
    if s.reconnects:
        lines.append(f"reconnects: {s.reconnects}")
    if s.channels > 1:
        lines += [f"channels: {s.channels}", f"multifd bytes: {s.channel_bytes // KIB} kbytes"]
    return "\n".join(lines)


def _size(count: float) -> str:
    """Return a size as QEMU prints it, with three digits: 64.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            break
        count /= KIB
    return f"{count:.3g} {unit}"


def info_migrate_all(s: Statistics) -> str:
    """Return `info migrate -a` in the layout of QEMU 10.1, which has dropped the seed's."""
    down = "" if s.expected_downtime is None else f", exp_down={_milliseconds(s.expected_downtime)}"
    if s.downtime is not None:
        down = f", down={_milliseconds(s.downtime)}"
    dirty = f", dirty={s.dirty_pages_rate:.0f}" if s.dirty_pages_rate else ""
    lines = [
        f"Status: \t\t{status_line(s).partition(': ')[2]}",
        f"Time (ms): \t\ttotal={_milliseconds(s.total_time)}, setup={_milliseconds(s.setup_time)}"
        f"{down}",
        "RAM info:",
        f"  Throughput (Mbps): \t{s.mbps:.2f}",
        f"  Sizes: \t\tpagesize={_size(s.page_size)}, total={_size(s.total)}",
        f"  Transfers: \t\ttransferred={_size(s.transferred)}, remain={_size(s.remaining)}",
        f"    Channels: \t\tprecopy={_size(s.precopy_bytes)}, multifd={_size(s.channel_bytes)}, "
        "postcopy=0 B",
        f"    Page Types: \tnormal={s.normal}, zero={s.duplicate}",
        f"  Page Rates (pps): \ttransfer={s.pages_per_second:.0f}{dirty}",
        f"  Others: \t\tdirty_syncs={s.dirty_sync_count}, downtime_bytes={s.downtime_bytes}",
    ]
    if s.xbzrle:
        lines += [
            f"XBZRLE: size={s.cache_size}, transferred={s.xbzrle_bytes}, pages={s.xbzrle_pages}, "
            f"miss={s.cache_miss}",
            f"  miss_rate={s.cache_miss_rate:.2f}, encode_rate={s.encoding_rate:.2f}, "
            f"overflow={s.overflow}",
        ]
    if s.cpu_throttle_percentage:
        lines.append(f"CPU Throttle (%): {s.cpu_throttle_percentage}")
    return "\n".join(lines)


def query_migrate(s: Statistics) -> dict[str, Any]:
    """Return an object with the field names of QMP's query-migrate (MigrationInfo)."""
    if s.status is Status.NONE:
        return {}
    result: dict[str, Any] = {
        "status": s.status,
        "total-time": _milliseconds(s.total_time),
        "setup-time": _milliseconds(s.setup_time),
    }
    if s.downtime is not None:
        result["downtime"] = _milliseconds(s.downtime)
    if s.expected_downtime is not None:
        result["expected-downtime"] = _milliseconds(s.expected_downtime)
    if s.downtime_aim is not None:
        result["downtime-aim"] = _milliseconds(s.downtime_aim)
    if s.tracking:
        result["dirty-tracking"] = s.tracking
        result["dirty-tracking-time"] = round(s.tracking_time * 1e3, 3)
    result["ram"] = {
        "transferred": s.transferred,
        "remaining": s.remaining,
        "total": s.total,
        "duplicate": s.duplicate,
        "skipped": s.skipped,
        "normal": s.normal,
        "normal-bytes": s.normal * s.page_size,
        "dirty-pages-rate": round(s.dirty_pages_rate),
        "mbps": round(s.mbps, 3),
        "dirty-sync-count": s.dirty_sync_count,
        "page-size": s.page_size,
        "pages-per-second": round(s.pages_per_second),
        "precopy-bytes": s.precopy_bytes,
        "downtime-bytes": s.downtime_bytes,
        "multifd-bytes": s.channel_bytes,
    }
    if s.xbzrle:
        result["xbzrle-cache"] = {
            "cache-size": s.cache_size,
            "bytes": s.xbzrle_bytes,
            "pages": s.xbzrle_pages,
            "cache-miss": s.cache_miss,
            "cache-miss-rate": round(s.cache_miss_rate, 6),
            "encoding-rate": round(s.encoding_rate, 3),
            "overflow": s.overflow,
            "overflow-skipped": s.overflow_skipped,
            "xbzrle-active": s.xbzrle_active,
        }
    if s.compression_pages:
        result["compression"] = {
            "pages": s.compression_pages,
            "busy": s.compression_busy,
            "busy-rate": round(s.compression_busy_rate, 3),
            "compressed-size": s.compressed_size,
            "compression-rate": round(s.compression_rate, 3),
        }
    if s.cpu_throttle_percentage:
        result["cpu-throttle-percentage"] = s.cpu_throttle_percentage
    if s.cpu_throttle_highest:
        result["cpu-throttle-highest"] = s.cpu_throttle_highest
    if s.reconnects:
        result["reconnects"] = s.reconnects
    if s.advice:
        result["advice"] = list(s.advice)
    if s.error:
        result["error-desc"] = s.error
    return result
