"""How a model is served: its special tokens' ids, its sampling defaults, its chat template. What a loaded model's
folder says of it is kept through training, saving, resuming and export; what a run adds is merged into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.checkpoint.strict_json import read_object
from engine.errors import UserError, shown
from engine.hf.files import plain_file
from engine.tokenizer import Tokenizer

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class TokenIds:
    """Special tokens: `eos` holds every id that ends an answer, the end of a document first."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


@dataclass(frozen=True)
class Origin:
    """What the folder that a model was loaded from says of serving it.

    `config`: the ids in config.json, as they stand; `generation`: generation_config.json; `ids`: the ids of both, the
    latter's first; `template`: the chat template.
    """

    place: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    ids: TokenIds = TokenIds()
    template: str | None = None

    def without_ids(self) -> Origin:
        """The same without special tokens: those of a folder that never had the tokenizer mean nothing to it."""
        kept = {key: value for key, value in self.generation.items() if key not in KEYS}
        return replace(self, config={}, generation=kept, ids=TokenIds())


def token_ids(tokenizer: Tokenizer | None) -> TokenIds:
    """The ids of a tokenizer; the end of a chat turn ends generation too."""
    if tokenizer is None:
        return TokenIds()
    ends = [tokenizer.eos_id, tokenizer.token_id("<|im_end|>")]
    return TokenIds(tokenizer.bos_id, tuple(dict.fromkeys(end for end in ends if end is not None)), tokenizer.pad_id)


def read_origin(folder: Path) -> Origin:
    """What a Hugging Face folder, or the hf folder of a checkpoint, says; UserError for ids that are no numbers."""
    config, generation = _object(folder, CONFIG), _object(folder, GENERATION)
    own = {key: config[key] for key in KEYS if config.get(key) is not None}
    given = {key: generation[key] for key in KEYS if generation.get(key) is not None}
    _ids(own, folder)  # they are kept, so they are checked where generation_config.json has others too
    return Origin(str(folder), own, generation, _ids({**own, **given}, folder), read_template(folder))


def _object(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the folder; an empty object where there is none."""
    return dict(read_object(plain_file(folder, name))) if (folder / name).is_file() else {}


def read_token_ids(folder: Path) -> TokenIds:
    """The special tokens' ids in a Hugging Face folder: generation_config.json's, else config.json's."""
    return read_origin(folder).ids


def _ids(content: Mapping[str, Any], folder: Path) -> TokenIds:
    ends = content.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    bos, pad = content.get("bos_token_id"), content.get("pad_token_id")
    if any(type(number) is not int for number in [*ends, *(n for n in (bos, pad) if n is not None)]):
        raise UserError(f"{shown(folder)}: the special tokens' ids are not whole numbers: {shown(content)}")
    return TokenIds(bos, tuple(dict.fromkeys(ends)), pad)


def read_template(folder: Path) -> str | None:
    """The chat template of a folder: chat_template.jinja, else tokenizer_config.json's (of several the default one)."""
    if (folder / TEMPLATE).is_file():
        try:
            return plain_file(folder, TEMPLATE).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{shown(folder / TEMPLATE)} is not UTF-8") from None
    found = _object(folder, TOKENIZER_CONFIG).get("chat_template")
    if isinstance(found, list):
        named = [item for item in found if isinstance(item, dict)]
        default = [item for item in named if item.get("name") == "default"]
        found = next((item.get("template") for item in [*default, *named]), None)
    return found if isinstance(found, str) else None


def merge_ids(ids: TokenIds, origin: Origin) -> TokenIds:
    """The origin's ids, and what the tokenizer's add: every end of an answer counts, the origin's come first."""
    own = origin.ids
    return TokenIds(ids.bos if own.bos is None else own.bos, tuple(dict.fromkeys([*own.eos, *ids.eos])),
                    ids.pad if own.pad is None else own.pad)


def generation_config(ids: TokenIds, origin: Origin) -> dict[str, Any]:
    """The content of generation_config.json: the origin's settings, and the ids of both."""
    merged, found = merge_ids(ids, origin), dict(origin.generation)
    if merged != origin.ids:
        # It says that config.json holds all there is to know, and transformers may then read that instead.
        found.pop("_from_model_config", None)
    for key, value in zip(KEYS, (merged.bos, list(merged.eos) or None, merged.pad), strict=True):
        if value is not None and _as_list(found.get(key)) != _as_list(value):
            found[key] = value
    return found


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def replaced(ids: TokenIds, origin: Origin, template: str | None, name: str) -> str | None:
    """One line on what of the origin a run changes, or None: its chat template (by `name`) and its ends of answers."""
    said = []
    if template is not None and origin.template not in (None, template):
        said.append(f"its chat template is replaced by {name}, which this run trains")
    more = [number for number in merge_ids(ids, origin).eos if number not in origin.ids.eos]
    if more and origin.ids.eos:
        said.append(f"answers end with {_words(more)} beside its own {_words(origin.ids.eos)}")
    return f"{shown(origin.place)}: {'; '.join(said)}; its other settings are kept" if said else None


def _words(numbers: Sequence[int]) -> str:
    """`id 2`, or `ids 2, 7`."""
    return f"id{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
