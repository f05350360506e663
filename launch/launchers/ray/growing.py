"""How many ranks an elastic run has: as many as there is room for, of numbers that fit its batch.

Ray Train's own policy takes any number in the range and, to grow, ends the ranks where they stand.
Here only numbers count over which the rows of a step can be spread, and a run that is to grow saves
first, as on any request to stop; then it is started anew with more ranks and loses nothing. A rank
that is lost is no matter of choice: Ray Train starts those that are left.

These are internals of Ray Train 2.60, the only ones that launching needs besides the notice of
preemption in `listening`.
"""

from collections.abc import Sequence
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2.api.config import ScalingConfig

from interlace.launch.launchers.ray.bridge import Wish


class EvenPolicy(ElasticScalingPolicy):
    """Ray's elastic policy, restricted to some numbers of ranks; it asks before it resizes.

    Args:
        scaling: As Ray wants it.
        counts: Allowed numbers of ranks, ascending.
        bridge: Handle of the bridge, through which a running run is asked to move.
    """

    def __init__(self, scaling: ScalingConfig, counts: Sequence[int], bridge: Any) -> None:
        super().__init__(scaling)
        self.counts = tuple(counts)
        self.bridge = bridge

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((count for count in self.counts if count <= room), default=0)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Let the run save and move when there is room for more."""
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        if not isinstance(decision, ResizeDecision):
            return decision
        now, then = worker_group_state.num_workers, decision.num_workers
        self.bridge.stop.remote(Wish(f"there is room for {then} ranks, not {now}", moving=True))
        return NoopDecision()


class ElasticTrainer(TorchTrainer):
    """Ray's trainer with a policy of ours.

    Args:
        policy: The policy.
        arguments: Those of `TorchTrainer`.
    """

    def __init__(self, policy: EvenPolicy, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.policy = policy

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["scaling_policy"] = self.policy
        return super()._initialize_and_run_controller(**arguments)
