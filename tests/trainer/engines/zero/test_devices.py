"""What depends on a device that is not the host, asked where there is none."""

import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.engines.zero.engine import ZeroEngine, spread
from interlace.trainer.engines.zero.opening import loaded
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.model import Model
from interlace.trainer.world import World


def test_buffers_begin_on_the_device_where_zero_3_would_leave_them_on_the_host() -> None:
    model = cast(Model, nn.BatchNorm1d(2, device="meta"))
    spread(model, RunConfig(), World(device=torch.device("meta")), torch.bfloat16)
    assert {(each.device.type, each.dtype) for each in model.parameters()} == {
        ("cpu", torch.bfloat16)
    }
    assert {each.device.type for each in model.buffers()} == {"meta"}


@pytest.mark.parametrize(
    ("asked", "computes", "runs", "remedy"),
    [
        ("cpu", "cpu", "cuda", "unset DS_ACCELERATOR"),
        (None, "cuda", "cpu", "export DS_ACCELERATOR=cpu"),
    ],
)
def test_another_kind_of_device_than_the_run_has_is_told(
    asked: str | None, computes: str, runs: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(device_name=lambda: computes)
    accelerator = SimpleNamespace(get_accelerator=lambda: found)
    monkeypatch.setitem(
        sys.modules, "deepspeed", cast(Any, SimpleNamespace(accelerator=accelerator))
    )
    monkeypatch.setenv("LOCAL_RANK", "0")
    # What is set meanwhile goes away again.
    monkeypatch.setenv("DS_ACCELERATOR", asked or "")
    if asked is None:
        monkeypatch.delenv("DS_ACCELERATOR")
    with pytest.raises(ConfigError) as caught:
        loaded(World(device=torch.device(runs)))
    assert str(caught.value) == (
        f"parallel.engine=deepspeed: DeepSpeed computes on {computes} in this process "
        f"(DS_ACCELERATOR={asked or 'not set'}), and the run on {runs}; start again after  {remedy}"
    )


def test_gradients_are_read_when_their_copies_to_the_host_have_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    did: list[str] = []

    class Watching(ZeroEngine):
        def __init__(self) -> None:
            self.world = World(device=torch.device("cuda", 0))
            self.engine = SimpleNamespace(module=nn.Linear(1, 1, bias=False))
            self.stage = cast(Any, SimpleNamespace(gradient_of=lambda _: did.append("read")))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: did.append(f"wait {device}"))
    assert list(Watching().gradients()) == []
    assert did == ["wait cuda:0", "read"]
    Watching().finish_step()
    assert did[2:] == ["wait cuda:0"]
