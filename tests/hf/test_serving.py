"""What a loaded model's folder says of serving it is kept through training, saving, resuming and export."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import runs

from engine.data.chat import CHATML_TEMPLATE, ChatEncoder
from engine.errors import UserError
from engine.hf import Origin, TokenIds, read_origin
from engine.hf.convert import convert
from engine.hf.serving import generation_config, replaced
from engine.tokenizer import load_tokenizer
from engine.tokenizer.train import train
from engine.tune.rows import Message

OWN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}


def write(folder: Path, **files: Any) -> Path:
    """A folder of JSON files (config=..., generation_config=...) and a chat template."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        if name == "template":
            (folder / "chat_template.jinja").write_text(content)
        else:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_settings_are_kept_and_ends_of_answers_merged(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", config={"eos_token_id": 2, "bos_token_id": 1},
                   generation_config={**SAMPLING, "eos_token_id": [7, 2, 9], "_from_model_config": True})
    origin = read_origin(folder)
    assert origin.ids == TokenIds(1, (7, 2, 9), None) and origin.config == {"eos_token_id": 2, "bos_token_id": 1}
    assert generation_config(TokenIds(5, (2, 11), 4), origin) == {
        **SAMPLING, "eos_token_id": [7, 2, 9, 11], "bos_token_id": 1, "pad_token_id": 4}
    same = TokenIds(1, (2, 9), None)
    assert generation_config(same, origin)["eos_token_id"] == [7, 2, 9]
    assert generation_config(TokenIds(), origin) == {**origin.generation, "bos_token_id": 1}
    assert generation_config(TokenIds(1, (2, 5)), Origin()) == {"bos_token_id": 1, "eos_token_id": [2, 5]}


def test_one_end_alone_stays_a_number(tmp_path: Path) -> None:
    origin = read_origin(write(tmp_path / "hf", generation_config={"eos_token_id": 0}))
    assert generation_config(TokenIds(eos=(0,)), origin) == {"eos_token_id": 0}


def test_a_template_is_found_where_it_stands(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for number, (content, wanted) in enumerate([("X", "X"), (named, "D"), (named[:1], "T"), ([], None), (3, None)]):
        folder = write(tmp_path / str(number), tokenizer_config={"chat_template": content})
        assert read_origin(folder).template == wanted
    assert read_origin(write(tmp_path / "0", template="J")).template == "J"
    assert read_origin(tmp_path / "nowhere") == Origin(str(tmp_path / "nowhere"))


def test_what_is_replaced_is_said_in_one_line(tmp_path: Path) -> None:
    origin = read_origin(write(tmp_path / "hf", config={"eos_token_id": 2}, template=OWN))
    ids = TokenIds(1, (2, 5))
    said = replaced(ids, origin, CHATML_TEMPLATE, "chatml")
    assert said is not None and said.count("\n") == 0
    assert said.endswith("hf: its chat template is replaced by chatml, which this run trains; answers end with id 5 "
                         "beside its own id 2; its other settings are kept")
    assert replaced(TokenIds(1, (2,)), origin, OWN, "chatml") is None
    assert replaced(ids, origin, None, "chatml") is not None, "the end of a turn is added all the same"
    assert replaced(ids, Origin(), CHATML_TEMPLATE, "chatml") is None, "nothing was there to be replaced"


@pytest.mark.parametrize("ends", ["</s>", [1, "x"], True, 1.5, {"a": 1}])
def test_ids_that_are_no_numbers_are_refused(tmp_path: Path, ends: object) -> None:
    with pytest.raises(UserError, match="the special tokens' ids are not whole numbers"):
        read_origin(write(tmp_path / "hf", generation_config={"eos_token_id": ends}))
    with pytest.raises(UserError, match="the special tokens' ids are not whole numbers"):
        read_origin(write(tmp_path / "hf", config={"eos_token_id": ends}, generation_config={"eos_token_id": 2}))


def test_what_stands_outside_the_folder_is_not_read_into_checkpoints(tmp_path: Path) -> None:
    write(tmp_path, secret={"key": "value"})
    folder = write(tmp_path / "hf")
    for name in ("generation_config.json", "chat_template.jinja"):
        (folder / name).symlink_to(tmp_path / "secret.json")
        with pytest.raises(UserError, match=f"{name} is a link out of its folder"):
            read_origin(folder)
        (folder / name).unlink()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of transformers with a chat template, several ends of an answer, and sampling defaults of its own."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("serving") / "Some-Model"
    text = [f"the {n} quick brown foxes jump over {n * 7} lazy dogs" for n in range(400)]
    train(lambda: text, folder, vocab_size=320)
    config = transformers.LlamaConfig(vocab_size=330, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=4, max_position_embeddings=128, bos_token_id=1,
                                      eos_token_id=[2, 9])
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    write(folder, generation_config={**SAMPLING, "bos_token_id": 1, "eos_token_id": [2, 9, 11]}, template=OWN,
          tokenizer_config=settings)
    return folder


def test_conversion_keeps_every_byte_of_serving(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "run", to=None, dtype=None, shard_bytes=10**9, say=lambda line: None)
    convert(tmp_path / "run", tmp_path / "back", to=None, dtype=None, shard_bytes=10**9, say=lambda line: None)
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (model / name).read_bytes()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 9])


def run(module: str, *flags: str | Path) -> str:
    """Runs an entry point to its end; what it said."""
    done = runs.to_the_end("-m", f"engine.{module}", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_tuned_model_is_served_by_transformers_with_what_it_had_and_what_it_learned(
        model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    rows = [{"messages": [{"role": "user", "content": f"jump over {n}"},
                          {"role": "assistant", "content": f"the {n} lazy dogs"}]} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    flags = ["--data", tmp_path / "rows.jsonl", "--out", out, "--global-batch", "4", "--seq-len", "64", "--device",
             "cpu"]
    said = run("finetune", "--load", model, *flags, "--steps", "1")
    assert "Some-Model: its chat template is replaced by chatml" in said and "model          Some-Model: " in said
    said = run("finetune", "--resume", *flags, "--steps", "2")
    assert "replaced" not in said and "model          Some-Model: " in said
    convert(out, tmp_path / "hf", to="hf", dtype=None, shard_bytes=10**9, say=lambda line: None)
    ours = load_tokenizer(str(model))
    served = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config
    assert served.eos_token_id == [2, 9, 11, ours.token_id("<|im_end|>")]
    assert {key: getattr(served, key) for key in SAMPLING} == SAMPLING and served.bos_token_id == 1
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.chat_template == CHATML_TEMPLATE
    found = theirs.apply_chat_template(rows[3]["messages"], return_dict=True)["input_ids"]
    wanted = ChatEncoder(ours).encode([Message(row["role"], row["content"], False) for row in rows[3]["messages"]])[0]
    assert found == wanted
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 9])
