"""The parameters of a migration: checked, and which of them may change while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from migrate.errors import UsageError
from migrate.policy.downtime import Limits
from migrate.policy.throttle import CAPABILITY as AUTO_CONVERGE
from migrate.policy.throttle import ThrottleParameters
from proto import LocalError
from proto.wire import capabilities as caps
from proto.wire.messages import MAX_CHANNELS

# The powers of two that the protocol allows (MIN_PAGE_SIZE to MAX_PAGE_SIZE).
PAGE_SIZES = (1024, 2048, 4096, 8192, 16384)
DEFAULT_CACHE_SIZE = 64 << 20
DEFAULT_CACHE_MAX = 1 << 30
# Levels of zstd. Higher ones need windows that the protocol does not allow, and are slower than any
# link that needs them.
COMPRESS_LEVELS = range(-7, 20)
# QEMU's capability for events on its monitor; here only our own monitor sends them.
EVENTS = "events"
# Capabilities of this side alone; they are not offered to the destination.
LOCAL = (AUTO_CONVERGE, EVENTS)
# Parameters that may change while a migration runs; the others are agreed with the destination.
LIVE = ("cache_size", "cache_max", "limits", "throttle")


@dataclass(frozen=True)
class Parameters:
    """The parameters of a migration. Names are QEMU's; sizes in bytes, times in seconds.

    cache_max -- upper bound for a cache that finds its own size, starting from `cache_size`; 0: the
                 cache keeps its size
    compress_level -- the level of zstd, if it pays; None: whichever pays most

    Raises UsageError for an invalid value.
    """

    cache_size: int = DEFAULT_CACHE_SIZE
    page_size: int = 4096
    limits: Limits = field(default_factory=Limits)
    channels: int = 1
    capabilities: Mapping[str, bool] = field(default_factory=dict)
    cache_max: int = 0
    compress_level: int | None = None
    throttle: ThrottleParameters = field(default_factory=ThrottleParameters)

    @property
    def auto_converge(self) -> bool:
        """Whether a guest that does not converge is slowed; off by default."""
        return self.capabilities.get(AUTO_CONVERGE, False)

    @property
    def wire_switches(self) -> dict[str, bool]:
        """The capabilities that both sides have to agree on, as they are switched."""
        return {name: on for name, on in self.capabilities.items() if name not in LOCAL}

    @property
    def wire_capabilities(self) -> frozenset[str]:
        """The optional capabilities to offer. Raises LocalError for an unknown one."""
        return caps.switched_on(self.wire_switches)

    def check_change(self, other: Parameters) -> None:
        """Raise UsageError if a running migration cannot change to `other`."""
        for name in (one.name for one in fields(self)):
            if name not in LIVE and getattr(other, name) != getattr(self, name):
                raise UsageError(f"{name.replace('_', ' ')} cannot change during a migration")

    def __post_init__(self) -> None:
        if self.page_size not in PAGE_SIZES:
            raise UsageError(f"a page of {self.page_size} bytes: it is one of {PAGE_SIZES}")
        if self.cache_size < self.page_size or self.cache_size & (self.cache_size - 1):
            raise UsageError(
                f"a cache of {self.cache_size} bytes: it is a power of two of at least one page"
            )
        if self.cache_max and (self.cache_max < self.page_size or self.cache_max.bit_count() != 1):
            raise UsageError(
                f"a cache of at most {self.cache_max} bytes: it is a power of two of at least one "
                "page"
            )
        if self.compress_level is not None and self.compress_level not in COMPRESS_LEVELS:
            raise UsageError(
                f"a compress level of {self.compress_level}: it is {COMPRESS_LEVELS.start} to "
                f"{COMPRESS_LEVELS.stop - 1}"
            )
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise UsageError(f"{self.channels} channels: there can be 1 to {MAX_CHANNELS}")
        try:
            _ = self.wire_capabilities
        except LocalError as error:
            raise UsageError(str(error)) from None
