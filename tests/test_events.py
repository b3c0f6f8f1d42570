"""Events are typed, and equal to the strings that programs compare them with."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

import migrate
from migrate.events import DestinationEvent, Notice, SourceEvent
from migrate.statistics import Statistics, Status, query_migrate


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (SourceEvent.STATUS, "status"),
        (SourceEvent.ROUND_BEGUN, "pass"),
        (SourceEvent.ROUND_DONE, "round"),
        (SourceEvent.PAUSED, "paused"),
        (SourceEvent.RESUMED, "resumed"),
        (DestinationEvent.RETURNED, "back"),
        (Status.COMPLETED, "completed"),
        (Notice("a sentence"), "notice: a sentence"),
    ],
)
def test_event_equals_its_documented_string(event: str, text: str) -> None:
    assert event == text
    assert hash(event) == hash(text)
    assert f"{event}" == str(event) == text
    assert json.loads(json.dumps(event)) == text


def test_notice_gives_its_text() -> None:
    notice = Notice("notice: twice")
    assert notice.startswith("notice: ")
    assert notice.text == "notice: twice"


def test_notice_survives_a_copy() -> None:
    for one in (copy.deepcopy(Notice("x")), pickle.loads(pickle.dumps(Notice("x")))):
        assert isinstance(one, Notice)
        assert one.text == "x"


def test_status_is_printed_as_its_name() -> None:
    failed = Statistics(status=Status.FAILED)
    assert json.dumps(query_migrate(failed)["status"]) == '"failed"'


def test_package_has_the_types() -> None:
    assert migrate.SourceEvent is SourceEvent
    assert migrate.Notice is Notice
    assert migrate.Status is Status
