"""Rules that tell prose from what pages are also made of, in any language: each named, with one threshold, counted.

The rules are Gopher's (Rae et al. 2021, arXiv:2112.11446, A.1.1 and table A1, but its English stop words) and FineWeb's
(Penedo et al. 2024, arXiv:2406.17557, 3.6), with their thresholds unless said below. What they count in words is
counted in units (units.py), 1.6 letters to a word where a script has no spaces, so that the same numbers serve
Chinese, Japanese and Thai. A measure that means nothing for a text is not a number, and no rule fails by it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType

import numpy as np
import regex

from engine.data.units import LETTER, MARK, NUMBER, SPACE, WORDS_IN_CHARACTERS, Units, characters, run_sums, units
from engine.errors import UserError, nearest

SHORT_LINE = 30  # characters; FineWeb
SHORT_LINE_SPACELESS = 10  # Chinese says in a third of the characters what English says
FEW_LINES = 4
"""Fewer say nothing about a text by how they end or how long they are: one is often the whole article."""

_BULLETS = tuple("•●○‣▪■□◦∙·*+-–—›»※")
_ELLIPSES = ("…", "...", "。。。")
_THAI_AND_LAO = range(0x0E00, 0x0F00)


class Measures:
    """What rules ask about one text; everything is computed when first asked for."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, without the space around them."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What stands between blank lines."""
        return [part for part in map(str.strip, self.text.split("\n\n")) if part]

    @cached_property
    def kinds(self) -> np.ndarray:
        return characters(self.text)[1]

    @cached_property
    def units(self) -> Units:
        return units(self.text.lower())

    @cached_property
    def sizes(self) -> np.ndarray:
        """Characters of each unit, int64."""
        return self.units.ends - self.units.starts

    @cached_property
    def spaceless(self) -> int:
        """Letters of scripts without spaces."""
        return int(np.count_nonzero(self.units.spaceless))

    @cached_property
    def is_spaceless(self) -> bool:
        """Whether they are most of the text's units."""
        return 2 * self.spaceless > len(self.sizes)

    @cached_property
    def words(self) -> float:
        return len(self.sizes) - self.spaceless + self.spaceless / WORDS_IN_CHARACTERS

    def word_length(self) -> float:
        """Mean letters and digits of a word; marks are not counted, or words of Indic scripts would be too long."""
        if self.is_spaceless or not len(self.sizes):
            return math.nan
        signs = np.count_nonzero(self.kinds == LETTER) + np.count_nonzero(self.kinds == NUMBER)
        return float(signs) / (len(self.sizes) - self.spaceless)

    def symbols(self) -> float:
        """Number signs, or ellipses, whichever are more, a word."""
        return max(self.text.count("#"), sum(map(self.text.count, _ELLIPSES))) / max(self.words, 1.0)

    def bullets(self) -> float:
        return sum(line.startswith(_BULLETS) for line in self.lines) / max(len(self.lines), 1)

    def ellipses(self) -> float:
        return sum(line.endswith(_ELLIPSES) for line in self.lines) / max(len(self.lines), 1)

    def letters(self) -> float:
        """Share of letters, with their marks, among the characters that are no space."""
        solid = len(self.kinds) - np.count_nonzero(self.kinds == SPACE)
        letters = np.count_nonzero(self.kinds >= MARK) - np.count_nonzero(self.kinds == NUMBER)
        return float(letters) / max(int(solid), 1)

    def line_ends(self) -> float:
        """Share of lines that end as sentences do. Thai and Lao write no sign there."""
        if len(self.lines) < FEW_LINES:
            return math.nan
        if self.is_spaceless:
            codes = characters(self.text)[0]
            own = np.count_nonzero((codes >= _THAI_AND_LAO.start) & (codes < _THAI_AND_LAO.stop))
            if 2 * own > self.spaceless:
                return math.nan
        ends = _sentence_ends()
        return sum(line[-1] in ends for line in self.lines) / len(self.lines)

    def short_lines(self) -> float:
        if len(self.lines) < FEW_LINES:
            return math.nan
        limit = SHORT_LINE_SPACELESS if self.is_spaceless else SHORT_LINE
        return sum(len(line) < limit for line in self.lines) / len(self.lines)

    def top_run(self, words: int, enough: float) -> float:
        """Share of the units' characters that stands in the most frequent run of so many words, above 1 where its
        occurrences overlap; 0 if none occurs twice. Where a quick bound shows that it is at most `enough`, that one."""
        length = self._run_length(words)
        bound = self._most * self._longest(length)
        if bound <= enough:
            return bound
        sums = run_sums(self.units.hashes, length)
        ordered = np.sort(sums)
        starts = np.concatenate([[0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1, [len(sums)]])
        counts = starts[1:] - starts[:-1]
        self._most = int(counts.max())
        bound = self._most * self._longest(length)
        if self._most < 2 or bound <= enough:
            return bound if self._most > 1 else 0.0
        sizes = np.convolve(self.sizes, np.ones(length, np.int64), "valid")[np.argsort(sums)]
        return float(np.add.reduceat(sizes, starts[:-1])[counts == self._most].max()) / self._total

    def repeated_runs(self, words: int, enough: float) -> float:
        """Share of the units' characters that stands in runs of so many words that occurred before. Where the share for
        a shorter run or a quick bound shows that it is at most `enough`, that one."""
        if self._repeated <= max(enough, 0.0):
            return self._repeated
        length = self._run_length(words)
        sums = run_sums(self.units.hashes, length)
        ordered = np.sort(sums)
        self._repeated = np.count_nonzero(ordered[1:] == ordered[:-1]) * self._longest(length)
        if self._repeated > max(enough, 0.0):
            order = np.argsort(sums, kind="stable")
            again = order[1:][sums[order[1:]] == sums[order[:-1]]]
            size = len(self.sizes) + 1
            covered = np.cumsum(np.bincount(again, minlength=size) - np.bincount(again + length, minlength=size))
            self._repeated = float(self.sizes[covered[:-1] > 0].sum()) / self._total
        return self._repeated

    # No longer run occurs more often than a shorter one in it, nor covers more when it occurs again: what was found
    # for one length bounds all that follow.
    _most = sys.maxsize
    _repeated = math.inf

    def _run_length(self, words: int) -> int:
        return round(words * WORDS_IN_CHARACTERS) if self.is_spaceless else words

    @cached_property
    def _total(self) -> int:
        return max(int(self.sizes.sum()), 1)

    @cached_property
    def _biggest(self) -> int:
        return int(self.sizes.max(initial=0))

    def _longest(self, length: int) -> float:
        """At least the share of the units' characters in any one run."""
        return length * self._biggest / self._total


def repeated(parts: Sequence[str], by_characters: bool) -> float:
    """Share of the parts, or of their characters, that came before."""
    if len(parts) == len(unique := set(parts)):
        return 0.0
    if by_characters:
        return 1.0 - sum(map(len, unique)) / sum(map(len, parts))
    return 1.0 - len(unique) / len(parts)


@cache
def _sentence_ends() -> frozenset[str]:
    """What ends a sentence, and the quotation marks and brackets that may stand behind it."""
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    return frozenset(regex.findall(r"[\p{Sentence_Terminal}\p{Pe}\p{Pi}\p{Pf}\"'…]", every))


@dataclass(frozen=True)
class Rule:
    """A text fails where its measure is below (least) or above (most) the threshold."""

    threshold: float
    is_least: bool
    measure: Callable[[Measures, float], float]
    """Called with the threshold, too: how far it needs to look."""
    meaning: str

    def fails(self, measures: Measures, threshold: float) -> bool:
        value = self.measure(measures, threshold)
        return value < threshold if self.is_least else value > threshold


def _least(threshold: float, measure: Callable[[Measures], float], meaning: str) -> Rule:
    return Rule(threshold, True, lambda measures, _: measure(measures), meaning)


def _most(threshold: float, measure: Callable[[Measures], float], meaning: str) -> Rule:
    return Rule(threshold, False, lambda measures, _: measure(measures), meaning)


def _runs(words: int, threshold: float, measure: Callable[[Measures, int, float], float], meaning: str) -> Rule:
    return Rule(threshold, False, lambda measures, enough: measure(measures, words, enough), meaning)


_GOPHER_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

RULES: Mapping[str, Rule] = MappingProxyType({
    "few_words": _least(50, lambda m: m.words, "words"),
    "many_words": _most(100_000, lambda m: m.words, "words"),
    "short_words": _least(3, Measures.word_length, "mean letters of a word"),
    "long_words": _most(10, Measures.word_length, "mean letters of a word"),
    "letters": _least(0.6, Measures.letters, "share of letters among characters"),
    "symbols": _most(0.1, Measures.symbols, "number signs or ellipses a word"),
    "bullets": _most(0.9, Measures.bullets, "share of lines that begin with a bullet"),
    "ellipses": _most(0.3, Measures.ellipses, "share of lines that end with an ellipsis"),
    "line_ends": _least(0.12, Measures.line_ends, "share of lines that end as sentences do"),
    "short_lines": _most(0.67, Measures.short_lines, f"share of lines under {SHORT_LINE} characters"),
    "repeated_lines": _most(0.3, lambda m: repeated(m.lines, False), "share of lines that came before"),
    "repeated_line_characters": _most(0.1, lambda m: repeated(m.lines, True), "the same in characters"),
    "repeated_paragraphs": _most(0.3, lambda m: repeated(m.paragraphs, False), "share of paragraphs that came before"),
    "repeated_paragraph_characters": _most(0.2, lambda m: repeated(m.paragraphs, True), "the same in characters"),
    **{
        f"top_{n}_words": _runs(n, most, Measures.top_run, f"share of the most frequent run of {n} words")
        for n, most in {2: 0.20, 3: 0.18, 4: 0.16}.items()
    },
    **{
        f"repeated_{n}_words": _runs(n, most, Measures.repeated_runs, f"share of runs of {n} words that came before")
        for n, most in _GOPHER_REPEATED.items()
    },
})
"""By name, in the order in which they are asked; the first that fails names the document's fault.

Ours are: `letters` (Gopher wants a letter in 80 % of the words, which says nothing without spaces), closing quotes and
brackets as ends of lines, 10 characters for a short line where a script has no spaces, and no verdict by the ends or
lengths of fewer than 4 lines. `repeated_line_characters` is FineWeb's; Gopher's threshold is 0.2."""

_FINEWEB = ("line_ends", "short_lines", "repeated_line_characters")
GROUPS: Mapping[str, Sequence[str]] = MappingProxyType({
    "default": tuple(RULES),
    "gopher": tuple(name for name in RULES if name not in _FINEWEB),
    "fineweb": _FINEWEB,
})


class Rules:
    """A choice of rules, and thresholds of one's own."""

    def __init__(self, spec: str = "default") -> None:
        """spec: names of rules and groups (default, gopher, fineweb) with commas between; `name=number` gives a rule
        another threshold, `-name` takes it out: "default,few_words=20,-short_lines". Raises UserError."""
        chosen: dict[str, float] = {}
        for item in filter(None, map(str.strip, spec.split(","))):
            name, equals, number = item.removeprefix("-").partition("=")
            for rule in GROUPS.get(name, (name,)):
                if rule not in RULES or (equals and (name in GROUPS or item.startswith("-"))):
                    raise UserError(_unknown(item, name))
                chosen[rule] = _threshold(item, number) if equals else chosen.get(rule, RULES[rule].threshold)
                if item.startswith("-"):
                    del chosen[rule]
        if not chosen:
            raise UserError(f'"{spec}" names no rule; known are {", ".join((*GROUPS, *RULES))}')
        self.thresholds = {name: chosen[name] for name in RULES if name in chosen}
        """Of the chosen rules, in the order in which they are asked."""

    def judge(self, text: str) -> str | None:
        """The name of the first rule that the text fails, None where it passes all."""
        measures = Measures(text)
        failed = (name for name, threshold in self.thresholds.items() if RULES[name].fails(measures, threshold))
        return next(failed, None)

    def measure(self, text: str) -> dict[str, float]:
        """The exact measure of each rule, to choose thresholds by; nan where it means nothing."""
        return {name: RULES[name].measure(Measures(text), -1.0) for name in self.thresholds}


def _threshold(item: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f'"{item}": the threshold must be a number of at least 0')
    return value


def _unknown(item: str, name: str) -> str:
    known = (*GROUPS, *RULES)
    if name in known:
        return f'"{item}": only a rule by its name takes a threshold'
    hint = nearest(name, known)
    return f'"{item}" names no rule; ' + (f"did you mean {hint}?" if hint else f"known are {', '.join(known)}")
