"""When a peer is lost, and when it must hear from us: simulated, with times that are passed in."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from migrate.transport.liveness import LEAST_RATE, Liveness

START = 1000.0
TIMEOUT = 10.0


class Simulation:
    """Calls `judge` whenever `next_beat` says so, as a Link does, until the peer is lost."""

    def __init__(self) -> None:
        self.liveness = Liveness(TIMEOUT, START)
        self.now = START
        self.received = 0
        self.pings: list[float] = []
        self.script: list[tuple[float, Callable[[], None]]] = []
        """What happens when: seconds after the start, in order."""
        self.oversleeps = 0.0
        """How much later than asked the next beat comes."""

    def hear(self, count: int = 1, *, in_frame: bool = False) -> None:
        self.received += count
        self.liveness.heard(self.now, self.received, in_frame=in_frame)

    def run(self) -> str:
        """Run until the peer is lost; return why."""
        while True:
            due = self.liveness.next_beat()
            wake, self.oversleeps = due + self.oversleeps, 0.0
            while self.script and START + self.script[0][0] <= wake:
                at, event = self.script.pop(0)
                self.now = START + at
                event()
            self.now = max(wake, self.now)
            if why := self.liveness.judge(due, self.now, self.received):
                return why
            if self.liveness.take_ping(self.now):
                self.pings.append(self.now - START)

    @property
    def seconds(self) -> float:
        return self.now - START


@pytest.mark.parametrize("last_heard", [0.0, 0.1, 2.5, 7.4, 9.9])
def test_silence_is_noticed_on_time(last_heard: float) -> None:
    """Not at the next PING, which may be a quarter of the timeout later."""
    simulation = Simulation()
    simulation.script = [(last_heard, simulation.hear)]
    assert simulation.run() == "has said nothing for 10 s"
    assert simulation.seconds - last_heard == pytest.approx(TIMEOUT)
    assert simulation.pings[:3] == pytest.approx([2.5, 5.0, 7.5])


def test_silence_is_judged_anew_after_we_were_stopped() -> None:
    """SIGSTOP, or a suspended machine: an hour passes in one sleep, and the peer is not lost."""
    simulation = Simulation()
    simulation.oversleeps = 3600.0
    assert simulation.run() == "has said nothing for 10 s"
    assert simulation.seconds == pytest.approx(3600 + 2.5 + TIMEOUT)


def test_pings_are_sent_and_silence_does_not_count_while_we_do_not_read() -> None:
    simulation = Simulation()
    simulation.liveness.pause()
    simulation.script = [(100.0, lambda: simulation.liveness.resume(simulation.now))]
    assert simulation.run() == "has said nothing for 10 s"
    assert simulation.seconds == pytest.approx(100 + TIMEOUT)
    assert simulation.pings[:40] == pytest.approx([2.5 * n for n in range(1, 41)])


@pytest.mark.parametrize("share", [0.5, 1.5])
def test_peer_that_trickles_inside_a_frame_is_lost(share: float) -> None:
    """A byte now and then is no silence; it must be LEAST_RATE."""
    simulation = Simulation()
    piece = int(share * LEAST_RATE)
    simulation.script = [
        (second, lambda: simulation.hear(piece, in_frame=True)) for second in range(1, 60)
    ]
    why = simulation.run()
    if share < 1:
        assert why == f"sends less than {LEAST_RATE} bytes a second"
        assert TIMEOUT < simulation.seconds < 2 * TIMEOUT
    else:
        assert simulation.seconds > 59 + TIMEOUT - 1e-9


def test_frames_that_come_whole_may_be_rare() -> None:
    simulation = Simulation()
    simulation.script = [(second, simulation.hear) for second in range(5, 100, 5)]
    assert simulation.run() == "has said nothing for 10 s"
    assert simulation.seconds == pytest.approx(95 + TIMEOUT)
