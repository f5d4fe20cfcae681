"""A demonstration corpus out of what every Python brings along: the standard library's own documentation.

The files are parsed, never imported. A module's docstrings become documents of prose with signatures: one for the
module and its functions, one for each class and its methods; the chapters of the language reference that pydoc carries
follow. Names choose what is held back, so the same Python always gives the same bytes. The text is under Python's own
licence (PSF License Agreement).
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError

_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "turtledemo"}
_SHORTEST, _FEWEST_WORDS = 40, 6  # below that a docstring is "Return the name." and teaches nothing
_ONE_IN = 20  # modules, and chapters of the reference, held back
_LONGEST_ANSWER = 700
_QUESTIONS = {
    "module": ("What is the {} module for?", "Describe Python's {} module.", "What does the module {} offer?"),
    "class": ("What is {}?", "Describe the class {}.", "What is the class {} for?"),
    "function": ("What does {} do?", "Explain {}.", "Describe the function {}."),
}


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One documented thing: its dotted name, how it is called, its docstring, and the document it belongs to."""

    kind: str  # module, class or function
    name: str
    signature: str
    text: str
    document: str


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """What is held back whole or not at all: a module or a chapter."""

    name: str
    documents: list[str]
    rows: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class DemoCounts:
    """What was written: documents, pairs of question and answer, and the corpus' size."""

    documents: int
    held_out: int
    instructions: int
    held_out_instructions: int
    megabytes: float


def make_demo(output: Path, megabytes: float) -> DemoCounts:
    """Writes corpus.jsonl, heldout.jsonl, instructions.jsonl, heldout_instructions.jsonl and README.txt to a folder.

    megabytes: where the corpus is cut (the library holds about 2). Raises UserError when the folder cannot be written
    or this Python has no library sources."""
    if megabytes <= 0:
        raise UserError(f"megabytes {megabytes} must be above 0")
    library = Path(sysconfig.get_path("stdlib"))
    units = sorted([*_modules(library), *_chapters(library)], key=lambda unit: _number(unit.name))
    if not units:
        raise UserError(f"{library} holds no documented Python files to make a corpus from")
    kept = [unit for unit in units if _number(unit.name) % _ONE_IN]
    held = [unit for unit in units if _number(unit.name) % _ONE_IN == 0]
    corpus = list(_first([text for unit in kept for text in unit.documents], int(megabytes * 1e6)))
    files = {
        "corpus.jsonl": [{"text": text} for text in corpus],
        "heldout.jsonl": [{"text": text} for unit in held for text in unit.documents],
        "instructions.jsonl": [row for unit in kept for row in unit.rows],
        "heldout_instructions.jsonl": [row for unit in held for row in unit.rows],
    }
    counts = DemoCounts(
        documents=len(files["corpus.jsonl"]),
        held_out=len(files["heldout.jsonl"]),
        instructions=len(files["instructions.jsonl"]),
        held_out_instructions=len(files["heldout_instructions.jsonl"]),
        megabytes=sum(len(text.encode()) for text in corpus) / 1e6,
    )
    _write(output, files, counts)
    return counts


def _modules(library: Path) -> Iterator[_Unit]:
    """Every documented module of the library, in the order of the names; a docstring met before is left out."""
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if _SKIPPED & set(parts) or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        name = ".".join(part for part in parts if part != "__init__")
        entries = [entry for entry in _entries(path, name) if _is_new(entry.text, seen)]
        if entries:
            yield _Unit(name=name, documents=_documents(entries), rows=list(_rows(entries)))


def _is_new(text: str, seen: set[str]) -> bool:
    key = " ".join(text.split()).lower()
    if key in seen:
        return False
    seen.add(key)
    return True


def _entries(path: Path, module: str) -> Iterator[_Entry]:
    """The documented things of one file, in its order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old files hold invalid escapes
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return  # templates and files of another Python
    if text := _docstring(tree):
        yield _Entry(kind="module", name=module, signature=module, text=text, document=module)
    yield from _defined(tree, module, module)


def _defined(scope: ast.Module | ast.ClassDef, prefix: str, document: str) -> Iterator[_Entry]:
    for node in scope.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name, text = f"{prefix}.{node.name}", _docstring(node)
        if isinstance(node, ast.ClassDef):
            if text:
                yield _Entry(kind="class", name=name, signature=f"class {name}", text=text, document=name)
            yield from _defined(node, name, name)
        elif text:
            signature = f"{name}({ast.unparse(node.args)})"
            yield _Entry(kind="function", name=name, signature=signature, text=text, document=document)


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """The docstring, dedented, or None when it is trivial."""
    text = (ast.get_docstring(node) or "").strip()
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return None  # a lone surrogate written as an escape
    return text if len(text) >= _SHORTEST and len(text.split()) >= _FEWEST_WORDS else None


def _documents(entries: Iterable[_Entry]) -> list[str]:
    grouped: dict[str, list[str]] = {}
    for entry in entries:
        grouped.setdefault(entry.document, []).append(f"{entry.signature}\n\n{entry.text}")
    return ["\n\n\n".join(parts) + "\n" for parts in grouped.values()]


def _rows(entries: Iterable[_Entry]) -> Iterator[dict[str, Any]]:
    """Questions about public names, answered by the first paragraph of their documentation or by their signature."""
    for entry in entries:
        answer = _first_paragraph(entry.text)
        if answer is None or any(part.startswith("_") for part in entry.name.split(".")):
            continue
        choices = _QUESTIONS[entry.kind]
        yield _row(choices[_number(entry.name) % len(choices)].format(entry.name), answer)
        if entry.kind == "function" and entry.signature.count(",") >= 1:
            yield _row(f"How is {entry.name} called?", entry.signature)


def _row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _first_paragraph(text: str) -> str | None:
    """The first paragraph as one line, or None when it is no sentence: a signature, an example, a list."""
    answer = " ".join(text.split("\n\n")[0].split())
    if not answer[0].isupper() or not answer.endswith((".", ":")) or "::" in answer or ">>>" in answer:
        return None
    if not _SHORTEST <= len(answer) <= _LONGEST_ANSWER:
        return None
    return answer.removesuffix(":") + "." if answer.endswith(":") else answer


def _chapters(library: Path) -> Iterator[_Unit]:
    """The language reference as pydoc carries it: a literal dict of chapters."""
    path = library / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in ast.parse(path.read_bytes()).body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict):
            seen: set[str] = set()
            for name, text in sorted(ast.literal_eval(value).items()):
                if _is_new(text, seen):
                    yield _Unit(name=f"reference {name}", documents=[text.strip() + "\n"], rows=[])


def _number(name: str) -> int:
    """A fixed number for a name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _first(documents: Iterable[str], limit: int) -> Iterator[str]:
    size = 0
    for text in documents:
        size += len(text.encode("utf-8"))
        if size > limit:
            return
        yield text


def _write(output: Path, files: dict[str, list[dict[str, Any]]], counts: DemoCounts) -> None:
    lines = [f"{name}: {len(rows)} rows" for name, rows in files.items()]
    readme = "\n".join(
        [
            "A demonstration corpus: the documentation inside Python's standard library and language reference.",
            "heldout*.jsonl come from modules and chapters of which nothing is in the other two files.",
            f"The corpus has {counts.megabytes:.2f} MB.",
            *lines,
            "Copyright Python Software Foundation; licence: https://docs.python.org/3/license.html (PSF License).",
            "",
        ]
    )
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, rows in files.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (output / name).write_text(text, encoding="utf-8")
        (output / "README.txt").write_text(readme, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from error
