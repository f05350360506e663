"""What one update really took: its timeline as measured, and the prediction beside it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from interlace.offload.lanes import Lanes, StreamLane, Ticket
from interlace.offload.schedule import Prediction
from interlace.offload.timeline import Timeline, TimelineEvent

LANE_WORDS = {
    "h2d": "copies to the device",
    "d2h": "copies to the host",
    "cpu": "CPU updates",
    "device": "device updates",
    "dram": "host memory",
    "flush": "gradients on their way to the host",
}


@dataclass(frozen=True)
class UpdateReport:
    """One finished update.

    Attributes:
        number: Updates so far, this one included.
        timeline: Gradients, copies and updates; time 0 is the step's first gradient.
        update_seconds: From the first to the last event, gradients left out.
        exposed_seconds: How long step and forward waited for it: the device where there is one.
        prediction: What the performance model expected, if it was asked.
    """

    number: int
    timeline: Timeline
    update_seconds: float
    exposed_seconds: float
    prediction: Prediction | None

    @property
    def spread_over_backward(self) -> bool:
        """Whether it began before the last gradient came: then it also waited for gradients."""
        gradients = [e.stop for e in self.timeline.events if is_gradient(e)]
        updates = [e.start for e in self.timeline.events if not is_gradient(e)]
        return bool(gradients and updates) and min(updates) < max(gradients)

    def words(self) -> str:
        """Return one line: predicted, measured, and what decides."""
        measured = f"measured {self.update_seconds:.3g} s, {self.exposed_seconds:.3g} s exposed"
        if self.spread_over_backward:
            measured += ", spread over backward"
        if self.prediction is None:
            return f"update {self.number}: {measured}"
        return (
            f"update {self.number}: predicted {self.prediction.update_seconds:.3g} s, {measured}; "
            f"bound by {LANE_WORDS[self.prediction.bound_by]}"
        )


@dataclass(frozen=True)
class Clock:
    """Puts host and device on one time line.

    Attributes:
        zero: Time 0 on `time.perf_counter`: a step's first gradient.
        anchor: An event on the device, complete, or None without one.
        anchored: When it was seen to be complete, on `time.perf_counter`.
    """

    zero: float
    anchor: torch.cuda.Event | None = None
    anchored: float = 0.0

    def read(self, event: torch.cuda.Event) -> float:
        """Return when an event was complete, in seconds since the zero."""
        assert self.anchor is not None
        return self.anchored - event.elapsed_time(self.anchor) / 1e3 - self.zero

    def interval(self, ticket: Ticket) -> tuple[float, float]:
        """Return start and stop of finished work in seconds since the zero."""
        if ticket.began is None or ticket.ended is None:
            return ticket.start - self.zero, ticket.stop - self.zero
        return self.read(ticket.began), self.read(ticket.ended)


def clock_for(lanes: Lanes, zero: float) -> Clock:
    """Return a clock to read finished work with; no update is under way.

    The host runs ahead of the device: when an event was recorded says nothing of when the device
    came to it. The two are tied together where both are known, at the end.
    """
    if not isinstance(lanes.compute, StreamLane):
        return Clock(zero)
    anchor = torch.cuda.Event(enable_timing=True)
    anchor.record(lanes.compute.stream)
    anchor.synchronize()
    return Clock(zero, anchor, time.perf_counter())


def report_of(
    number: int,
    tickets: Sequence[Ticket],
    clock: Clock,
    exposed: float,
    prediction: Prediction | None,
) -> UpdateReport:
    """Return the report of an update whose work is finished."""
    events: list[TimelineEvent] = []
    for ticket in tickets:
        start, stop = clock.interval(ticket)
        events.append(
            TimelineEvent(ticket.lane, ticket.what, ticket.subgroup, start, stop, ticket.bytes)
        )
    updates = Timeline(tuple(event for event in events if not is_gradient(event)))
    return UpdateReport(number, Timeline(tuple(events)), updates.makespan, exposed, prediction)


def is_gradient(event: TimelineEvent) -> bool:
    """Whether an event belongs to backward rather than to the update."""
    return event.what.startswith("gradient")
