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

from engine.data.wiki.gaps import NEW_LINE
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
    return f"{NEW_LINE}{text}{NEW_LINE}" if text else ""


def _quoted(arguments: Arguments) -> str:
    return _block(arguments["text"] or arguments["quote"] or arguments[1])


_RANGE_WORDS = {
    "to": " to ", "-": "–", "–": "–", "to-": "–", "to(-)": " to ", "and": " and ", "or": " or ", "by": " by ",
    "x": " × ", "×": " × ", "*": " × ", "+/-": " ± ", "±": " ± ", "+": " + ", ",": ", ", "and(-)": " and ",
}  # fmt: skip
_UNITS = {"C": "°C", "F": "°F", "sqmi": "sq mi", "sqft": "sq ft", "sqkm": "km²", "km2": "km²", "m2": "m²",
          "cuft": "cu ft", "km3": "km³", "m3": "m³", "cm2": "cm²", "cumi": "cu mi"}  # fmt: skip
_SMALLER_UNITS = ("in", "oz", "lb", "yd", "ft")  # of a measure in two
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
            if at + 3 >= len(words) or not _NUMBER.match(words[at + 2]) or words[at + 3] not in _SMALLER_UNITS:
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


def _either(*numbers: int) -> Rule:
    """The first of these that is given."""
    return lambda arguments: next((arguments[number] for number in numbers if arguments[number]), "")


def _joined(mark: str) -> Rule:
    return lambda arguments: mark.join(arguments.numbered())


def _before(text: str) -> Rule:
    return lambda arguments: f"{text}{arguments[1]}" if arguments[1] else ""


def _around(before: str, after: str) -> Rule:
    return lambda arguments: f"{before}{arguments[1]}{after}" if arguments[1] else ""


def _constant(text: str) -> Rule:
    return lambda arguments: text


def _last(arguments: Arguments) -> str:
    return (arguments.numbered() or [""])[-1]


def _pronunciation(arguments: Arguments) -> str:
    return arguments[1] if arguments.count == 1 else ""  # with a language it tells how a name is said


def _authors(arguments: Arguments) -> str:
    """{{harvtxt|Boolos|Jeffrey|1974}}: Boolos & Jeffrey (1974)."""
    *authors, year = arguments.numbered() or [""]
    return f"{' & '.join(authors)} ({year})" if authors else year


def _century(arguments: Arguments) -> str:
    return f"{arguments[1]}{arguments[2] or 'e'} siècle" if arguments[1] else ""


def _label(arguments: Arguments) -> str:
    """{{lb|en|transitive}}: (transitive)."""
    return f"({', '.join(arguments.numbered()[1:])})"


_MUSIC = {"flat": "♭", "b": "♭", "sharp": "♯", "#": "♯", "natural": "♮"}

Rules = tuple[tuple[Rule, str], ...]

_COMMON: Rules = (
    (_argument(1), "nowrap, nobr, nobreak, nobold, noitalic, normal, small, smaller, big, large, larger, midsize, em"),
    (_argument(1), "strong, bold, italic, abbr, tooltip, sic, sup, sub, smallcaps, sc, code, kbd, samp, tt, mono, var"),
    (_argument(1), "mvar, math, not a typo, as written, proper name, nq, ill, interlanguage link, vanchor"),
    (_argument(1), "interlanguage link multi, link-interwiki, le, lj, flag, flagu, flagcountry, nts, formatnum"),
    (_argument(1), "visible anchor, formnum, format price, center, centered, nihongo2, native name, railgauge"),
    (_argument(2), "lang, langx, rtl-lang, wikt-lang, color, font color, resize, audio"),
    (_last, "transl, transliteration, tlit, script"),
    (_quoted, "quote, blockquote, cquote, bquote, quotation, poemquote, zitat"),
    (lambda arguments: _block(_last(arguments)), "plainlist, flatlist, columns-list, columns list, poem, block indent"),
    (_joined(NEW_LINE), "ubl, unbulleted list, bulleted list, ordered list"),
    (_joined(", "), "hlist"), (_joined(""), "linktext, chem, chem2, gaps"), (_joined("–"), "dash year"),
    (_joined(" "), "bibleverse, bibleref"), (_convert, "convert, cvt"), (_fraction, "frac, sfrac, fraction"),
    (_value, "val"), (_as_of, "as of"), (_nihongo, "nihongo, nihongo4, nihongo krt"), (_authors, "harvtxt"),
    (_pronunciation, "ipa"), (_around("/", "/"), "ipaslink"), (_around("⟨", "⟩"), "angbr, angle bracket, vr"),
    (_around('"', '"'), '"'), (_before("×10^"), "e, x10^"), (_before("c. "), "circa, c., ca."),
    (_before("née "), "née, nee"), (_before("fl. "), "floruit, fl."), (_before("US$"), "us$, usd"),
    (_before("₹"), "inr, ₹"), (_before("£"), "£, gbp"), (_before("€"), "€, eur"), (_before("ISBN "), "isbn"),
    (_before("ISSN "), "issn"), (_before("OCLC "), "oclc"), (_before("U.S. Patent "), "us patent"),
    (lambda arguments: f"{arguments[1]} {arguments[2]}".strip(), "ship"),
    (lambda arguments: f"{arguments[2]} {arguments[1]}".strip(), "currency"),
    (lambda arguments: f"{arguments[1]} [O.S. {arguments[3]}] {arguments[2]}", "oldstyledate"),
    (lambda arguments: _MUSIC.get(arguments[1], ""), "music"),
    (_constant("—"), "mdash, em dash, emdash, mdashb, —"), (_constant("–"), "ndash, en dash, endash, –"),
    (_constant(" – "), "snd, snds, spnd, spaced ndash, spaced en dash, spaced endash"),
    (_constant(" "), "nbsp, space, spaces, thinsp, nnbsp"), (_constant(" · "), "dot, ·, •, middot, bullet"),
    (_constant("'"), "', ’"), (_constant("'s"), "'s"), (_constant('"'), '-"'), (_constant("'\""), "' \""),
    (_constant("|"), "!"), (_constant("="), "="), (_constant("\n|}\n"), "end, table end, s-end"),
)  # fmt: skip
"""What stands for a template, and the names of the templates in lower case."""

_SHIPS = "HMS, USS, SS, RMS, HMAS, HMCS, HMNZS, INS, SMS, USCGC, USNS, MV, MS"

_OF_LANGUAGE: dict[str, Rules] = {
    "de": ((_around("", " m"), "höhe"), (_constant(""), "sic")),
    "fr": (
        (_argument(1), "nombre, nb, citation, citation étrangère, lien, incise, petit, exp, ind"),
        (_quoted, "citation bloc"), (_joined(" "), "unité, date, date-"), (_century, "s, s-, siècle"),
        (_constant("e"), "e"), (_constant("er"), "er"), (_constant("re"), "re"),
    ),
    "zh": (
        (_either(3, 2), "tsl, translink"),
        (lambda arguments: f"{arguments[1]}{arguments[2]}－{arguments[3]}{arguments[4]}", "bd"),
    ),
}  # fmt: skip

_OF_WIKTIONARY: Rules = (
    (_either(3, 2, 1), "l, link, ll, m, m+, mention, t, t+, tt, tt+, term"),
    (_either(2, 1), "w, taxlink, ux, uxi, usex"),
    (_label, "lb, lbl, label, tlb"),
    (lambda arguments: f"({', '.join(arguments.numbered())})", "gloss, gl, q, qual, qualifier, i, s, sense"),
    (_argument(1), "non-gloss definition, non-gloss, n-g, ngd, vern"),
)
"""https://en.wiktionary.org/wiki/Wiktionary:Templates."""


def _by_name(rules: Rules) -> dict[str, Rule]:
    return {name: rule for rule, names in rules for name in _names(names)}


class Templates:
    """What templates stand for on one wiki."""

    def __init__(self, site: Site) -> None:
        self._rules = _by_name(_COMMON) | {name.lower(): _before(f"{name} ") for name in _names(_SHIPS)}
        self._rules |= _by_name(_OF_LANGUAGE.get(site.language, ()))
        self._is_wiktionary = site.dbname.endswith("wiktionary")
        if self._is_wiktionary:
            self._rules |= _by_name(_OF_WIKTIONARY)

    def rule(self, name: str) -> Rule | None:
        """What makes the text of the template with this name, as written before the first |; None: it is dropped."""
        key = name.strip().replace("_", " ").lower()
        found = self._rules.get(key)
        if found is None and key.startswith(("lang-", "link-", "internal link helper/", "script/")):
            return _argument(1)
        if found is None and self._is_wiktionary and key.endswith(" of"):
            return lambda arguments: f"{key} {arguments[3] or arguments[2]}"
        return found
