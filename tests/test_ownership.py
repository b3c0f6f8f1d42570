"""Never two owners: the table of proto/wire/ownership.py, and spin's exhaustive check of it."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Set
from pathlib import Path

import pytest

from proto.wire.ownership import ANSWERS, FINAL, MAY_RUN, TABLE, Claim, Event, after
from proto.wire.session import Role
from tests.requirements import need

MODEL = Path(__file__).parent / "model" / "ownership.pml"
S, D = Role.SOURCE, Role.DESTINATION

# What a person decides is on that person's own head: no model can promise anything of it.
BY_HAND = {Event.KEEP_SOURCE, Event.KEEP_DESTINATION}
# When the model's side meets an event.
WHEN = {
    Event.VERIFIED: "!abandoned && !journal_lost",
    Event.READY: "heard(READY) && !source_runs && !abandoned",
    Event.GO: "heard(GO)",
    Event.CALLED_OFF: "!said_GO",
    Event.RUNNING: "heard(RUNNING)",
    Event.NOT_STARTED: {S: "heard(NOT_STARTED)", D: "cannot_start && !destination_runs"},
    Event.GIVE_UP: "true",
    **{event: f"heard({event.name})" for event in ANSWERS.values()},
}


def moves(role: Role, table: dict[tuple[Claim, Event], Claim]) -> str:
    """The table as choices of the model's process."""
    lines = []
    for (claim, event), following in table.items():
        if event in BY_HAND or following is claim:
            continue
        when = WHEN[event]
        condition = when[role] if isinstance(when, dict) else when
        lines.append(
            f":: atomic {{ {role.value} == {claim.name} && {condition} -> "
            f"{role.value} = {following.name} }}"
        )
    return " ".join(lines)


def one_of(role: Role, claims: Set[Claim]) -> str:
    return f"({' || '.join(f'{role.value} == {claim.name}' for claim in sorted(claims))})"


def check(
    directory: Path, claim: str, *defines: str, table: dict = TABLE, may_run: dict = MAY_RUN
) -> tuple[bool, int]:
    """(whether the claim holds in every state that can be reached, how many there are)"""
    for program in ("spin", "gcc"):
        need(shutil.which(program), f"the model needs {program}")
    text = MODEL.read_text()
    for role in Role:
        name = role.value.upper()
        text = re.sub(rf"^ *{name}_MOVES$", moves(role, table[role]), text, flags=re.M)
        text = text.replace(f"{name}_MAY_RUN", one_of(role, may_run[role]))
    (directory / "model.pml").write_text(text)
    subprocess.run(
        ["spin", *(f"-D{one}" for one in defines), "-a", "model.pml"],
        cwd=directory, check=True, capture_output=True,
    )  # fmt: skip
    # NFAIR: weak fairness for the three processes; liveness needs it, and safety does not mind
    subprocess.run(
        ["gcc", "-O1", "-DNFAIR=4", "-w", "-o", "pan", "pan.c"], cwd=directory, check=True
    )
    done = subprocess.run(
        ["./pan", "-a", "-f", "-m100000", "-N", claim], cwd=directory, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "error: max search depth too small" not in done.stdout
    errors = re.search(r"errors: (\d+)", done.stdout)
    states = re.search(r"(\d+) states, stored", done.stdout)
    assert errors is not None, done.stdout
    assert states is not None, done.stdout
    return errors[1] == "0", int(states[1])


STARTS, JOURNALS = "STARTS_CAN_FAIL", "JOURNALS_GET_LOST"
FAULTS = [(), (STARTS,), (JOURNALS,), (STARTS, JOURNALS)]


@pytest.mark.programs
@pytest.mark.parametrize("faults", FAULTS)
def test_never_two_owners_in_any_state_that_can_be_reached(tmp_path, faults) -> None:
    """Whatever is lost, delayed, doubled or killed, a lost journal among it."""
    holds, states = check(tmp_path, "never_two", *faults)
    assert holds
    assert states > 50


@pytest.mark.programs
@pytest.mark.parametrize("faults", FAULTS[:2])
def test_exactly_one_owner_once_both_sides_can_talk(tmp_path, faults) -> None:
    holds, _ = check(tmp_path, "at_last_one", *faults)
    assert holds


WRONG_MOVES = {
    "a destination that starts without GO": (D, (Claim.PREPARED, Event.GIVE_UP), Claim.OWNER),
    "a destination that forgets that it gave up": (D, (Claim.ABORTED, Event.GO), Claim.OWNER),
    "a source that takes PREPARED for a refusal": (
        S, (Claim.COMMITTED, Event.SAYS_PREPARED), Claim.ABORTED,
    ),
    "a source that takes no record for a refusal": (
        S, (Claim.COMMITTED, Event.SAYS_NONE), Claim.ABORTED,
    ),
    "a source that gives up for good where it should ask": (
        S, (Claim.COMMITTED, Event.SAYS_ABORTED), Claim.DONE,
    ),
}  # fmt: skip
WRONG_RIGHTS = {
    "a source that goes on though it has committed": (S, Claim.COMMITTED),
    "a destination that does not wait for GO": (D, Claim.PREPARED),
    "a destination that runs what it gave up": (D, Claim.ABORTED),
}


@pytest.mark.programs
@pytest.mark.parametrize("wrong", WRONG_MOVES)
def test_model_rejects_a_wrong_move(tmp_path, wrong) -> None:
    """A check that cannot fail is none: each of these tables lets two run, or loses the guest."""
    role, key, following = WRONG_MOVES[wrong]
    table = {**TABLE, role: {**TABLE[role], key: following}}
    safe, _ = check(tmp_path, "never_two", "JOURNALS_GET_LOST", table=table)
    live, _ = check(tmp_path, "at_last_one", table=table)
    assert not (safe and live)


@pytest.mark.programs
def test_model_rejects_taking_go_back(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(WHEN, Event.CALLED_OFF, "true")
    assert not check(tmp_path, "never_two")[0]


@pytest.mark.programs
@pytest.mark.parametrize("wrong", WRONG_RIGHTS)
def test_model_rejects_a_wrong_right_to_run(tmp_path, wrong) -> None:
    role, claim = WRONG_RIGHTS[wrong]
    may_run = {**MAY_RUN, role: MAY_RUN[role] | {claim}}
    assert not check(tmp_path, "never_two", may_run=may_run)[0]


def test_ownership_table_is_consistent() -> None:
    for role, claim, event in itertools.product(Role, Claim, Event):
        following = after(role, claim, event)
        if following is None:
            continue
        # Nothing that was final changes; and who may not run the guest gets to only by an answer
        # or a message of the other side, or by a person; or has not let the other side run it.
        assert claim not in FINAL
        if following in MAY_RUN[role] and claim not in MAY_RUN[role]:
            assert event in BY_HAND | {
                Event.GO, Event.NOT_STARTED, Event.SAYS_ABORTED, Event.CALLED_OFF
            }  # fmt: skip
    assert {claim for claim in Claim if claim in ANSWERS} == {
        claim for claim in Claim if claim not in (Claim.COMMITTED, Claim.DONE)
    }  # fmt: skip
