"""A network we do not compute is refused by its own name, and a model that is loaded keeps the name it has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.config import ModelConfig
from engine.errors import UserError
from engine.hf import TokenIds, config_from_hf, config_to_hf
from engine.hf.config import FAMILIES, model_name
from engine.hf.unsupported import UNSUPPORTED

TINY = config_to_hf(ModelConfig(layers=2, hidden=8, ffn_hidden=12, heads=2, kv_heads=1, head_dim=4, vocab_size=11),
                    TokenIds())
REMOTE = {"deepseek", "grok-1", "bailing_moe", "kimi_k2", "kimi_linear", "arctic", "minicpm", "chatglm", "baichuan",
          "internlm", "internlm2", "internlm3", "qwen", "xverse", "aquila"}
"""Their code comes with the model; transformers does not know the name."""


def refusal(kind: object) -> str:
    """What is said of a config.json with this model_type."""
    with pytest.raises(UserError) as caught:
        config_from_hf({**TINY, "model_type": kind})
    return str(caught.value)


@pytest.mark.parametrize(("kind", "words"), [
    ("mixtral", "the model family mixtral is known, but not supported (it has a mixture of experts); Triax computes"),
    ("qwen3_moe", "the model family qwen3_moe is known, but not supported (it has a mixture of experts)"),
    ("gemma2", "the model family gemma2 is known, but not supported; Triax computes llama, mistral, "
     "qwen2, qwen3, gpt2"),
    ("qwen9", "the model_type 'qwen9' is not supported; Triax computes"), ("x" * 999, "(959 characters more)' is not"),
    (7, "the model_type '7' is not supported"), ("mixtral\n\x1b[1m", "'mixtral\\n\\x1b[1m' is not supported"),
])
def test_a_family_that_is_not_computed_is_named_and_no_other_proposed(kind: object, words: str) -> None:
    said = refusal(kind)
    assert words in said and "did you mean" not in said


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_no_known_family_leads_to_another(kind: str) -> None:
    assert f"the model family {kind} is known, but not supported" in refusal(kind)
    assert kind not in [word for family in FAMILIES.values() for word in family.model_types]


def test_the_names_of_families_are_those_of_transformers() -> None:
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    known = set(auto.CONFIG_MAPPING_NAMES)
    # An older transformers lacks the newest families; half of the names suffices to see that they are real ones.
    assert {"mixtral", "gemma2", "qwen2_moe"} <= set(UNSUPPORTED) & known
    assert len(set(UNSUPPORTED) - REMOTE - known) <= len(UNSUPPORTED) // 4


def test_a_folder_gives_its_name_to_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--Some-Model" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    assert model_name(snapshot) == "org/Some-Model"
    monkeypatch.chdir(tmp_path)
    os.symlink(snapshot, tmp_path / "mine")
    assert (model_name(Path("mine")), model_name(Path("./a/.."))) == ("mine", tmp_path.name)
    assert model_name(Path("x" * 250)).endswith("(190 characters more)") and model_name(Path("a\nb")) == "a\\nb"
    assert model_name(Path("/")) == "model"
