"""The few templates that are part of a sentence, and what text stands for them. All others are dropped.

We don't expand templates: their pages are elsewhere in a dump, and what most of them make (boxes, notes, navigation,
maintenance notices) is not prose. Kept is what a sentence would miss:

* the text that is only marked up: {{lang|de|Wort}}, {{lang-de|Wort}}, {{nowrap|5 km}}, {{small|..}}, {{abbr|CPU|..}};
* quotations set off from the text: {{quote|..}}; short lists: {{hlist|a|b}}, {{ubl|a|b}};
* numbers and dates: {{convert|5|km|mi}} is "5 km", {{frac|1|2}}, {{val|6.2|e=18}}, {{as of|2014|lc=y}}, {{circa|1500}};
* characters: {{mdash}}, {{snd}}, {{'}}, {{nbsp}}; names: {{HMS|Ajax|22}}, {{nihongo|..}}, {{ill|..}}, {{flag|..}};
* some of the German, French and Chinese Wikipedias (on those), and on any Wiktionary its links, labels and forms.

What the templates do was read from their documentation on en.wikipedia.org/wiki/Template:NAME and its sisters.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from engine.data.wiki.site import Site


class Arguments:
    """The parameters of a template: numbered and named, white space around them gone."""

    def __init__(self, text: str) -> None:
        self.named: dict[str, str] = {}
        number = 0
        for argument in text.split("|") if text else ():
            key, equals, value = argument.partition("=")
            if not equals:
                number += 1
                key, value = str(number), argument
            self.named[key.strip()] = value.strip()
        self.count = number

    def __getitem__(self, key: int | str) -> str:
        return self.named.get(str(key), "")

    def numbered(self) -> list[str]:
        """The numbered ones that are not empty."""
        return [value for value in (self[number] for number in range(1, self.count + 1)) if value]


Rule = Callable[[Arguments], str]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _block(text: str) -> str:
    """A text on lines of its own."""
    return f"\n{text}\n" if text else ""


def _quoted(arguments: Arguments) -> str:
    return _block(arguments["text"] or arguments["quote"] or arguments[1])


_RANGE_WORDS = {
    "to": " to ", "-": "–", "–": "–", "to-": "–", "to(-)": " to ", "and": " and ", "or": " or ", "by": " by ",
    "x": " × ", "×": " × ", "*": " × ", "+/-": " ± ", "±": " ± ", "+": " + ", ",": ", ", "and(-)": " and ",
}  # fmt: skip
_UNITS = {"C": "°C", "F": "°F", "sqmi": "sq mi", "sqft": "sq ft", "sqkm": "km²", "km2": "km²", "m2": "m²", "cuft": "cu ft",
          "km3": "km³", "m3": "m³", "cm2": "cm²", "cumi": "cu mi"}  # fmt: skip
_NUMBER = re.compile(r"[-+−–]?[\d.,/]+(?:e[-+]?\d+)?\Z")


def _convert(arguments: Arguments) -> str:
    """The first measure, with its unit, of {{convert|6|ft|4|in|m}} or {{convert|5|to|10|km|mi}}."""
    words = arguments.numbered()[:8]
    out, at = "", 0
    while at < len(words) and _NUMBER.match(words[at]):
        out += words[at]
        following = words[at + 1] if at + 1 < len(words) else ""
        if following in _RANGE_WORDS:
            out += _RANGE_WORDS[following]
        elif following:
            out += f" {_UNITS.get(following, following)}"
            compound = at + 3 < len(words) and _NUMBER.match(words[at + 2]) and words[at + 3] in ("in", "oz", "lb", "yd", "ft")
            if not compound:
                break
            out += " "
        at += 2
    return out or (words[0] if words else "")


def _fraction(arguments: Arguments) -> str:
    parts = arguments.numbered()
    if len(parts) == 3:
        return f"{parts[0]} {parts[1]}/{parts[2]}"
    return "/".join(parts) if len(parts) == 2 else f"1/{parts[0]}" if parts else ""


def _value(arguments: Arguments) -> str:
    power = f"×10^{arguments['e']}" if arguments["e"] else ""
    unit = arguments["u"] or arguments["ul"]
    return f"{arguments[1]}{power}{' ' + unit if unit else ''}"


_MONTHS = _names(", January, February, March, April, May, June, July, August, September, October, November, December")


def _as_of(arguments: Arguments) -> str:
    month = arguments[2]
    if month.isdecimal() and int(month) <= 12:
        month = _MONTHS[int(month)]
    date = " ".join(part for part in (arguments[3], month, arguments[1]) if part)
    return arguments["alt"] or f"{'as of' if arguments['lc'] else 'As of'} {date}"


def _nihongo(arguments: Arguments) -> str:
    detail = ", ".join(part for part in (arguments[2], arguments[3]) if part)
    return f"{arguments[1]} ({detail})" if arguments[1] and detail else arguments[1] or detail


def _argument(number: int) -> Rule:
    return lambda arguments: arguments[number]


def _joined(mark: str) -> Rule:
    return lambda arguments: mark.join(arguments.numbered())


def _before(text: str) -> Rule:
    return lambda arguments: f"{text}{arguments[1]}" if arguments[1] else ""


def _constant(text: str) -> Rule:
    return lambda arguments: text


def _last(arguments: Arguments) -> str:
    return (arguments.numbered() or [""])[-1]


def _rules() -> dict[str, Rule]:
    """The rules that hold on any wiki, by the template's name in lower case."""
    rules: dict[str, Rule] = {}
    first = """nowrap, nobr, nobold, noitalic, normal, small, smaller, big, large, larger, midsize, em, strong, bold, italic, abbr,
        tooltip, sic, sup, sub, smallcaps, sc, code, kbd, samp, tt, mono, var, mvar, not a typo, as written, proper name,
        ill, interlanguage link, interlanguage link multi, vanchor, visible anchor, flag, flagu, flagcountry, nts, formatnum,
        formnum, format price, le, lj, link-interwiki, center, centered, script, nihongo2, native name, nq, rail gauge, railgauge"""
    rules |= {name: _argument(1) for name in _names(first)}
    rules |= {name: _argument(2) for name in _names("lang, langx, rtl-lang, wikt-lang, color, font color, resize, audio")}
    rules |= {name: _last for name in _names("transl, transliteration, tlit")}
    rules |= {name: _quoted for name in _names("quote, blockquote, cquote, bquote, quotation, poemquote, zitat")}
    blocks = "plainlist, flatlist, columns-list, columns list, poem, block indent"
    rules |= {name: lambda arguments: _block(_last(arguments)) for name in _names(blocks)}
    rules |= {name: _joined("\n") for name in _names("ubl, unbulleted list, bulleted list, ordered list")}
    rules |= {"hlist": _joined(", "), "linktext": _joined(""), "chem": _joined(""), "chem2": _joined(""), "gaps": _joined("")}
    rules |= {name: _convert for name in _names("convert, cvt")}
    rules |= {name: _fraction for name in _names("frac, sfrac, fraction")}
    rules |= {name: _nihongo for name in _names("nihongo, nihongo4, nihongo krt")}
    rules |= {"val": _value, "as of": _as_of, "bibleverse": _joined(" "), "bibleref": _joined(" "), "ship": _ship}
    prefixes = {"c. ": "circa, c., ca.", "fl. ": "floruit, fl.", "née ": "née, nee", "US$": "us$, usd", "₹": "inr, ₹",
                "£": "£, gbp", "€": "€, eur", "ISBN ": "isbn", "ISSN ": "issn", "OCLC ": "oclc"}  # fmt: skip
    for prefix, names in prefixes.items():
        rules |= {name: _before(prefix) for name in _names(names)}
    for name in _names("HMS, USS, SS, RMS, HMAS, HMCS, HMNZS, INS, SMS, USCGC, USNS, MV, MS"):
        rules[name.lower()] = _before(f"{name} ")
    constants = {"—": "mdash, em dash, emdash, mdashb, —", "–": "ndash, en dash, endash, –", " ": "nbsp, space, thinsp, nnbsp",
                 " – ": "snd, snds, spnd, spaced ndash, spaced en dash, spaced endash", " · ": "dot, ·, •, middot, bullet",
                 "'": "', ’", "'s": "'s", '"': '-"', "'\"": "' \"", "|": "!", "=": "="}  # fmt: skip
    for text, names in constants.items():
        rules |= {name: _constant(text) for name in _names(names)}
    rules |= {"\n|}\n": _constant("\n|}\n")} | {name: _constant("\n|}\n") for name in _names("end, table end, s-end")}
    rules['"'] = lambda arguments: f'"{arguments[1]}"' if arguments[1] else ""
    rules["ipa"] = lambda arguments: arguments[1] if arguments.count == 1 else ""  # two: how a name is pronounced
    rules |= {name: lambda arguments: f"⟨{arguments[1]}⟩" for name in _names("angbr, vr, angle bracket")}
    rules |= {"e": _before("×10^"), "x10^": _before("×10^"), "ipaslink": lambda arguments: f"/{arguments[1]}/"}
    rules |= {"us patent": _before("U.S. Patent "), "dash year": _joined("–"), "harvtxt": _authors}
    rules |= {"spaces": _constant(" "), "music": lambda arguments: _MUSIC.get(arguments[1], "")}
    rules["currency"] = lambda arguments: f"{arguments[2]} {arguments[1]}".strip()
    rules["oldstyledate"] = lambda arguments: f"{arguments[1]} [O.S. {arguments[3]}] {arguments[2]}"
    return rules


_MUSIC = {"flat": "♭", "b": "♭", "sharp": "♯", "#": "♯", "natural": "♮"}


def _authors(arguments: Arguments) -> str:
    """{{harvtxt|Boolos|Jeffrey|1974}}: Boolos & Jeffrey (1974)."""
    *authors, year = arguments.numbered() or [""]
    return f"{' & '.join(authors)} ({year})" if authors else year


def _ship(arguments: Arguments) -> str:
    return f"{arguments[1]} {arguments[2]}".strip()


def _century(arguments: Arguments) -> str:
    return f"{arguments[1]}{arguments[2] or 'e'} siècle" if arguments[1] else ""


def _of_language(language: str) -> dict[str, Rule]:
    """The rules of one language's wikis."""
    if language == "de":
        return {"höhe": lambda arguments: f"{arguments[1]} m", "sic": _constant("")}
    if language == "fr":
        first = {name: _argument(1) for name in _names("nombre, nb, citation, citation étrangère, lien, incise, petit, exp")}
        return first | {
            "unité": _joined(" "), "date": _joined(" "), "date-": _joined(" "), "s": _century, "s-": _century,
            "e": _constant("e"), "er": _constant("er"), "re": _constant("re"), "citation bloc": _quoted, "ind": _argument(1),
        }  # fmt: skip
    if language == "zh":
        return {
            "bd": lambda arguments: f"{arguments[1]}{arguments[2]}－{arguments[3]}{arguments[4]}",
            "tsl": lambda arguments: arguments[3] or arguments[2], "translink": lambda arguments: arguments[3] or arguments[2],
        }  # fmt: skip
    return {}


def _of_wiktionary() -> dict[str, Rule]:
    """The rules of Wiktionaries: https://en.wiktionary.org/wiki/Wiktionary:Templates."""
    def label(arguments: Arguments) -> str:
        return f"({', '.join(arguments.numbered()[1:])})"

    def gloss(arguments: Arguments) -> str:
        return f"({', '.join(arguments.numbered())})"

    linked = _names("l, link, m, mention, m+, ll, t, t+, tt, tt+, ux, uxi, usex, w, term, taxlink, vern, def-date")
    rules: dict[str, Rule] = {name: lambda arguments: arguments[3] or arguments[2] or arguments[1] for name in linked}
    rules |= {name: _argument(2) for name in _names("ux, uxi, usex, lang")}
    rules |= {name: lambda arguments: arguments[2] or arguments[1] for name in _names("w, taxlink")}
    rules |= {name: label for name in _names("lb, lbl, label, tlb")}
    rules |= {name: gloss for name in _names("gloss, gl, q, qual, qualifier, i, s, sense")}
    rules |= {name: _argument(1) for name in _names("non-gloss definition, non-gloss, n-g, ngd, vern")}
    rules |= {name: _joined(", ") for name in _names("n, suffix of")}
    return rules


class Templates:
    """What templates stand for on one wiki."""

    def __init__(self, site: Site) -> None:
        self._rules = _rules() | _of_language(site.language)
        self._is_wiktionary = site.dbname.endswith("wiktionary")
        if self._is_wiktionary:
            self._rules |= _of_wiktionary()

    def rule(self, name: str) -> Rule | None:
        """What makes the text of the template with this name, as written before the first |; None: it is dropped."""
        key = name.strip().replace("_", " ").lower()
        found = self._rules.get(key)
        if found is None and key.startswith(("lang-", "link-", "internal link helper/", "script/")):
            return _argument(1)
        if found is None and self._is_wiktionary and key.endswith(" of"):
            return lambda arguments: f"{key} {arguments[3] or arguments[2]}"
        return found
