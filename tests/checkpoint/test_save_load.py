"""A checkpoint saved by any layout loads into any other, bit for bit; a failed save leaves nothing behind."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from engine.checkpoint import (
    KINDS,
    Entry,
    alone,
    latest_step,
    load_weights,
    open_checkpoint,
    resolve,
    save_checkpoint,
)
from engine.checkpoint import save as saving
from engine.config import ModelConfig
from engine.errors import UserError
from engine.model import Decoder, Parts, stage_layers
from engine.model.shapes import logical_shapes
from engine.parallel.collectives import TensorParallel
from engine.parallel.init import initialize
from engine.parallel.sharding import Piece, pieces, shard_of
from engine.train.lock import RunLock

TINY = ModelConfig(layers=3, hidden=32, ffn_hidden=48, heads=4, kv_heads=2, head_dim=8, vocab_size=131)
MODELS = {
    "llama": TINY, "tied": replace(TINY, tied=True), "qwen": replace(TINY, qkv_bias=True, qk_norm=True, head_dim=16),
    "gpt2": replace(TINY, family="gpt2", kv_heads=4, tied=True, qkv_bias=True, out_bias=True, mlp_bias=True),
}
META = {"samples": 640, "config": {"model": {}}, "world": {"pp": 2, "dp": 2, "cp": 1, "tp": 2}, "rng": [1, 2, 3]}
ASSETS = {"config.json": b"{}", "tokenizer.json": b"\x00\xff{}"}
Layout = tuple[int, int, int]


@dataclass
class Rank:
    """What one rank holds: its parameters and the optimizer's state for its dp part's rows."""

    entries: list[Entry]


def build(config: ModelConfig, layout: Layout, dtype: torch.dtype = torch.bfloat16, seed: int | None = 7) -> list[Rank]:
    """The ranks of (pp, dp, tp), with weights from `seed` (None leaves NaN) and optimizer state derived from them."""
    pp, dp, tp = layout
    ranks = []
    for stage in range(pp):
        for part in range(dp):
            for t in range(tp):
                parts = Parts(config, TensorParallel(group=None, rank=t, size=tp), dtype)
                model = Decoder(parts, stage_layers(config.layers, pp)[stage], first=stage == 0, last=stage == pp - 1)
                ranks.append(Rank([e for p in model.parameters() for e in state(p, part, dp, seed)]))
    return ranks


def state(parameter: torch.Tensor, part: int, dp: int, seed: int | None) -> Iterator[Entry]:
    """Entries of one parameter: each dp rank has an equal share of its rows, whole members or not."""
    rows = parameter.shape[0]
    low, high = rows * part // dp, rows * (part + 1) // dp
    if seed is not None:
        initialize(parameter, seed)
    for i, kind in enumerate(KINDS):
        full = parameter.detach().to(parameter.dtype if kind == "model" else torch.float32).clone()
        full = full.fill_(float("nan")) if seed is None else full.mul_(i + 1).add_(i)
        for piece in pieces(shard_of(parameter), low, high):
            yield Entry(kind, piece, full[piece.rows[0] : piece.rows[1]])


class Talk:
    """What threads that stand for ranks agree by: each call returns the sums of all their numbers."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=60)
        self.said: list[list[float]] = [[]] * world

    def agree(self, rank: int, numbers: Sequence[float]) -> list[float]:
        self.said[rank] = list(numbers)
        self.barrier.wait()
        sums = [sum(column) for column in zip(*self.said, strict=True)]
        self.barrier.wait()
        return sums


def save(root: Path, step: int, ranks: list[Rank], **more: object) -> list[object]:
    """Saves from one thread a rank, named after it; returns each rank's folder or exception."""
    talk = Talk(len(ranks))
    results: list[object] = [None] * len(ranks)

    def run(rank: int) -> None:
        try:
            results[rank] = save_checkpoint(
                root, step, ranks[rank].entries, rank=rank, world=len(ranks), agree=partial(talk.agree, rank),
                **{"meta": META, "assets": ASSETS, **more})  # type: ignore[arg-type]
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 2), (1, 3, 4)])
def test_any_layout_loads_what_any_other_saved(tmp_path: Path, name: str, layout: Layout) -> None:
    config = MODELS[name]
    save(tmp_path / "checkpoints", 5, build(config, layout), meta={**META, "config": {"model": asdict(config)}})
    checkpoint = open_checkpoint(tmp_path / "checkpoints" / "step-00000005")
    assert (checkpoint.step, checkpoint.samples, checkpoint.meta["rng"], checkpoint.kinds) == (5, 640, [1, 2, 3], KINDS)
    assert (checkpoint.assets / "tokenizer.json").read_bytes() == ASSETS["tokenizer.json"]
    for other in [(1, 1, 1), (3, 1, 2), (1, 2, 4)]:
        want, have = build(config, other), build(config, other, seed=None)
        for w, h in zip(want, have, strict=True):
            checkpoint.load(h.entries, expected=logical_shapes(config))
            for a, b in zip(w.entries, h.entries, strict=True):
                assert torch.equal(a.tensor, b.tensor), (other, a.name)


@pytest.mark.parametrize("name", MODELS)
def test_logical_shapes_are_those_the_decoder_declares(name: str) -> None:
    config = MODELS[name]
    model = Decoder(Parts(config), range(config.layers))
    declared = {m.name: m.shape for p in model.parameters() for m in shard_of(p).members}
    assert declared == logical_shapes(config)


def test_weights_load_cast_and_into_master_copies(tmp_path: Path) -> None:
    save(tmp_path, 1, build(TINY, (1, 1, 2), torch.float32))
    source = open_checkpoint(tmp_path / "step-00000001").source()
    [want], [have] = build(TINY, (1, 1, 1), torch.float32), build(TINY, (1, 1, 1), torch.bfloat16, seed=None)
    load_weights(source, have.entries, logical_shapes(TINY))
    by_name = {e.name: e.tensor for e in want.entries}
    for entry in have.entries:
        weight = by_name[f"model/{entry.piece.member.name}"]
        if entry.kind in ("model", "master"):
            assert torch.equal(entry.tensor, weight.to(entry.tensor.dtype))
        else:
            assert entry.tensor.isnan().all()


def test_a_dtype_that_differs_is_named_and_cast_only_when_asked(tmp_path: Path) -> None:
    save(tmp_path, 1, build(TINY, (1, 1, 1), torch.bfloat16))
    checkpoint = open_checkpoint(tmp_path / "step-00000001")
    [have] = build(TINY, (1, 1, 1), torch.float32, seed=None)
    with pytest.raises(UserError, match=r"model.layers.\{0-2\}.mlp.up_proj.weight.* as bf16.*fp32"):
        checkpoint.load(have.entries, expected=logical_shapes(TINY))
    checkpoint.load(have.entries, expected=logical_shapes(TINY), cast=True)
    assert not any(e.tensor.isnan().any() for e in have.entries)


@pytest.mark.parametrize(("change", "words"), [
    ({"layers": 4}, r"lacks model.layers.3.input_layernorm.weight"),
    ({"layers": 2}, r"has model.layers.2.*which the model does not"),
    ({"qk_norm": True}, r"lacks model.layers.\{0-2\}.self_attn.q_norm.weight"),
    ({"tied": True}, "has lm_head.weight, which the model does not"),
    ({"vocab_size": 132}, r"model.embed_tokens.weight, lm_head.weight of shape \[131, 32\], and the model wants \[132"),
])
def test_another_model_is_refused_by_every_name(tmp_path: Path, change: dict[str, int], words: str) -> None:
    save(tmp_path, 1, build(TINY, (1, 1, 1)))
    with pytest.raises(UserError, match=words):
        open_checkpoint(tmp_path / "step-00000001").load([], expected=logical_shapes(replace(TINY, **change)))


def test_a_run_without_master_weights_loads_what_it_saved_and_one_with_them_says_that_they_are_missing(
        tmp_path: Path) -> None:
    [rank] = build(TINY, (1, 1, 1), torch.float32)
    save(tmp_path, 1, [Rank([entry for entry in rank.entries if entry.kind != "master"])])
    checkpoint = open_checkpoint(tmp_path / "step-00000001")
    [have] = build(TINY, (1, 1, 1), torch.float32, seed=None)
    checkpoint.load([entry for entry in have.entries if entry.kind != "master"], expected=logical_shapes(TINY))
    with pytest.raises(UserError, match="holds no master tensors, which this run has"):
        checkpoint.load(have.entries, expected=logical_shapes(TINY))


def test_latest_follows_and_the_oldest_go(tmp_path: Path) -> None:
    root, [rank] = tmp_path / "checkpoints", build(TINY, (1, 1, 1))
    assert latest_step(tmp_path) is None
    for step in (1, 2, 3, 4):
        save(root, step, [rank], keep=2)
        assert latest_step(tmp_path) == root / f"step-{step:08d}"
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000003", "step-00000004"]
    assert (root / "latest").read_text() == "step-00000004\n"
    assert resolve(tmp_path).folder == resolve(root / "step-00000004").folder


def test_a_step_is_never_written_twice(tmp_path: Path) -> None:
    ranks = build(TINY, (1, 1, 2))
    save(tmp_path, 1, ranks)
    before = (tmp_path / "step-00000001" / "manifest.json").read_bytes()
    assert all(isinstance(e, UserError) and "never written twice" in str(e) for e in save(tmp_path, 1, ranks))
    assert (tmp_path / "step-00000001" / "manifest.json").read_bytes() == before


def broken(ranks: list[Rank], rank: int, error: Exception) -> list[Rank]:
    """The same ranks, one of whose entries fails when it is written."""

    class Failing(torch.Tensor):
        def detach(self) -> torch.Tensor:
            raise error

    i, entry = next((i, e) for i, e in enumerate(ranks[rank].entries) if e.piece.member.primary)
    ranks[rank].entries[i] = Entry(entry.kind, entry.piece, entry.tensor.as_subclass(Failing))
    return ranks


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_an_error_on_one_rank_is_raised_on_all_and_nothing_stays(tmp_path: Path, rank: int) -> None:
    save(tmp_path, 1, build(TINY, (2, 1, 2)))
    results = save(tmp_path, 2, broken(build(TINY, (2, 1, 2)), rank, OSError(28, "No space left on device")))
    assert all(isinstance(e, UserError) and "step-00000002" in str(e) and "No space left" in str(e) for e in results)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert (tmp_path / "latest").read_text() == "step-00000001\n"


def test_a_bug_on_one_rank_stays_itself_and_the_others_stop_too(tmp_path: Path) -> None:
    results = save(tmp_path, 2, broken(build(TINY, (1, 1, 2)), 1, RuntimeError("a bug")))
    assert isinstance(results[1], RuntimeError) and isinstance(results[0], UserError)
    assert "a bug" in str(results[0])


def test_success_is_agreed_and_not_read_from_a_disk_that_answers_late(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each machine's NFS client says for a while that what another machine has just made is not there."""
    late = {"left": 6}
    exists, is_file, scandir, read_text = Path.exists, Path.is_file, os.scandir, Path.read_text

    def elsewhere() -> bool:
        return threading.current_thread().name == "rank 1"

    def listed(path: Path) -> object:
        if elsewhere() and late["left"] > 3:
            late["left"] -= 1
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return scandir(path)

    def read(path: Path, **more: str) -> str:
        if path.name == "rank-00001.json" and late["left"] > 0:
            late["left"] -= 1
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return read_text(path, **more)

    monkeypatch.setattr(Path, "exists", lambda path, **more: not elsewhere() and exists(path, **more))
    monkeypatch.setattr(Path, "is_file", lambda path, **more: not elsewhere() and is_file(path, **more))
    monkeypatch.setattr(os, "scandir", listed)
    monkeypatch.setattr(Path, "read_text", read)
    results = save(tmp_path, 1, build(TINY, (1, 1, 2)))
    assert results == [tmp_path / "step-00000001"] * 2 and late["left"] == 0
    monkeypatch.undo()
    assert open_checkpoint(tmp_path / "step-00000001").step == 1


def test_a_rank_whose_machine_does_not_share_the_folder_is_named(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "VISIBLE", 0.5)
    scandir = os.scandir

    def listed(path: Path) -> object:
        if threading.current_thread().name == "rank 1":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listed)
    results = save(tmp_path, 1, build(TINY, (1, 1, 2)))
    assert all("is not there on rank 1; --out must be on a file system that all machines share" in str(e)
               for e in results), results
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_checkpoint_and_says_where(tmp_path: Path) -> None:
    [rank] = build(TINY, (1, 1, 1))
    save(tmp_path, 1, [rank])
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        [error] = save(tmp_path, 2, [rank])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert isinstance(error, UserError) and "step-00000002 could not be saved" in str(error)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_ranks_that_do_not_cover_a_tensor_are_found_before_the_rename(tmp_path: Path) -> None:
    ranks = build(TINY, (1, 1, 2))
    ranks[1].entries.pop(3)
    results = save(tmp_path, 1, ranks)
    assert all(isinstance(e, UserError) and "leave a gap" in str(e) for e in results) and not list(tmp_path.iterdir())
    ranks = build(TINY, (1, 1, 2))
    ranks[1].entries = [moved(e) for e in ranks[1].entries]
    assert all("overlap" in str(e) for e in save(tmp_path, 1, ranks))


def moved(entry: Entry) -> Entry:
    """The entry, claiming to stand at its tensor's beginning."""
    piece = entry.piece
    return Entry(entry.kind, Piece(piece.member, piece.rows, (0,) * len(piece.start), piece.extent), entry.tensor)


class Crash(BaseException):
    """Stands for the process's end."""


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_crash_at_any_system_call_leaves_one_whole_checkpoint(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The n-th call of each kind never returns, for every n: `latest` is then the old step or the new one, whole."""
    [rank] = build(TINY, (1, 1, 1))
    seen = set()
    for crash in range(1, 20):
        run = tmp_path / f"{call}-{crash}"
        save(run / "checkpoints", 1, [rank])
        with monkeypatch.context() as patch:
            patch.setattr(os, call, dying(getattr(os, call), crash))
            try:
                save_checkpoint(run / "checkpoints", 2, rank.entries, rank=0, world=1, agree=alone, meta=META,
                                assets=ASSETS)
                return_normally = True
            except Crash:
                return_normally = False
        folder = latest_step(run)
        assert folder is not None
        seen.add(open_checkpoint(folder).step)
        if crash % 2:  # a tool reads the run, or the next run begins at once
            assert resolve(run).folder == folder
            assert (run / "checkpoints" / "latest").read_text() == f"{folder.name}\n"
        # The run goes on from where it is: the next save must work whatever the crash has left.
        [result] = save(run / "checkpoints", open_checkpoint(folder).step + 1, [rank])
        assert isinstance(result, Path) and latest_step(run) == result
        if return_normally:
            break
    assert return_normally and 2 in seen and (1 in seen or call == "replace")  # a crash there is rolled forward


@pytest.mark.parametrize("call", ["rename", "replace", "rmdir"])
def test_whoever_reads_a_run_next_finishes_what_its_death_has_left(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The last save of a run dies in one of its renames, or among those it deletes; nothing resumes the run."""
    [rank] = build(TINY, (1, 1, 1))
    for crash in range(1, 20):
        run = tmp_path / f"{call}-{crash}"
        save(run / "checkpoints", 1, [rank])
        with monkeypatch.context() as patch:
            patch.setattr(os, call, dying(getattr(os, call), crash))
            try:
                save_checkpoint(run / "checkpoints", 2, rank.entries, rank=0, world=1, agree=alone, meta=META,
                                assets=ASSETS, keep=1)
                return_normally = True
            except Crash:
                return_normally = False
        found = resolve(run / "checkpoints" / "step-00000001" if crash == 1 and call == "rename" else run)
        left = {path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith(".tmp-step-")}
        assert found.folder.name in left and left <= {"latest", "step-00000001", "step-00000002"}
        assert (run / "checkpoints" / "latest").read_text() == f"{latest_step(run).name}\n"  # type: ignore[union-attr]
        if return_normally:
            break
    assert return_normally and crash > 1


def test_a_tool_changes_nothing_in_a_run_under_way(tmp_path: Path) -> None:
    [rank] = build(TINY, (1, 1, 1))
    save(tmp_path / "checkpoints", 1, [rank])
    save(tmp_path / "checkpoints", 2, [rank])
    (tmp_path / "checkpoints" / "latest").write_text("step-00000001\n")
    (tmp_path / "checkpoints" / ".latest.new").write_text("step-00000002\n")
    (tmp_path / "checkpoints" / ".old-step-00000000").mkdir()
    before = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    with RunLock(tmp_path):
        assert resolve(tmp_path).folder.name == "step-00000002"
        assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == before
    assert resolve(tmp_path).folder.name == "step-00000002"
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"latest", "step-00000001", "step-00000002"}
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000002\n"


def dying(function: Callable[..., object], nth: int) -> Callable[..., object]:
    """The function, whose nth call raises Crash instead."""
    calls = iter(range(1, 1000))

    def call(*args: object, **more: object) -> object:
        if next(calls) == nth:
            raise Crash
        return function(*args, **more)

    return call


def test_a_slice_that_is_wanted_whole_is_read_into_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read twice, to be summed and then to be copied; nor from a map, where a file that is cut meanwhile
    kills the process."""
    from engine.checkpoint import load as loading

    monkeypatch.setattr(loading, "_copy", lambda target, values: pytest.fail("copied"))
    save(tmp_path, 1, build(TINY, (1, 1, 1)))
    [rank] = build(TINY, (1, 1, 1), seed=None)
    checkpoint = open_checkpoint(tmp_path / "step-00000001")
    checkpoint.load(rank.entries, expected=logical_shapes(TINY))
    assert all(torch.equal(one.tensor, other.tensor) for one, other in
               zip(rank.entries, build(TINY, (1, 1, 1))[0].entries, strict=True))
    [file] = (tmp_path / "step-00000001").glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(UserError, match=r"\.safetensors was cut short while it was read"):
        checkpoint.load(rank.entries, expected=logical_shapes(TINY))
