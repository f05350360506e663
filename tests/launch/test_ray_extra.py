"""Tests of how a missing Ray is told."""

from pathlib import Path

import pytest

from interlace.launch import ray_extra
from interlace.launch.launchers.ray import cluster
from interlace.launch.sweep import ray_tune
from interlace.launch.sweep.store import Store
from interlace.trainer.errors import ConfigError


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_extra.importlib.util, "find_spec", lambda name: None)


def test_a_sweep_names_what_is_missing_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--on ray: .* pip install 'interlace\[ray\]'"):
        ray_tune.RayRunner(Store(tmp_path), jobs=1, threads=1)


def test_a_launch_names_what_is_missing_and_the_remedy() -> None:
    with (
        pytest.raises(ConfigError, match=r"launch ray: .* or use  interlace launch torchrun"),
        cluster.connected(None),  # pyright: ignore[reportArgumentType] - refused before it is read
    ):
        pass
