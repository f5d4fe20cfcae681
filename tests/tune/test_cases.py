"""Rows as people bring them: each file of cases/ is read as it should be, or refused by the name of what is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from engine.data.chat import ChatEncoder, Message
from engine.errors import UserError
from engine.tokenizer import Tokenizer
from engine.tune.encoded import check_files, encode_files
from engine.tune.files import read_chats

CASES = Path(__file__).parent / "cases"
HI, YES = Message("user", "hi"), Message("assistant", "yes", True)
SAY = Message("user", "say")

READ: Mapping[str, list[list[Message]]] = MappingProxyType({
    "01_gz.jsonl.gz": [[HI, YES]] * 2,  # two members
    "02_zst.jsonl.zst": [[HI, YES]],
    "03_bz2.jsonl.bz2": [[HI, YES]],
    "04.parquet": [[HI, YES]],
    "05_pretty_object.json": [[HI, YES]],
    "06_data_key.json": [[HI, YES]],
    "07_list_per_line.jsonl": [[HI, YES]] * 2,
    "08_pretty_array.json": [[HI, YES]] * 2,
    "09_utf16.jsonl": [[HI, YES]],
    "22_two_users.jsonl": [[HI, Message("user", "there"), YES]],
    "23_two_assistants.jsonl": [[HI, YES, Message("assistant", "and no", True)]],
    "24_assistant_first.jsonl": [[Message("assistant", "welcome", True), HI, YES]],
    "25_system_late.jsonl": [[HI, YES, Message("system", "x"), Message("user", "q"), Message("assistant", "w", True)]],
    "26_content_list_mixed.jsonl": [[Message("user", "ab"), Message("assistant", "c", True)]],
    "27_null_content.jsonl": [[Message("user", ""), Message("assistant", "x", True)]],
    "28_null_extra_keys.jsonl": [[HI, YES]],
    "29_tools_null.jsonl": [[HI, YES]],
    "30_tools_empty_string.jsonl": [[HI, YES]],
    "31_role_upper.jsonl": [[HI, YES]],
    "32_role_model.jsonl": [[HI, YES]],
    "33_role_developer.jsonl": [[Message("system", "be brief"), HI, YES]],
    "34_role_ipython.jsonl": [[HI, Message("tool", "4"), YES]],
    "36_conv_bing.jsonl": [[HI, YES]],
    "37_conv_assistant_system.jsonl": [[Message("system", "s"), HI, YES]],
    "38_alpaca_empty_input.jsonl": [[SAY, YES]],
    "40_alpaca_null_input.jsonl": [[SAY, YES]],
    "44_number_answer.jsonl": [[Message("user", "2+2?"), Message("assistant", "4", True)]],
    "47_prompt_messages_both.jsonl": [[HI, YES]],
    "50_nan.jsonl": [[HI, YES]],
    "52_name_field.jsonl": [[HI, YES]],
})
UNUSED: Mapping[str, set[str]] = MappingProxyType({
    "36_conv_bing.jsonl": {"id"}, "47_prompt_messages_both.jsonl": {"prompt", "prompt_id"},
    "52_name_field.jsonl": {"name"}})
"""Keys that a run says it has not read."""

REFUSED: Mapping[str, str] = MappingProxyType({
    "10_trailing_comma.json": r"row 2 \(line 3\): not JSON: a comma with nothing behind it",
    "20_system_only.jsonl": "none of its 1 rows has anything to learn",
    "21_empty_assistant.jsonl": "none of its 1 rows has anything to learn.*1 of its answers are empty",
    "35_system_key_and_message.jsonl": 'line 1: "system" and the first message are two system messages that differ',
    "39_alpaca_empty_output.jsonl": "none of its 1 rows has anything to learn.*1 of its answers are empty",
    "41_dolly.jsonl": 'line 1: "context" holds content.*--ignore-keys context',
    "42_text_only.jsonl": "line 1: no known kind of row.*plain text is for engine.pretrain",
    "43_empty_messages.jsonl": 'line 1: "messages" holds no message',
    "45_gsm8k_extra.jsonl": 'line 1: "context" holds content',
    "46_squad.jsonl": 'line 1: "context" holds content',
    "48_history_alpaca.jsonl": 'line 1: "history" holds content',
    "49_choices.jsonl": 'line 1: "choices" holds content',
    "51_weight_half.jsonl": r'line 1: message 2 \(assistant\): "weight" is 0.5',
    "53_thinking_part.jsonl": r"line 1: message 2 \(assistant\): content has a part of type 'thinking'",
})


def test_each_case_is_in_one_table() -> None:
    assert {path.name for path in CASES.iterdir()} == READ.keys() | REFUSED.keys()
    assert len(READ) + len(REFUSED) == 44


@pytest.mark.parametrize("name", READ)
def test_a_case_is_read(name: str, tokenizer: Tokenizer) -> None:
    if name == "04.parquet":
        pytest.importorskip("pyarrow")
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    chats = list(read_chats([CASES / name]))
    assert [chat.messages for chat in chats] == READ[name]
    assert set().union(*(chat.unused for chat in chats)) == UNUSED.get(name, set())
    check_files([CASES / name], 64)
    rows, tally = encode_files([CASES / name], ChatEncoder(tokenizer), 64)
    assert len(rows) == tally.rows == len(chats) and rows.supervised > 0
    assert all(key in tally.summary() for key in UNUSED.get(name, ()))


@pytest.mark.parametrize("name", REFUSED)
def test_a_case_is_refused_by_name(name: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError) as caught:
        encode_files([CASES / name], ChatEncoder(tokenizer), 64)
    assert re.search(f"{re.escape(name)}.*{REFUSED[name]}", str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=re.escape(str(caught.value))):
        check_files([CASES / name], 64)
