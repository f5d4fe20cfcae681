"""-{zh-hans:..;zh-hant:..}-: text given once for each script or region of a language. One of them is taken.

Syntax: https://www.mediawiki.org/wiki/Writing_systems/Syntax.
"""

from __future__ import annotations

import re

PREFERENCE = ("zh-hans", "zh-cn", "zh", "zh-sg", "zh-my", "zh-hant", "zh-tw", "zh-hk", "zh-mo", "sr-ec", "sr-el")
"""The first of these that is given is taken, of other variants the one given first. Text outside of -{..}- is as its
authors typed it, in either script: converting it would need MediaWiki's tables."""

_VARIANT = re.compile(r"-\{([^{}]*+)\}-")
_CODE = r"\s*+(?:[^;:|]*=>)?\s*+([a-z]{2,3}(?:-[a-z]{2,8})*+)\s*+"
_RULE = re.compile(f"{_CODE}:(.*)", re.DOTALL)
_NEXT_RULE = re.compile(f";(?={_CODE.replace('([a-z]', '(?:[a-z]')}:)")
_FLAG = r"\s*+(?:[AHTRDN-]|[a-z]{2,3}(?:-[a-z]{2,8})*+)\s*+"
_FLAGS = re.compile(f"{_FLAG}(?:;{_FLAG})*+\\Z")
_SILENT = frozenset("HT-")  # adds a rule; sets the title; removes a rule


def choose_variants(text: str, everywhere: bool) -> str:
    """One variant of each -{..}- that has no braces in it. everywhere: on a wiki without variants -{text}- is text."""

    def choose(match: re.Match[str]) -> str:
        flags, bar, rules = match[1].partition("|")
        if bar and _FLAGS.match(flags):
            if _SILENT & {flag.strip() for flag in flags.split(";")}:
                return ""
        else:
            rules = match[1]
            if rules and not everywhere and not _RULE.match(rules):
                return match[0]
        return _preferred(rules)

    return _VARIANT.sub(choose, text)


def _preferred(rules: str) -> str:
    given: dict[str, str] = {}
    for rule in _NEXT_RULE.split(rules):
        match = _RULE.match(rule)
        if not match:
            return rules.strip()
        given.setdefault(match[1], match[2].strip().removesuffix(";"))
    return next((given[code] for code in PREFERENCE if code in given), next(iter(given.values())))
