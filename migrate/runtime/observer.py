"""Call the observer of a migration. What it raises changes nothing for the guest.

An observer shows a migration to an operator or a program. It is called between the steps of the
hand-over, with the guest paused or relinquished: its exception must not pass for a failed step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

EventT = TypeVar("EventT", bound=str)
NewsT = TypeVar("NewsT")
logger = logging.getLogger(__name__)


class SafeObserver(Generic[EventT, NewsT]):
    """An observer that may be called anywhere: calling it never raises.

    The first Exception of an observer is logged. SystemExit and the like are kept, and `on_exit` is
    called; the migration raises them (`raise_exit`) once the owner of the guest is known.
    """

    def __init__(
        self, observer: Callable[[EventT, NewsT], None] | None, on_exit: Callable[[], None]
    ) -> None:
        self._observer = observer
        self._on_exit = on_exit
        self._failed = False
        self._exit: BaseException | None = None

    def __call__(self, event: EventT, news: NewsT) -> None:
        if self._observer is None:
            return
        try:
            self._observer(event, news)
        except Exception:
            if not self._failed:
                self._failed = True
                logger.exception("the observer of a migration raised; the migration goes on")
        except BaseException as error:
            self._exit = self._exit or error
            self._on_exit()

    def raise_exit(self) -> None:
        """Raise the SystemExit or the like that the observer raised, if it did."""
        if self._exit is not None:
            raise self._exit

    def close(self) -> None:
        """Drop the references to the observer and the migration: there is no more news."""
        self._observer = None
        self._on_exit = lambda: None
