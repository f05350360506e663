"""What one update really took: its timeline as measured, and the prediction beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from interlace.offload.lanes import Ticket
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
        exposed_seconds: How long step and forward waited for it.
        prediction: What the performance model expected, if it was asked.
    """

    number: int
    timeline: Timeline
    update_seconds: float
    exposed_seconds: float
    prediction: Prediction | None

    def words(self) -> str:
        """Return one line: predicted, measured, and what decides."""
        measured = f"measured {self.update_seconds:.3g} s, {self.exposed_seconds:.3g} s exposed"
        if self.prediction is None:
            return f"update {self.number}: {measured}"
        return (
            f"update {self.number}: predicted {self.prediction.update_seconds:.3g} s, {measured}; "
            f"bound by {LANE_WORDS[self.prediction.bound_by]}"
        )


@dataclass(frozen=True)
class Clock:
    """The zero of a step's timeline, on the host's clock and on the device's."""

    host: float
    device: torch.cuda.Event | None

    def interval(self, ticket: Ticket) -> tuple[float, float]:
        """Return start and stop of finished work in seconds since the zero."""
        if ticket.began is None or ticket.ended is None or self.device is None:
            return ticket.start - self.host, ticket.stop - self.host
        ticket.ended.synchronize()
        return (
            self.device.elapsed_time(ticket.began) / 1e3,
            self.device.elapsed_time(ticket.ended) / 1e3,
        )


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
