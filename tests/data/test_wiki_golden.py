"""Ten real articles, extracted and read by eye: short facts about what must remain of each and what must not."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

from engine.data.wiki import Page, PageFault, article, parse_page, read_pages, read_site


@dataclass(frozen=True)
class Golden:
    """What an article's text is like. `dropped` stands in its wikitext, in what is no prose."""

    dump: str
    title: str
    begins: str
    paragraphs: tuple[int, int]
    """Texts between blank lines: at least, at most."""
    size: tuple[int, int]
    """Letters: at least, at most."""
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    language: str | None = None
    """Where the dump's own siteinfo is wrong."""


GOLDEN = [
    Golden(
        "zh-minidump", "柏林", "柏林（Berlin）是德意志聯邦共和國首都", (60, 85), (9_000, 10_500),
        kept=("名字分别是柏林（Berlin）和科恩（Cölln）", "（大选帝侯）", "\n\n历史\n\n勃兰登堡選帝侯及普魯士公国\n\n",
              "德国联邦议院", "菩提樹下大街", "\n米特（Mitte）\n", "9.7°C（49.5°F）", "柏林技術與經濟應用科學大學、",
              "\n\n外部链接\n\nBerlin.de 官方网站"),
        dropped=("Berlinermauer", "220px", "柏林新国会与总理府", "参考文献", "Hochschule für Technik", "zh-",
                 "3496300", "（）"),
        language="zh",
    ),
    Golden(
        "de-minidump", "Berlin", "Berlin (bɛɐ̯ˈliːn) ist Hauptstadt und", (280, 360), (105_000, 125_000),
        kept=("52° 31′ 7″ nördliche Breite", "\n\nGeographie\n\nLage\n\n", "1448 revoltierten Einwohner",
              "u. a. Comedian Harmonists", "Pack die Badehose ein (1951)", "ISBN 3-89809-041-8",
              "\n\nSiehe auch\n\nListe der größten", "Kreuzberg. Die größte"),
        dropped=("zentriert", "Kategorie:", "Einzelnachweise", "2.980.886", "Farblegende", "berliner-zeitung",
                 "Navigationsleiste", "Skyline von der", "mini|", "()", "…|"),
        language="de",
    ),
    Golden(
        "tiny-2pages", "Klaksvíkar kommuna", "Klaksvíkar kommuna er næststørsta", (17, 22), (1_700, 2_000),
        kept=("umfatar 7 bygdir", "\n\nÁ Borðoynni\n\nKlaksvík\nÁrnafjørður\nÁnir\n", "longu í 1866, men",
              "\n\nSlóðir\n\nHeimasíðan hjá"),
        dropped=("Bólkur", "http", "*"),
    ),
    Golden(
        "enwiki-206pages", "A", "A (named, plural As, A's, as, a's or aes) is the", (32, 44), (8_700, 10_000),
        kept=("the letter ⟨a⟩ represents seven", "such as /a/, /ä/, or /ɑ/", "in Spanish and 3.95% in",
              "\nÆ æ : Latin AE ligature\n", "A-list celebrities", "the vowel /a/, and called"),
        dropped=("Writing cursive forms", "Phoenician aleph", "harvnb", "0041", "ISO basic Latin letters]",
                 "Footnotes", "oed", "Egyptian hieroglyphic ox"),
    ),
    Golden(
        "enwiki-206pages", "ASCII", "ASCII, abbreviated from American Standard Code", (70, 92), (29_000, 33_500),
        kept=('were "#$%_&\'() – early typewriters', "notably ½¼¢, while ^`~", "and <> for mathematical use",
              "{ a[i] = '\\n'; }", '"N{ jag har sm|rg}sar."', "position 20hex", "X3.4-1986 (the first two",
              "\n\n7-bit\n\nFrom early"),
        dropped=("lightblue", "101 1010", "Category:", "361px", "cite web", "respell", "Pre2", "thumb|"),
    ),
    Golden(
        "enwiki-206pages", "Alkane", "In organic chemistry, an alkane, or paraffin (a", (120, 160), (36_000, 41_000),
        kept=("linear (general formula CnH2n+2) wherein", "\nmethane, CH4 – one carbon",
              "RCH=CH2 + H2 → RCH2CH3 (R = alkyl)", "2 CH4 + 3 O2 → 2 CO + 4 H2O", "\nC12: 355 isomers\n",
              "109.47° between", "See also\n\nAlkene\nAlkyne\n"),
        dropped=("Tetrahedrane-3D", "merriam-webster", "C10H22", "Boese R", "Comparison of nomenclatures", "{{",
                 "stereo.svg"),
    ),
    Golden(
        "enwiki-206pages", "Algorithm", "In mathematics and computer science, an algorithm is", (140, 180),
        (60_000, 67_000),
        kept=("Al-Khwārizmī (خوارزمی, c. 780-850) was", "Boolos & Jeffrey (1974, 1999) offer",
              "\n\nif L.size = 0 return null\n", "largest ← L[0]\n", "\n1 High-level description\n",
              "\n\nExecution efficiency\n\n", "\nISBN 0-8078-4108-0 pbk.\n"),
        dropped=("Leeuwen", "Tausworthe 1997", "An animation of", "quicksort anim", "Articles with example", "\n,",
                 "\n. "),
    ),
    Golden(
        "enwiki-table-markup", "Brahui language", "Brahui (براهوئي) is a Dravidian language", (22, 32), (4_300, 5_200),
        kept=("of more than 1500 km. Kalat", "lateral fricative [ɬ], a sound", "\n\nOrthography\n\nArabic script\n\n",
              "the Nastaʿlīq script", "\n\nExternal links\n\nOnline Brahui Dictionary\n"),
        dropped=("border-right", "wikitable", "Notes and references", "Agglutinative", "OED", "↦ℂ", "links=no", "sfn"),
    ),
    Golden(
        "en-minidump", "Vehicle registration plates of China", "Vehicle registration plates in China are", (110, 150),
        (26_000, 32_000),
        kept=("(广东02)", "format GARR-####, where", "\nWJ31-NNNNN. = Beijing\n",
              "with the designation min hang. This", "\nV PLA Central Military Commission\n", "使 (shǐ) (for 使馆",
              "\n\nMotorcycles\n\n"),
        dropped=("license plate.jpg", "DLDDL", "Diplomatic Codes", "Adeline Yen", "align =", "Road transport in China",
                 "200px", "()"),
    ),
    Golden(
        "en-minidump", "Angela Merkel", "Angela Dorothea Merkel (née Kasner; born 17 July 1954) is", (150, 180),
        (55_000, 64_000),
        kept=("(1926–2011; né Kaźmierczak)", "(Hoffmann & Campe, 2016), ISBN 978-3-455-50410-1",
              "\n\nIn German\n\nPlickert", "\n\nExternal links\n\nOfficial Website", "Moritzbastei, a project"),
        dropped=("term_start", "Bundesarchiv Bild", "csmonitor", "1954 births", "caption3", "Citation needed",
                 "1990-0803", "uniform of Haller", "IPA-de"),
    ),
]  # fmt: skip

MARKUP = re.compile(
    r"\{\{|\}\}|\[\[|\]\]|\{\||\|\}|^\||''|</?(?:ref|br|div|small|sup|span|math|nowiki)\b|<!--"
    r"|thumb\||\d\d+px|&nbsp;|&[lg]t;|__TOC__|-\{|\}-|^=|=$|^[*#:;]|  | $|\n\n\n|(?<!')\( *[,;)]|^\W{1,3}$"
    r"|^(?:Category|File|Kategorie|Datei):|[\0\1\ufdd0-\ufdef]",
    re.MULTILINE,
)


@cache
def dump(path: Path, language: str | None) -> dict[str, tuple[Page, str]]:
    """The articles of a dump by title: as written, and their text."""
    site = read_site(path)
    site = replace(site, language=language, dbname=f"{language}wiki") if language else site
    pages = [parse_page(raw, site) for raw in read_pages(path) if not isinstance(raw, PageFault)]
    return {page.title: (page, article(page, site) or "") for page in pages if isinstance(page, Page)}


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.title)
def test_an_article_read_by_eye_keeps_its_prose_and_nothing_else(golden: Golden, shared_data: Path) -> None:
    page, text = dump(shared_data / "wiki" / f"{golden.dump}.xml.bz2", golden.language)[golden.title]
    assert text.startswith(f"{golden.title}\n\n{golden.begins}")
    missing = [words for words in golden.kept if words not in text]
    left = [words for words in golden.dropped if words in text]
    assert (missing, left) == ([], [])
    assert golden.paragraphs[0] <= text.count("\n\n") + 1 <= golden.paragraphs[1]
    assert golden.size[0] <= len(text) <= golden.size[1] < len(page.wikitext)
    assert [match[0] for match in MARKUP.finditer(text)] == []


def test_what_must_not_remain_stands_in_the_wikitext(shared_data: Path) -> None:
    """Else the expectation would hold of anything."""
    for golden in GOLDEN:
        page, _ = dump(shared_data / "wiki" / f"{golden.dump}.xml.bz2", golden.language)[golden.title]
        assert sum(words in page.wikitext for words in golden.dropped) >= len(golden.dropped) // 2, golden.title


def test_of_all_real_articles_hardly_a_mark_remains(shared_data: Path) -> None:
    """In 140 articles; what does remain was looked at: authors' slips and text about markup."""
    marks: list[str] = []
    for path in sorted((shared_data / "wiki").glob("*.bz2")):
        marks += [mark[0] for _, text in dump(path, None).values() for mark in MARKUP.finditer(text)]
    assert len(marks) <= 25, marks
