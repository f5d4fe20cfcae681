"""What the benchmark of training steps compares, and what its page says of the machine."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """benchmarks/train_step.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield load(ROOT / "benchmarks" / "train_step.py")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_a_bubble_counts_where_nobody_can_fill_it(bench: ModuleType) -> None:
    """Half the bound's rate: of what is left of it where a stage's core stands idle, and of all of it elsewhere."""
    names = ("triax fp32 pp2", "triax fp32 pp2, 1 thread", "triax fp32 tp2")
    bound = bench.Contender("bound fp32", bench.build_bound, seconds=[1.0, 1.0])
    sides = [bench.Contender(name, bench.build_triax, seconds=[2.0, 2.0]) for name in names]
    assert [bench.share_of(bound, side) for side in sides] == pytest.approx([0.5, 0.625, 0.5])


def test_two_stages_are_timed_with_the_threads_that_a_run_gives_them(bench: ModuleType) -> None:
    sides = {side.name: side.env for side in bench.contenders()}
    assert sides["triax bf16 pp2, 1 thread"] == sides["triax bf16 tp2"] == {}
    if len(os.sched_getaffinity(0)) > 1:
        assert sides["triax bf16 pp2"]["OMP_WAIT_POLICY"] == "passive"


def test_a_result_names_its_processor_and_what_it_multiplies_bf16_by(bench: ModuleType) -> None:
    common = sys.modules[bench.keep.__module__]
    assert [common.bf16_by(flags) for flags in (["fpu", "avx512_bf16", "amx_bf16"], ["avx512_bf16"], ["avx2"])] == [
        "AMX", "AVX-512", "no instructions of its own"]
    assert {"cpu", "bf16", "cores"} <= set(common.machine())


def test_each_table_of_the_page_names_the_processor() -> None:
    facts = json.loads((ROOT / "benchmarks" / "results" / "train_step.json").read_text())["machine"]
    generate = load(ROOT / "docs" / "generate.py")
    named = facts["cpu"].replace("(R)", "").replace("(TM)", "")
    for table in (generate.training(), generate.preparation(), generate.figures()):
        assert named in table.splitlines()[0]
    assert f"bf16 by {facts['bf16']}" in generate.training().splitlines()[0]
