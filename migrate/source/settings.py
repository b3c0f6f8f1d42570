"""The parameters in force at a source, which may change while the migration runs.

user, monitor --change, set_cache_size--> Settings <--request_cache-- destination's CACHE_SIZE
                                             |
                         rate limit, SizedCache, limits of the policy
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from migrate.policy.parameters import Parameters
from migrate.source.cache_size import SizedCache, default_cache_max
from migrate.transport.rate_limit import RateLimit
from migrate.units import option_size

# A destination that asks for a cache size more often than this is no longer heard: each change
# costs the worker a resize.
MAX_CACHE_REQUESTS = 100
# Refused requests are reported to the user this many times.
MAX_REFUSALS_TOLD = 3


class Settings:
    """The parameters of one migration, and what depends on them.

    size   -- bytes of guest memory
    limit  -- the rate limit that all channels share
    notify -- called with a sentence for the user
    pages  -- the number of pages of the guest
    """

    def __init__(
        self, size: int, parameters: Parameters, limit: RateLimit, notify: Callable[[str], None]
    ) -> None:
        page_size = parameters.page_size
        self.parameters = parameters
        self.pages = -(-size // page_size)
        self.cache = SizedCache(self.pages * page_size, page_size, parameters.cache_size)
        self._limit = limit
        self._notify = notify
        self._requests = self._refusals_told = 0
        limit.rate = parameters.limits.max_bandwidth

    def change(self, parameters: Parameters) -> None:
        """Take other parameters; they hold from the next batch on, or from the end of the round.

        Raises UsageError for a change of what was agreed with the destination.
        """
        ours = self.parameters
        ours.check_change(parameters)
        self.parameters = parameters
        self._limit.rate = parameters.limits.max_bandwidth
        if (parameters.cache_size, parameters.cache_max) != (ours.cache_size, ours.cache_max):
            self.set_cache_size(parameters.cache_size)

    def set_cache_size(self, size: int) -> None:
        """Have another cache size, in bytes, as soon as the worker gets to it."""
        if refusal := self.cache.ask(size):
            self._notify(refusal)
        else:
            self.parameters = replace(self.parameters, cache_size=size, cache_max=0)

    def request_cache(self, size: int) -> None:
        """Take a request of the destination for a cache size, within bounds.

        The source owns the cache, and its memory; a request beyond the bounds is refused.
        """
        self._requests += 1
        most = max(self.parameters.cache_size, self.parameters.cache_max, default_cache_max())
        if self._requests > MAX_CACHE_REQUESTS:
            if self._requests == MAX_CACHE_REQUESTS + 1:
                self._notify(
                    f"the destination has asked for another cache {MAX_CACHE_REQUESTS} times: no "
                    "more of that is heard"
                )
        elif size <= most:
            self.set_cache_size(size)
        elif self._refusals_told < MAX_REFUSALS_TOLD:
            self._refusals_told += 1
            self._notify(
                f"the destination asks for a cache of {option_size(size)}: no more than "
                f"{option_size(most)} is given for the asking: --cache-size here sets it"
            )
