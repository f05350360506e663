"""What one rank holds of a model, by engine and stage."""

import pytest

from interlace.trainer.config.schema import OffloadSection, ParallelSection, RunConfig
from interlace.trainer.division import (
    KEPT_ELEMENTS,
    MOST_BUCKET_ELEMENTS,
    Buffers,
    Division,
    buffers_of,
    division_of,
    gathered_elements,
)

BILLION = 10**9


def zero(stage: int) -> RunConfig:
    parallel = {"engine": "deepspeed", "zero_stage": stage}
    return RunConfig(parallel=ParallelSection.model_validate(parallel))


FSDP2 = RunConfig(parallel=ParallelSection(replicas=2))


def test_fsdp2_divides_everything_over_the_ranks_of_a_replica() -> None:
    assert division_of(FSDP2, 8) == Division(4, 4, 4)


@pytest.mark.parametrize(
    ("stage", "division"),
    [(1, Division(1, 1, 8)), (2, Division(1, 8, 8)), (3, Division(8, 8, 8))],
)
def test_every_stage_of_zero_divides_one_kind_more(stage: int, division: Division) -> None:
    assert division_of(zero(stage), 8) == division


def test_whole_weights_are_never_gathered() -> None:
    assert gathered_elements(zero(2), Division(1, 8, 8), BILLION, 10) == 0
    assert gathered_elements(FSDP2, Division(1, 1, 1), BILLION, 10) == 0


def test_two_layers_are_gathered_and_zero_3_keeps_what_backward_needs_soon() -> None:
    everywhere = Division(8, 8, 8)
    assert gathered_elements(FSDP2, everywhere, BILLION, 10) == BILLION // 5
    kept = KEPT_ELEMENTS + BILLION // 5
    assert gathered_elements(zero(3), everywhere, BILLION, 10) == kept
    assert gathered_elements(zero(3), everywhere, 10**6, 10) == 10**6


def buffers(config: RunConfig, element_bytes: int, *, offloads: bool) -> Buffers:
    division = division_of(config, 4)
    return buffers_of(config, division, BILLION, element_bytes, offloads=offloads)


def test_fsdp2_holds_nothing_beside_what_has_a_home() -> None:
    assert buffers(FSDP2, 2, offloads=True) == Buffers()


def test_zero_3_sums_where_state_is_and_has_one_bucket() -> None:
    bucket = 4 * MOST_BUCKET_ELEMENTS
    assert buffers(zero(3), 2, offloads=True) == Buffers(bucket, BILLION)
    assert buffers(zero(3), 2, offloads=False) == Buffers(bucket, 0)


def test_zero_2_sums_its_part_on_the_device_where_weights_are_shorter_than_sums() -> None:
    bucket = MOST_BUCKET_ELEMENTS
    assert buffers(zero(2), 2, offloads=True) == Buffers(2 * bucket + BILLION, BILLION // 2)
    assert buffers(zero(2), 4, offloads=True) == Buffers(4 * bucket, BILLION)


def test_where_torch_updates_its_temporaries_may_be_more_than_the_buckets_of_backward() -> None:
    assert buffers(zero(2), 2, offloads=False) == Buffers(8 * BILLION // 4)
    subgroups = {"offload": OffloadSection(subgroup_elements=240_000_000)}
    one_at_a_time = zero(3).model_copy(update=subgroups)
    assert buffers(one_at_a_time, 2, offloads=False) == Buffers(8 * 240_000_000)


def test_zero_1_has_the_whole_gradient_in_float32() -> None:
    whole = 4 * (MOST_BUCKET_ELEMENTS + BILLION)
    assert buffers(zero(1), 2, offloads=True) == Buffers(whole + BILLION, BILLION // 2)
    assert buffers(zero(1), 4, offloads=False) == Buffers(whole, 0)
