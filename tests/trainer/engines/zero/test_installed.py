"""DeepSpeed that is missing, or too old, is told of before anything begins."""

import importlib.util
from importlib import metadata
from pathlib import Path

import pytest
import torch

from interlace.trainer.config import load_recipe
from interlace.trainer.engines.zero.installed import require_deepspeed
from interlace.trainer.errors import ConfigError
from interlace.trainer.rendezvous import agree, differences, told_by
from interlace.trainer.world import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find_spec(name)
    )


def test_the_version_here_is_one_that_is_known() -> None:
    require_deepspeed()


def test_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    without_deepspeed(monkeypatch)
    with pytest.raises(ConfigError) as caught:
        agree(load_recipe("quickstart", ["parallel.engine=deepspeed"]).config, ALONE)
    assert str(caught.value) == (
        "parallel.engine=deepspeed: deepspeed is not installed; type  pip install "
        "'interlace[deepspeed]'  or parallel.engine=fsdp2"
    )


def test_other_engines_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    without_deepspeed(monkeypatch)
    agree(load_recipe("quickstart").config, ALONE)


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "1.0"])
def test_a_version_that_nobody_has_tried_is_refused(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: version)
    with pytest.raises(ConfigError) as caught:
        require_deepspeed()
    assert str(caught.value) == (
        f"parallel.engine=deepspeed: this is DeepSpeed {version}, and 0.19 up to but not 0.20 is "
        "known; type  pip install 'interlace[deepspeed]'  or parallel.engine=fsdp2"
    )


def test_ranks_with_other_versions_and_other_files_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "zero.json"
    file.write_text("{}", encoding="utf-8")
    words = ["parallel.engine=deepspeed", f"parallel.deepspeed_config={file}"]
    config = load_recipe("quickstart", words).config
    here = told_by(config)
    file.unlink()
    without_deepspeed(monkeypatch)
    there = told_by(config)
    digest = here[f"the contents of {file}"]
    assert differences([here, there]) == [
        f"the contents of {file} is not the same on all ranks: {digest} on rank 0, absent on "
        "rank 1; start all with one recipe",
        f"deepspeed is not the same on all ranks: {here['deepspeed']} on rank 0, absent on rank 1; "
        "install one version everywhere",
    ]
