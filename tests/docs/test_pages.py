"""README.md and docs/: links lead somewhere, named files exist, generated regions are up to date, pages stay short."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
NAMED = re.compile(r"(?<![\w./-])((?:engine|kernels|tools|examples|tests|docs|benchmarks)/[\w./-]*\w/?)")
LONGEST = 160


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py, which is no package."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_of_docs_can_be_reached_from_the_readme() -> None:
    linked = {target for target in LINK.findall((ROOT / "README.md").read_text())}
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    links = [target.partition("#")[0] for target in LINK.findall(text) if "://" not in target]
    missing = [target for target in links if not (page.parent / target).exists()]
    missing += [name for name in NAMED.findall(text) if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_regions_are_up_to_date(page: Path, generate: ModuleType) -> None:
    text = page.read_text()
    assert text.count("<!-- generated: ") == len(generate.REGION.findall(text)), "a region has no end"
    assert generate.fill(text) == text, "run `make docs`"


def test_the_pages_hold_what_must_not_be_written_down_twice(generate: ModuleType) -> None:
    held = {match[1].split()[0] for page in PAGES for match in generate.REGION.findall(page.read_text())}
    assert held == set(generate.MAKERS)


def test_a_stale_page_is_named_and_written(generate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- generated: grid 1 1 2 -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    assert generate.main(["--check"]) == 1
    assert "README.md lags behind" in capsys.readouterr().out
    assert "old" in page.read_text()
    assert generate.main([]) == 0
    assert page.read_text() == ("before\n<!-- generated: grid 1 1 2 -->\n```text\nrank 0: pp0 dp0 tp0\n"
                                "rank 1: pp0 dp0 tp1\n```\n<!-- end -->\nafter\n")
    assert generate.main(["--check"]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_read_in_one_sitting(page: Path) -> None:
    # Words of other tools are looked up, not read.
    lines = [line for line in page.read_text().splitlines() if not line.startswith("| `--")]
    assert len(lines) <= LONGEST
    outside = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL).splitlines()
    assert not [line for line in outside if len(line) > 140 and not line.startswith("|")]
