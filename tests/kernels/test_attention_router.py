"""Which back end serves a call of attention, and the words that say why."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from interlace.kernels import attention, explain_attention
from interlace.kernels.attention import backends, flash_attn, flex, router
from interlace.kernels.attention.backends import BACKENDS
from interlace.kernels.attention.measurements import (
    Row,
    constant,
    merge_rows,
    nearest_row,
    read_rows,
    rows_of,
    shipped_path,
    user_path,
)
from interlace.kernels.attention.request import Request
from interlace.kernels.attention.router import choose

CPU = Request(
    device="cpu",
    architecture="cpu",
    dtype=torch.float32,
    batch=2,
    heads=4,
    groups=4,
    queries=1024,
    keys=1024,
    head_width=64,
    mask="causal",
    causal=True,
    extras=frozenset(),
    order=1,
    needs_grad=True,
    deterministic=False,
)
H100 = replace(CPU, device="cuda", architecture="sm90", dtype=torch.bfloat16)
A100 = replace(H100, architecture="sm80")


@pytest.fixture(autouse=True)
def no_tables_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("INTERLACE_ATTENTION", raising=False)
    rows_of.cache_clear()


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_no_triton", lambda: None)
    monkeypatch.setattr(flex, "why_no_triton", lambda: None)
    monkeypatch.setattr(flash_attn, "missing", lambda: None)


def row(**changes: Any) -> Row:
    cell: dict[str, Any] = {
        "architecture": "cpu",
        "dtype": "float32",
        "head_width": 64,
        "length": 1024,
        "mask": "causal",
        "work": "forward+backward",
        "milliseconds": {"sdpa": 2.0, "chunked": 1.0},
        "source": "a test",
    }
    return Row(**{**cell, **changes})


def name_of(request: Request) -> str:
    return choose(request).backend.name


def test_shipped_rows_are_valid_and_each_cell_is_there_once() -> None:
    rows = read_rows(shipped_path())
    assert len(rows) > 30
    assert len({row.cell for row in rows}) == len(rows)
    assert all(set(row.times) <= set(BACKENDS) for row in rows)
    published = [row for row in rows if row.relative is not None]
    assert published
    assert all("published, not measured here" in row.source for row in published)
    assert {row.architecture for row in rows if row.milliseconds is not None} == {"cpu"}


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(
    ("request_", "chosen"),
    [
        (CPU, "sdpa"),
        (replace(CPU, mask="packed", queries=4096, keys=4096), "chunked"),
        (replace(CPU, mask="packed", queries=256, keys=256), "sdpa"),
        (replace(CPU, order=2), "chunked"),
        (replace(CPU, order=3), "chunked"),
        (replace(CPU, extras=frozenset({"lse"})), "chunked"),
        (H100, "sdpa"),
        (A100, "sdpa"),
        (replace(H100, mask="packed", extras=frozenset({"segments"})), "flex"),
        (replace(H100, mask="packed", compiling=True), "triton"),
        (replace(H100, mask="window", compiling=True), "flash_attn"),
        (replace(H100, order=2), "triton"),
        (replace(H100, order=3), "chunked"),
        (replace(H100, deterministic=True), "triton"),
        (replace(H100, deterministic=True, needs_grad=False), "sdpa"),
        (replace(H100, dtype=torch.float32), "sdpa"),
        (replace(H100, extras=frozenset({"softcap"})), "flash_attn"),
        (replace(H100, head_width=512, mask="packed"), "sdpa"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_the_choice_follows_the_request(request_: Request, chosen: str) -> None:
    assert name_of(request_) == chosen


@pytest.mark.usefixtures("everything_installed")
def test_triton_is_never_chosen_on_a_cpu_not_even_in_the_interpreter() -> None:
    assert BACKENDS["triton"].why_not(CPU) is None
    assert name_of(CPU) != "triton"
    merge_rows([row(milliseconds={"triton": 0.1, "flex": 0.1, "chunked": 5.0, "sdpa": 9.0})])
    assert name_of(CPU) == "chunked"
    assert "not triton: 50.00 times as fast, but used only by name" in choose(CPU).explain()


def test_the_users_own_table_wins_and_a_row_takes_its_cells_place() -> None:
    assert name_of(CPU) == "sdpa"
    assert merge_rows([row(milliseconds={"sdpa": 1.0, "chunked": 2.0})]) == [user_path("cpu")]
    assert name_of(CPU) == "sdpa"
    merge_rows([row(), row(length=256)])
    assert name_of(CPU) == "chunked"
    assert [each.length for each in read_rows(user_path("cpu"))] == [256, 1024]
    assert choose(CPU).reasons() == (
        "chosen because it is the fastest of chunked, sdpa in the nearest measured cell (cpu, "
        "float32, heads 64 wide, length 1024, mask causal, forward+backward; a test)",
    )
    assert choose(CPU).others()["sdpa"] == "takes 2.00 times as long in that cell"


def test_the_nearest_cell_is_of_the_same_kind_and_at_most_twice_as_long(tmp_path: Path) -> None:
    merge_rows(
        [row(architecture="sm70", length=n, head_width=w) for n in (256, 1024) for w in (64, 96)]
    )

    def found(head_width: int, length: int, **changes: str) -> tuple[int, int] | None:
        cell = {"dtype": "float32", "mask": "causal", "work": "forward+backward", **changes}
        near = nearest_row("sm70", head_width=head_width, length=length, **cell)
        return None if near is None else (near.head_width, near.length)

    assert found(64, 2048) == (64, 1024)
    assert found(128, 300) == (96, 256)
    assert found(64, 4096) is None
    assert found(256, 1024) is None
    assert found(64, 1024, mask="packed") is None
    assert found(64, 1024, dtype="bfloat16") is None
    assert found(64, 1024, work="double_backward") is None


def test_half_precisions_stand_for_each_other() -> None:
    merge_rows([row(architecture="sm70", dtype="float16")])
    cell = ("sm70", "bfloat16", 64, 1024, "causal", "forward+backward")
    near = nearest_row(*cell)
    assert near is not None
    assert near.dtype == "float16"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "the file: Invalid JSON"),
        ('[{"architecture": "cpu"}]', "[0][dtype]: Field required"),
    ],
)
def test_a_broken_table_is_not_counted_and_said(text: str, problem: str) -> None:
    path = user_path("cpu")
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    last = choose(CPU).reasons()[-1]
    assert last.startswith(f"not counted: {path}: {problem}")
    assert last.endswith("mend or delete it")
    with pytest.raises(ValueError, match="mend or delete it"):
        merge_rows([row()])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"milliseconds": None}, "give either milliseconds or relative"),
        ({"relative": {"sdpa": 1.0}}, "give either milliseconds or relative"),
        ({"milliseconds": {}}, "times must be positive numbers"),
        ({"milliseconds": {"sdpa": 0.0}}, "times must be positive numbers"),
    ],
)
def test_a_row_has_times_of_one_kind(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        row(**changes)


def test_tables_are_json_with_the_documented_keys() -> None:
    merge_rows([row()])
    [written] = json.loads(user_path("cpu").read_text(encoding="utf-8"))
    assert written["pass"] == "forward+backward"
    assert "work" not in written


@pytest.mark.usefixtures("everything_installed")
def test_a_rule_says_that_it_decided_and_why() -> None:
    assert choose(A100).reasons() == (
        "chosen by rule, since no measured cell is near: torch's fused kernels need no mask for "
        "this",
    )
    assert choose(replace(CPU, queries=1)).reasons() == (
        "chosen by rule, since cells are of as many queries as keys: on a CPU torch's fused kernel "
        "comes first",
    )
    deterministic = choose(replace(H100, deterministic=True)).reasons()[0]
    assert "since cells are of kernels that need not be deterministic" in deterministic
    assert "ALiBi" in choose(replace(CPU, extras=frozenset({"alibi"}))).reasons()[0]
    only_named = merge_rows(
        [row(architecture="sm80", dtype="float16", milliseconds={"reference": 1.0})]
    )
    assert only_named
    assert "no back end of its cell can serve it" in choose(A100).reasons()[0]


@pytest.mark.usefixtures("everything_installed")
def test_published_figures_are_said_to_be_published() -> None:
    said = choose(H100).explain()
    assert "published, not measured here: FlashAttention-3 (arXiv 2407.08608)" in said
    assert "not flash_attn: takes 1.25 times as long in that cell as published" in said
    assert "not triton: comes later, not measured in this cell" in said


@pytest.mark.usefixtures("everything_installed")
def test_a_cell_that_is_known_to_be_wrong_does_not_count_and_is_named() -> None:
    merge_rows(
        [
            row(
                architecture="sm90",
                dtype="bfloat16",
                mask="window",
                milliseconds={"sdpa": 1.0, "triton": 2.0},
            )
        ]
    )
    good = replace(H100, mask="window")
    bad = replace(good, queries=1024 - 64, keys=1024 - 64)
    assert name_of(good) == "sdpa"
    assert name_of(bad) == "triton"
    forced = choose(bad, "sdpa").explain()
    assert "without cuDNN here: with a mask, its backward gives NaN" in forced
    assert "(960) modulo 128 is 64 (pytorch issue 196678)" in forced
    assert "cuDNN" not in choose(good, "sdpa").explain()
    assert "cuDNN here" not in choose(replace(bad, mask="causal"), "sdpa").explain()


def test_a_name_wins_over_the_environment_and_both_over_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q = torch.zeros(1, 2, 4, 8)
    monkeypatch.setenv("INTERLACE_ATTENTION", "chunked")
    assert explain_attention(q, q, q).splitlines()[:2] == [
        "chunked: slices of queries in plain torch, linear memory",
        "forced by INTERLACE_ATTENTION=chunked",
    ]
    assert explain_attention(q, q, q, backend="reference").splitlines()[1] == (
        "forced by backend='reference'"
    )
    monkeypatch.setenv("INTERLACE_ATTENTION", "")
    assert explain_attention(q, q, q).startswith("sdpa")


def test_a_forced_back_end_that_cannot_serve_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q = torch.zeros(1, 2, 4, 8)
    monkeypatch.setenv("INTERLACE_ATTENTION", "sdpa")
    with pytest.raises(ValueError) as caught:
        attention(q, q, q, softcap=2.0)
    assert str(caught.value) == (
        "attention: INTERLACE_ATTENTION=sdpa cannot serve this call: it has no soft cap"
    )
    monkeypatch.setenv("INTERLACE_ATTENTION", "cudnn")
    with pytest.raises(ValueError, match="INTERLACE_ATTENTION=cudnn: must be one of auto, ref"):
        attention(q, q, q)


def test_choosing_asks_nothing_of_the_table_where_a_name_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("looked up")

    monkeypatch.setattr(router, "fastest_first", never)
    assert choose(CPU, "chunked").backend.name == "chunked"
    with pytest.raises(AssertionError, match="looked up"):
        choose(CPU)


def test_recipes_know_the_same_names() -> None:
    from interlace.trainer.config.model_section import ModelSection

    names = get_args(ModelSection.model_fields["attention_backend"].annotation)
    assert set(names) == {"auto", *BACKENDS}


def test_a_constant_is_marked_as_torch_marks_it() -> None:
    def torchs() -> int:
        return 1

    def ours() -> int:
        return 1

    torch.compiler.assume_constant_result(torchs)
    assert torchs.__dict__ == constant(ours).__dict__ != {}
