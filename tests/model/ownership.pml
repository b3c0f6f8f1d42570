/* The hand-over, for spin to check exhaustively. The moves of both sides, SOURCE_MOVES and
 * DESTINATION_MOVES, are written by tests/test_ownership.py from the table of proto/ownership.py,
 * as are the sets SOURCE_MAY_RUN and DESTINATION_MAY_RUN: so what is checked is the code's table.
 *
 * The network is as bad as can be: a message that was once said can be heard never, once, or any
 * number of times, at any time later, in any order. Either side can die between any two steps, and
 * comes back with what it has written and nothing else. Dying changes no claim, so it needs no
 * step here: all that a side remembers beside its claim is `paused` and `given_up`, and those may
 * change at any time before the commit.
 */

#define NONE 0
#define PREPARED 1
#define COMMITTED 2
#define OWNER 3
#define DONE 4
#define ABORTED 5

byte source = NONE, destination = NONE;
bool source_runs = true, destination_runs = false;
bool abandoned = false;         /* the source has given this attempt up: its guest runs on */
bool cannot_start = false;      /* the destination has tried, and cannot */
bool journal_lost = false;
bool tick = false;

/* what was ever said; GO and the answers can be heard for ever after */
bool said_READY, said_GO, said_RUNNING, said_NOT_STARTED, asked;
bool said_SAYS_NONE, said_SAYS_PREPARED, said_SAYS_OWNER, said_SAYS_ABORTED;

#define heard(message) (said_##message)

active proctype Source() {
  do
  /* before the commit the guest is paused and may go on; once it does, this attempt is over */
  :: atomic { source == NONE && !abandoned && source_runs -> source_runs = false }
  :: atomic { source == NONE && !source_runs -> abandoned = true; source_runs = true }

  /* a claim is written; the table says which. READY counts only while the guest is paused. */
  SOURCE_MOVES

  /* what a claim allows */
  :: atomic { source == COMMITTED && !said_GO && (heard(READY) || heard(SAYS_PREPARED)) ->
              said_GO = true }
  :: atomic { source == COMMITTED && !asked -> asked = true }
  :: atomic { SOURCE_MAY_RUN && source != NONE && !source_runs -> source_runs = true }
  od
}

active proctype Destination() {
  do
  DESTINATION_MOVES

  :: atomic { destination == PREPARED && !said_READY -> said_READY = true }
  :: atomic { DESTINATION_MAY_RUN && !destination_runs && !cannot_start ->
              destination_runs = true }
  :: atomic { destination_runs && !said_RUNNING -> said_RUNNING = true }

#ifdef STARTS_CAN_FAIL
  :: atomic { destination == OWNER && !destination_runs && !cannot_start -> cannot_start = true }
#endif
  :: atomic { destination == ABORTED && cannot_start && !said_NOT_STARTED ->
              said_NOT_STARTED = true }

  /* an answer to QUERY, as often as it is asked */
  :: atomic { asked && destination == NONE && !said_SAYS_NONE -> said_SAYS_NONE = true }
  :: atomic { asked && destination == PREPARED && !said_SAYS_PREPARED ->
              said_SAYS_PREPARED = true }
  /* not before it has started: else the source lets go of a guest that may turn out not to start */
  :: atomic { asked && destination == OWNER && destination_runs && !said_SAYS_OWNER ->
              said_SAYS_OWNER = true }
  :: atomic { asked && destination == ABORTED && !said_SAYS_ABORTED ->
              said_SAYS_ABORTED = true }

#ifdef JOURNALS_GET_LOST
  :: atomic { !journal_lost -> journal_lost = true; destination = NONE }
#endif
  od
}

/* Time goes on where nobody has anything left to do: each history is infinite, and has a last word. */
active proctype Clock() {
  do
  :: tick = !tick
  od
}

ltl never_two { [] !(source_runs && destination_runs) }
/* Where no journal is lost, and both are let work, it ends with exactly one. */
ltl at_last_one { <> [] (source_runs != destination_runs) }
