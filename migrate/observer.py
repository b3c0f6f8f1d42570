"""Calls the observer of a migration: what it raises changes nothing for the guest.

An observer shows a migration to a person or a program. It is called between the steps of the
hand-over, where an exception would pass for a failure of that step, with the guest paused or given
up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Watched(Generic[T]):
    """An observer that can be called anywhere: this never raises.

    An Exception is logged, the first one of each observer. SystemExit and the like are kept in
    `leaving`, and `leave` is called: the migration raises it when it is known whose the guest is.
    """

    def __init__(
        self, observer: Callable[[str, T], None] | None, leave: Callable[[], None]
    ) -> None:  # fmt: skip
        self._observer = observer
        self._leave = leave
        self._failed = False
        self.leaving: BaseException | None = None

    def __call__(self, event: str, news: T) -> None:
        if self._observer is None:
            return
        try:
            self._observer(event, news)
        except Exception:
            if not self._failed:
                self._failed = True
                logger.exception("the observer of a migration raised; the migration goes on")
        except BaseException as error:
            self.leaving = self.leaving or error
            self._leave()

    def raise_leaving(self) -> None:
        """Raise what the observer wanted to leave with, if it did."""
        if self.leaving is not None:
            raise self.leaving

    def close(self) -> None:
        """Nothing more is to be told: refers to nobody any more."""
        self._observer = None
        self._leave = lambda: None
