"""Flags and YAML mean one thing, mistakes are named with what to change, and a saved config reads back as it was."""

from __future__ import annotations

import io
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import PRESETS, Layout, ParallelConfig, RunConfig, check, describe, parse, to_dict, to_yaml
from engine.config.flags import from_dict
from engine.config.presets import title
from engine.errors import UserError


def fault(*argv: str, world: int | None = None) -> str:
    """The message that a command line ends with."""
    with pytest.raises(UserError) as caught:
        config = parse(argv)
        if world is not None:
            check(config, world)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400, text
    return text


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def from_yaml(folder: Path, text: str, *flags: str) -> RunConfig:
    return parse(["--config", str(write(folder, text)), *flags])


def test_flags_come_in_every_spelling() -> None:
    plain = parse("--tp 2 --micro-batch 4 --sequence-parallel --lr 1e-4".split())
    assert plain == parse("--parallel.tp=2 --batch.micro_batch=4 --sequence_parallel true --lr=0.0001".split())
    assert (plain.parallel.tp, plain.batch.micro_batch, plain.parallel.sequence_parallel) == (2, 4, True)
    assert plain.optimizer.lr == 1e-4
    assert not parse(["--sequence-parallel", "--no-sequence-parallel"]).parallel.sequence_parallel
    for word in ("--no-recompute=1", "--no-recompute=true"):  # it would be switched on
        with pytest.raises(UserError, match="^--no-recompute takes no value$"):
            parse([word])
    for words in (["--no-tp", "2"], ["--no-tp=2"], ["--no-data=x"]):  # it would be --tp 2
        with pytest.raises(UserError, match="^unknown option --no-"):
            parse(words)
    assert parse(["--tp", "2", "--tp", "4"]).parallel.tp == 4, "the later flag wins"


@pytest.mark.parametrize(("words", "wanted"), [
    ("", "none"), ("--recompute", "full"), ("--recompute --tp 2", "full"), ("--no-recompute", "none"),
    ("--recompute true", "full"), ("--recompute=false", "none"), ("--recompute selective", "selective"),
    ("--recompute=full:12 --tp 2", "full:12"), ("--recompute auto", "auto"), ("--recompute --no-recompute", "none")])
def test_recompute_is_a_word_and_may_stand_alone_as_it_once_did(tmp_path: Path, words: str, wanted: str) -> None:
    config = parse(words.split())
    check(config, config.parallel.tp)
    assert config.runtime.recompute == wanted
    for old, now in (("true", "full"), ("false", "none"), ("full:3", "full:3"), ("none", "none")):
        assert from_yaml(tmp_path, f"runtime: {{recompute: {old}}}").runtime.recompute == now


@pytest.mark.parametrize(("value", "words"), [
    ("some", "--recompute 'some' is not known; use none, selective, full, full:N or auto"),
    ("full:0", "--recompute full:0: N is a number of blocks, from 1"), ("full:99999", "from 1 to 16384"),
    ("full:-1", "is not known"), ("selective:2", "is not known"), ("", "--recompute is empty")])
def test_a_recompute_that_is_none_is_refused(value: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        check(parse([f"--recompute={value}"]), 1)


def test_several_files_are_repeated_or_joined_by_commas(tmp_path: Path) -> None:
    asked = parse("--data a.jsonl --data b.jsonl --valid-data=c --valid-data d,e --tokenizer t --tokenizer u".split())
    assert (asked.data.data, asked.data.valid_data, asked.data.tokenizer) == ("a.jsonl,b.jsonl", "c,d,e", "u")
    assert from_yaml(tmp_path, "data: {data: [a.jsonl, b.jsonl]}").data.data == "a.jsonl,b.jsonl"
    assert from_yaml(tmp_path, "data: {data: [a, b]}", "--data", "c").data.data == "c", "flags win over the file"
    assert "--data must be a str, not a list" in fault("--config", str(write(tmp_path, "data: {data: [[a], b]}")))


def test_yaml_means_what_the_same_flag_means(tmp_path: Path) -> None:
    config = from_yaml(tmp_path, "steps: 010\nwarmup: 1_0\nout: 007\ntokenizer: no\nresume: on\ntied: off")
    assert (config.batch.steps, config.optimizer.warmup) == (10, 10), "not 8, which is YAML 1.1's octal"
    assert (config.save.out, config.data.tokenizer) == ("007", "no"), "not 7 and not False"
    assert config.save.resume and not config.model.tied
    assert from_yaml(tmp_path, "min_lr: ~").optimizer.min_lr is None


def test_an_empty_value_is_not_the_default(tmp_path: Path) -> None:
    for flag in ("--config", "--load", "--tokenizer", "--out"):
        with pytest.raises(UserError, match=f"{flag} is empty"):
            parse([flag, ""])


def test_a_file_without_an_end_is_not_read_to_its_end() -> None:
    assert "larger than 1 MiB" in fault("--config", "/dev/zero")


def test_a_config_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"tp: 2\n")))
    assert parse(["--config", "-", "--pp", "3"]).parallel == ParallelConfig(tp=2, pp=3)
    assert "standard input is empty" in fault("--config", "-"), "it has been read"


def test_of_several_config_files_the_later_wins(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text("tp: 2\npp: 2")
    config = from_yaml(tmp_path, "tp: 4")
    config = parse(["--config", str(tmp_path / "first.yaml"), "--config", str(tmp_path / "run.yaml")])
    assert (config.parallel.tp, config.parallel.pp) == (4, 2)


def test_numbers_keep_their_value() -> None:
    assert parse(["--seed", "9007199254740993"]).runtime.seed == 9007199254740993
    assert parse(["--steps", "250_000"]).batch.steps == 250000
    assert parse(["--steps", "1e3"]).batch.steps == 1000
    assert parse(["--min-lr", "none"]).optimizer.min_lr is None


def test_yaml_is_flat_or_grouped_and_flags_win(tmp_path: Path) -> None:
    text = "model: 125m\nparallel:\n  tp: 2\nlr: 1e-4\nbatch: {steps: 7}\nqk_norm: yes\n"
    config = from_yaml(tmp_path, text, "--steps", "9")
    assert (config.model.model, config.model.hidden, config.model.qk_norm) == ("125m", 768, True)
    assert (config.parallel.tp, config.batch.steps) == (2, 9)
    assert config.optimizer.lr == 1e-4, "YAML 1.1 reads 1e-4 as text"
    assert from_yaml(tmp_path, "") == RunConfig(model=parse([]).model)
    assert from_yaml(tmp_path, "model: {model: 7b, layers: 2}").model.layers == 2


@pytest.mark.parametrize(("text", "words"), [
    ("!!python/object/apply:os.system ['touch HERE']", "is not YAML"), ("lr: !foo 1", "line 1 has the tag !foo"),
    ("tp: 2\npp: 1\ntp: 4", "has 'tp' twice, again in line 3"),
    ("batch: {steps: 1}\nbatch: {seq_len: 2}", "'batch' twice"),
    ("tp: 2\nparallel: {tp: 4}", "says tp twice, again as parallel.tp"), ("seq-len: 2\nseq_len: 4", "seq_len twice"),
    ("steps: 1:30", "--steps '1:30' is not a number"), ("steps: 0x10", "'0x10' is not a number"),
    ("out: \"a\\0b\"", "has a NUL character"), ("lr: .nan", "not a number"), ("tp: 2\n---\npp: 3", "is not YAML"),
    ("lr: !!python/name:os.system", "is not YAML"),
    ("lr: &a 1\nwarmup: *a", "aliases"),
    ("a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a]\nlr: [*b,*b,*b,*b]", "aliases"),
    ("a: &a {x: 1}\nb: &b {<<: [*a,*a,*a,*a]}\nc: {<<: [*b,*b,*b]}", "aliases"),
    ("lr: " + "[" * 5000, "nested too deeply"),
    ("- tp\n- 2", "must hold key: value lines, not a list"),
    ("lr: [1, 2]", "--lr must be a float, not a list"),
    ("parallel: 2", "unknown option --parallel"),
    ("tp: 2\n  pp: 3", "is not YAML"),
    ("lr: 2001-99-99", "is not a number"),
    ("steps: 2001-09-09", "is not a number"),
    ("tp: null", "--tp needs a value"),
    ("? [a]\n: b", "is not YAML"),
    ("\x00", "is not YAML"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea\nsize 159\n", "is a pointer of Git LFS, not the "
     "file of 159 bytes that it stands for"),
    ("1: 2", "unknown option --1"),
    ("optimizer: {tp: 2}", "unknown option --optimizer.tp"),
])
def test_hostile_yaml_is_one_line_and_runs_nothing(tmp_path: Path, text: str, words: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    assert words in fault("--config", "run.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_config_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    assert "No such file" in fault("--config", str(tmp_path / "none.yaml"))
    assert "Is a directory" in fault("--config", str(tmp_path))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00tp")
    assert "is not YAML" in fault("--config", str(tmp_path / "bytes.yaml"))


@pytest.mark.parametrize(("argv", "message"), [
    ("--learning-rate 1", "unknown option --learning-rate"), ("--micro-bath 2", "did you mean --micro-batch?"),
    ("--warm-up 2", "did you mean --warmup?"), ("--optimizer.tp 2", "unknown option --optimizer.tp"),
    ("tp 2", "unexpected argument 'tp'"), ("--tp", "--tp needs a value"), ("--tp --pp 2", "--tp needs a value"),
    ("--tp two", "--tp 'two' is not a number"), ("--tp 1.5", "--tp '1.5' is not a whole number"),
    ("--lr nan", "--lr 'nan' is not a finite number"), ("--lr 1e999", "not a finite number"),
    ("--tied maybe --tp 2", "unexpected argument 'maybe'"), ("--tied=maybe", "--tied 'maybe' is not true or false"),
    ("--model 7B", "did you mean 7b?"), ("--model gigantic", "use one of tiny, 125m"),
    ("--model 3b", "use one of tiny, 125m"), ("--model gpt3", "--model 'gpt3' is not a preset; use one of tiny"),
    ("-tp 2", "unexpected argument"),
    ("--config", "--config needs a value"), ("--config=", "--config is empty"), ("--load=", "--load is empty"),
])
def test_a_flag_that_cannot_be_read(argv: str, message: str) -> None:
    assert message in fault(*argv.split())


@pytest.mark.parametrize(("argv", "world", "message"), [
    ("--heads 30 --kv-heads 30 --tp 4", 4, "heads 30 is not divisible by tp 4; use --tp 1, 2, 3, 5 or 6"),
    ("--tp 2", 3, "3 processes cannot hold tp 2 x pp 1 = 2; start a multiple of 2 processes"),
    ("--tp 2 --pp 2", 1, "1 process cannot hold tp 2 x pp 2 = 4"),
    ("--tp 0", 1, "--tp 0 must be at least 1"), ("--pp -1", 1, "--pp -1 must be at least 1"),
    ("--cp 2", 1, "--cp 2: context parallelism is not available yet"),
    ("--heads 6 --kv-heads 4", 1, "heads 6 is not divisible by kv-heads 4; use --kv-heads 1, 2, 3 or 6"),
    ("--heads 12 --kv-heads 4 --head-dim 16 --tp 6", 6, "kv-heads 4 and tp 6: one must divide the other"),
    ("--ffn-hidden 100 --tp 8", 8, "ffn-hidden 100 is not divisible by tp 8; use --tp 1, 2, 4 or 5"),
    ("--head-dim 7", 1, "head-dim 7 is odd, and RoPE rotates pairs; use --head-dim 8"),
    ("--layers 3 --pp 4", 4, "layers 3 are fewer than pp 4 x virtual-stages 1 = 4 stages"),
    ("--virtual-stages 2 --pp 2", 2, "use --schedule interleaved"), ("--layers 0", 1, "--layers 0 must be at least 1"),
    ("--vocab-size 1e12", 1, "beyond any model"), ("--layers 1e9", 1, "beyond any model"),
    ("--sequence-parallel --tp 2 --seq-len 33", 2, "use --seq-len 34"),
    ("--global-batch 6 --micro-batch 4", 1, "not divisible by micro-batch 4 x dp 1 = 4; use --global-batch 8"),
    ("--global-batch 6", 4, "global-batch 6 is not divisible by micro-batch 1 x dp 4 = 4; use --global-batch 8"),
    ("--seq-len 5000", 1, "seq-len 5000 is longer than the model's positions 4096"),
    ("--lr -1e-3", 1, "--lr -0.001 must be at least 0"), ("--clip -1", 1, "--clip -1.0 must be at least 0"),
    ("--min-lr -1", 1, "--min-lr -1.0 must be at least 0"), ("--weight-decay -1", 1, "--weight-decay -1.0 must be"),
    ("--min-lr 1", 1, "--min-lr 1.0 is above --lr 0.0003"),
    ("--beta1 1", 1, "--beta1 1.0 must be at least 0 and below 1"),
    ("--steps 0", 1, "--steps 0 must be at least 1"), ("--save-every -1", 1, "--save-every -1 must be at least 0"),
    ("--log-every 0", 1, "--log-every 0 must be at least 1"), ("--timeout 0", 1, "--timeout 0 must be above 0"),
    ("--split 1", 1, "--split 1.0 must be at least 0 and below 1"), ("--seed -1", 1, "--seed -1 must be at least 0"),
    ("--norm-eps -1", 1, "--norm-eps -1.0 must be"), ("--rope-theta 0", 1, "--rope-theta 0.0 must be above 0"),
    ("--dtype fp16", 1, "use --dtype bf16 or fp32"), ("--dtype float32", 1, "--dtype 'float32' is not known"),
    ("--schedule 1f1", 1, "did you mean 1f1b?"), ("--attention flash", 1, "use auto, triton, sdpa, reference"),
    ("--family gptj", 1, "use llama, gpt2"), ("--decay cosin", 1, "did you mean cosine?"),
])
def test_a_rule_that_is_broken_names_flag_numbers_and_cure(argv: str, world: int, message: str) -> None:
    assert message in fault(*argv.split(), world=world)


def test_the_cure_of_a_message_is_one() -> None:
    for tp in (1, 2, 3, 5, 6):
        flags = f"--heads 30 --kv-heads 30 --head-dim 8 --ffn-hidden 690 --tp {tp}".split()
        assert check(parse(flags), tp) == Layout(tp=tp)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_sound_and_one_field_overrides_it(name: str) -> None:
    config = parse(["--model", name, "--layers", "3"])
    assert check(config, 1) == Layout()
    assert config.model.layers == 3 and config.model.hidden == PRESETS[name]["hidden"]
    assert config.model.head_dim * config.model.heads == config.model.hidden


def test_heads_and_hidden_move_what_hangs_on_them() -> None:
    assert parse(["--model", "7b", "--heads", "16"]).model.kv_heads == 16
    assert parse(["--model", "7b", "--hidden", "2048"]).model.head_dim == 64
    assert parse(["--model", "8b", "--heads", "64"]).model.kv_heads == 8, "grouping stays"
    assert parse(["--model", "7b", "--heads", "16", "--kv-heads", "4"]).model.kv_heads == 4


@pytest.mark.parametrize("argv", [
    "", "--model 7b --tied --rope-theta 5e5", "--lr 1e-5 --min-lr 1e-7 --data a:0.5,b:0.5 --seed 18446744073709551615",
    "--model gpt2 --dtype bf16 --recompute full:3 --sequence-parallel --tp 4 --stop-after 3 --tokenizer no --out null",
])
def test_a_saved_config_reads_back_as_it_was(tmp_path: Path, argv: str) -> None:
    config = parse(argv.split())
    assert from_yaml(tmp_path, to_yaml(config)) == config
    assert from_dict(to_dict(config)) == config


def test_a_model_of_any_name_reads_back_where_its_config_says_all_sizes(tmp_path: Path) -> None:
    config = parse([])
    config = replace(config, model=replace(config.model, model="org/Some-Model"))
    assert from_yaml(tmp_path, to_yaml(config)) == config and from_dict(to_dict(config)) == config
    loaded = parse(["--max-positions", "64"], config.model)
    assert (loaded.model.model, loaded.model.max_positions) == ("org/Some-Model", 64)
    assert parse(["--model", "tiny"], config.model).model.model == "org/Some-Model"
    with pytest.raises(UserError, match="a loaded model keeps its own name, so leave the flag out"):
        parse(["--model", "mine"], config.model)


def test_a_report_says_what_was_changed_of_a_preset() -> None:
    def called(flags: str) -> str:
        return title(parse(flags.split()).model)

    assert called("") == "tiny" and called("--model 7b --vocab-size 99 --max-positions 512") == "7b"
    assert called("--layers 12") == "tiny with layers 12"
    assert called("--layers 12 --hidden 64") == "tiny with layers 12, hidden 64, head-dim 8"
    flags = "--layers 9 --hidden 64 --ffn-hidden 8 --heads 4"
    assert called(flags) == "tiny with layers 9, hidden 64, ffn-hidden 8, 2 more"
    assert title(replace(parse(["--layers", "9"]).model, model="org/Some-Model")) == "org/Some-Model"


@pytest.mark.parametrize("content", [{"model": 3}, {"nothing": {}}, {"model": {"laers": 1}}, {"batch": {"steps": []}}])
def test_a_damaged_config_in_a_checkpoint_is_an_error(content: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        from_dict(content)


def test_help_describes_every_flag() -> None:
    text = describe()
    for group in fields(RunConfig):
        for item in fields(type(getattr(RunConfig(), group.name))):
            flag = f"--{item.name.replace('_', '-')} "
            line = next(line for line in text.splitlines() if line.strip().startswith(flag))
            assert len(line.split()) > 2, f"{item.name} has no help"
