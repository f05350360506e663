"""Chooses a home for every subgroup: budgets first, then the performance model."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from interlace.offload.calibration import WORTHWHILE
from interlace.offload.cores import local_ranks
from interlace.offload.fit import check_memory, memory_needs
from interlace.offload.hardware import HardwareProfile, with_active_ranks
from interlace.offload.measure import known_profile
from interlace.offload.memory import (
    HOST_SHARE,
    available_device_bytes,
    available_host_bytes,
)
from interlace.offload.monitor import Monitor
from interlace.offload.options import OffloadOptions
from interlace.offload.performance_model import fixed_homes, predict_homes, rates_of, solve
from interlace.offload.schedule import (
    Home,
    MemoryBudget,
    MemoryShortage,
    Schedule,
    Strategy,
    Subgroup,
)

logger = logging.getLogger(__name__)

DEVICE_SHARE = 0.5
"""Share of the free device memory that resident state may take when no budget is given: the
activations of the first forward pass are yet to come."""


class Placement:
    """What one optimizer knows of its machine, and the homes that follow from it.

    Attributes:
        profile: The machine; None while nobody needed it. Calibration replaces it.
        budget: Memory that state may occupy; None means a share of what is free.
        schedule: The newest schedule; None where homes follow without a prediction.
    """

    def __init__(
        self,
        device: torch.device,
        strategy: Strategy,
        budget: MemoryBudget | None,
        profile: HardwareProfile | None,
        options: OffloadOptions,
    ) -> None:
        self.device = device
        self.strategy: Strategy = strategy
        self.options = options
        self.budget = budget
        self.schedule: Schedule | None = None
        needs_none = fixed_homes(strategy, 0, options.stride) is not None
        if not needs_none:
            profile = profile or with_active_ranks(
                known_profile(device, logger.info), local_ranks()
            )
            # Without rates there is nothing to decide by.
            rates_of(profile)
        self.profile = profile

    def allowed(self, held: MemoryBudget) -> MemoryBudget:
        """Return what state may occupy: as given, else shares of what is free now and what it holds
        already.
        """
        if self.budget is not None:
            return self.budget
        ranks = local_ranks()
        host = int(HOST_SHARE * available_host_bytes() / ranks)
        free = available_device_bytes(self.device) // (ranks if self.device.type == "cpu" else 1)
        share = 1.0 if self.strategy == "none" else DEVICE_SHARE
        return MemoryBudget(int(share * free) + held.device_bytes, host + held.host_bytes)

    def held(self, subgroups: Sequence[Subgroup], homes: Sequence[Home]) -> MemoryBudget:
        """Return the memory that state occupies."""
        return memory_needs(subgroups, homes, self.options.staging_slots)

    def choose(
        self,
        subgroups: Sequence[Subgroup],
        present: Sequence[Subgroup] = (),
        homes_of_present: Sequence[Home] = (),
    ) -> tuple[Home, ...]:
        """Return a home for every subgroup; those without elements need none and get any.

        Args:
            subgroups: All there are to be.
            present: Those that occupy memory already.
            homes_of_present: Where.

        Raises:
            MemoryShortage: State does not fit.
        """
        held = self.held(present, homes_of_present)
        filled = [number for number, subgroup in enumerate(subgroups) if subgroup.elements]
        homes = [Home.RESIDENT] * len(subgroups)
        if not filled:
            return tuple(homes)
        shapes = [subgroups[number] for number in filled]
        chosen = self.homes_of(shapes, self.allowed(held))
        for number, home in zip(filled, chosen, strict=True):
            homes[number] = home
        return tuple(homes)

    def homes_of(self, shapes: Sequence[Subgroup], budget: MemoryBudget) -> Sequence[Home]:
        """Return homes, and remember the schedule that predicts their times."""
        options = self.options
        if self.profile is None or self.profile.rates is None:
            fixed = fixed_homes(self.strategy, len(shapes), options.stride)
            assert fixed is not None, "a profile was measured where the strategy needs one"
            check_memory(shapes, fixed, budget, options.staging_slots, self.strategy)
            return fixed
        self.schedule = solve(
            self.profile,
            shapes,
            budget,
            options.hidden_window,
            strategy=self.strategy,
            stride=options.stride,
            staging_slots=options.staging_slots,
        )
        return self.schedule.homes

    def reconsider(
        self, subgroups: Sequence[Subgroup], homes: tuple[Home, ...], monitor: Monitor
    ) -> tuple[Home, ...]:
        """Return homes under corrected rates, or those that were better; the present ones unless
        others gain enough.
        """
        present, window = self.schedule, self.options.hidden_window
        assert present is not None, "only predicted schedules are found wrong"
        self.profile = profile = monitor.corrected or self.profile
        assert profile is not None, "who predicts knows the machine"
        if monitor.retreat is not None:
            back = replace(present, homes=self.filled(subgroups, monitor.retreat))
            self.schedule = predict_homes(profile, back, window)
            return monitor.retreat
        stay = predict_homes(profile, present, window)
        try:
            chosen = self.choose(subgroups, subgroups, homes)
        except MemoryShortage:
            # Sums in float32 that nobody had announced may have filled the budget.
            chosen = homes
        assert self.schedule is not None
        gain = 1 - self.schedule.prediction.update_seconds / stay.prediction.update_seconds
        if chosen == homes or gain < WORTHWHILE or chosen in monitor.probation.refused:
            self.schedule = stay
            logger.info("homes stay as they are; the prediction is corrected")
            return homes
        moved = sum(before is not after for before, after in zip(homes, chosen, strict=True))
        logger.info("%d subgroups take another home: %.0f%% less time", moved, 100 * gain)
        return chosen

    def filled(self, subgroups: Sequence[Subgroup], homes: Sequence[Home]) -> tuple[Home, ...]:
        """Return the homes of subgroups that have elements, of which schedules consist."""
        pairs = zip(subgroups, homes, strict=True)
        return tuple(home for subgroup, home in pairs if subgroup.elements)

    def give_back(
        self, subgroups: Sequence[Subgroup], homes: tuple[Home, ...], device_bytes: int
    ) -> tuple[Home, ...]:
        """Return homes that occupy so much less of the device; the present ones where no others
        fit, or where the strategy leaves no choice.
        """
        held = self.held(subgroups, homes)
        before, self.budget = (
            self.budget,
            MemoryBudget(max(0, held.device_bytes - device_bytes), self.allowed(held).host_bytes),
        )
        try:
            chosen = self.choose(subgroups, subgroups, homes)
        except MemoryShortage:
            self.budget = before
            logger.warning(
                "device memory is short, and strategy %s cannot give any back", self.strategy
            )
            return homes
        freed = held.device_bytes - self.held(subgroups, chosen).device_bytes
        logger.info("device memory is short: %s bytes of state leave it", f"{freed:,}")
        return chosen
