"""Wikitext to text: each construct, whatever is broken, and in linear time."""

from __future__ import annotations

import re
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.wiki import Page, Site, article, strip
from engine.data.wiki.site import CANONICAL, site_of

ENGLISH = Site()
CHINESE = Site("zh", "zhwiki")


def text(wikitext: str, site: Site = ENGLISH) -> str:
    return strip(wikitext, site)


@pytest.mark.parametrize(("wikitext", "expected"), [
    ("a [[dog]] barks", "a dog barks"),
    ("two [[dog]]s, a [[hound|dog]]gy", "two dogs, a doggy"),
    ("[[Foo (bar)|]] and [[Help:Foo|]] and [[Boston, Massachusetts|]]", "Foo and Foo and Boston"),
    ("[[a|b|c]] [[x#y|z]] [[#below|see below]]", "b|c z see below"),
    ("[[Star Trek: The Film]] and [[Star Trek: The Film|it]]", "Star Trek: The Film and it"),
    ("[[:Category:Dogs]] [[:File:Dog.jpg|a picture]]", "Category:Dogs a picture"),
    ("[[wikt:dog|the word]] [[Media:Bark.ogg|listen]]", "the word listen"),
    ("a[[fr:Chien]][[zh-min-nan:Káu]][[Category:Dogs|dog]] b", "a b"),
    ("[[File:Dog.jpg|thumb|A [[dog]], [http://x.org a [b] one], {{c|d}}]]Dogs bark", "Dogs bark"),
    ("[[File:a.jpg|thumb|with [[File:b.png|20px]] inside [[a|b]] it]] x", "x"),
    ("[[Ekkert:Mynd.JPG|thumb|an alias nobody knows]] x", "x"),
    ("[http://example.org a site] [https://example.org] [//e.org two words] [mailto:a@b.c write]",
     "a site two words write"),
    ("see http://example.org/?a=b today, [sic]", "see http://example.org/?a=b today, [sic]"),
    ("[[http://example.org wrong]]", "[wrong]"),
])  # fmt: skip
def test_links_become_the_text_a_reader_sees(wikitext: str, expected: str) -> None:
    assert text(wikitext) == expected


@pytest.mark.parametrize(("wikitext", "expected"), [
    ("'''Dog''' is ''a'' '''''word'''''", "Dog is a word"),
    ("l'eau, rock 'n' roll, the dogs' '''bone'''", "l'eau, rock 'n' roll, the dogs' bone"),
    ("L'''année'' passe", "L'année passe"),
    ("''''quoted''''", "'quoted'"),
    ("'''''''seven'''''''", "''seven''"),
    ("'''open\nnext ''open", "open next open"),
    ("'''Bold ''both''''' and '''''both'' bold'''", "Bold both and both bold"),
])
def test_quotes_of_bold_and_italic_go_and_apostrophes_stay(wikitext: str, expected: str) -> None:
    assert text(wikitext) == expected


@pytest.mark.parametrize(("wikitext", "expected"), [
    ("a<!-- hidden -->b", "ab"),
    ("a\n<!-- a line of its own -->\nb", "a b"),
    ("one.<ref>Book, p. 1</ref> Two.<ref name=x /> Three.<ref name=\"y\">{{cite|a}}</ref>", "one. Two. Three."),
    ("x<Ref>a <b>b</b></REF >y", "xy"),
    ("so <math>a < b</math>, then <chem>H2O</chem> is", "so, then is"),
    ("<gallery mode=packed>\nFile:a.jpg|one<ref>x</ref>\n</gallery>\ntext", "text"),
    ("<syntaxhighlight lang=c>\nif (a[[0]]) {{ x }}\n</syntaxhighlight>text", "text"),
    ("<timeline>a</timeline><score>b</score><imagemap>c</imagemap><source>d</source>text", "text"),
    ("<nowiki>[[not]] a ''link'' {{t}}</nowiki> [[a]]", "[[not]] a ''link'' {{t}} a"),
    ("before\n<pre>\n* one\n  [[two]]\n</pre>\nafter", "before\n* one\n[[two]]\nafter"),
    ("x<sup>2</sup> <small>fine</small> <span a=\"b:c\">print</span><br/>next<BR>line", "x2 fine print\nnext\nline"),
    ("<div class=a>\ninside\n</div>\n<blockquote>said</blockquote>", "inside\nsaid"),
    ("<table><tr><td>1<table><tr><td>2</td></tr></table></td></tr></table>text", "text"),
    ("<poem>\nroses\nviolets\n</poem>", "roses\nviolets"),
    ("if a < b and c > d, <unknown> stays", "if a < b and c > d, <unknown> stays"),
    ("a<includeonly>no</includeonly><noinclude>yes</noinclude><section begin=x />", "ayes"),
    ("5&nbsp;km &ndash; &#8364;&#x20AC; AT&T &notanentity; &amp;amp;", "5 km – €€ AT&T &notanentity; &amp;"),
    ("&lt;br&gt; &#91;&#91;a&#93;&#93; &#42; &#0;&#xD800;.", "<br> [[a]] * ��."),
])  # fmt: skip
def test_comments_elements_and_entities(wikitext: str, expected: str) -> None:
    assert text(wikitext) == expected


@pytest.mark.parametrize(("wikitext", "expected"), [
    ("a {{unknown|x={{inner|{{deep}}}}|[[b]]}} c", "a c"),
    ("{{Infobox dog\n| name = Rex\n| image = [[File:a.jpg|thumb]]\n|}}\nRex", "Rex"),
    ("a {{#if:x|y|z}}{{DEFAULTSORT:Dog}}{{formatnum:12345}} {{lc:A}} b", "a 12345 A b"),
    ("the {{lang|de|'''Hund'''}}, {{lang-fr|chien}}, {{transl|ja|ISO|inu}}", "the Hund, chien, inu"),
    ("{{nowrap|5 km}} {{small|[[a|b]]}} {{ABBR|CPU|processor}} {{nowrap|1=a=b}}", "5 km b CPU a=b"),
    ("{{convert|5|km|mi|abbr=on}}, {{convert|5|to|10|C|F}}, {{cvt|6|ft|4|in|m}}, {{convert|3|-|4|sqmi}}",
     "5 km, 5 to 10 °C, 6 ft 4 in, 3–4 sq mi"),
    ("{{frac|3}} {{frac|1|2}} {{frac|2|1|2}} {{val|6.2|e=18|u=m}}", "1/3 1/2 2 1/2 6.2×10^18 m"),
    ("{{as of|2014|3|lc=y}}, {{As of|1999}}, {{circa|1500}}", "as of March 2014, As of 1999, c. 1500"),
    ("a{{mdash}}b{{snd}}c {{'}}s 15{{nbsp}}May", "a—b – c 's 15 May"),
    ("{{nihongo|sword|剣|ken}}; {{HMS|Ajax|22|6}}; {{ill|Rex|de|Rex (Hund)}}; {{chem|H|2|O}}",
     "sword (剣, ken); HMS Ajax; Rex; H2O"),
    ("He said:\n{{quote|all is {{em|well}}|author}}\nand left", "He said:\nall is well\nand left"),
    ("{{ubl|a|b}}{{hlist|c|d}}", "a\nbc, d"),
    ("{{lang_de|x}}{{ Nowrap |y}}", "y"),
])  # fmt: skip
def test_templates_go_but_for_those_a_sentence_needs(wikitext: str, expected: str) -> None:
    assert text(wikitext) == expected


@pytest.mark.parametrize(("wikitext", "expected"), [
    ("'''Rex''' ({{IPA-de|r}}; {{x}}) is", "Rex is"),
    ("Rex ({{IPA-de|r}}; born 1950) is", "Rex (born 1950) is"),
    ("Rex (born 1950; {{x}}) is", "Rex (born 1950) is"),
    ("柏林（{{IPA-de|r}}）是", "柏林是"),
    ("a {{x}}, {{x}}, {{x}} and b {{x}}.", "a, and b."),
    ("call main() or f( ) {{x}} now", "call main() or f( ) now"),
    ("* {{cite book|a}}.\n* kept", "kept"),
])
def test_brackets_and_commas_that_hold_nothing_are_repaired_only_where_something_was_dropped(
    wikitext: str, expected: str
) -> None:
    assert text(wikitext) == expected


@pytest.mark.parametrize(("wikitext", "expected"), [
    ("a\n{| class=x\n! h\n|-\n| c || d\n{|\n| nested\n|}\n|}\nb", "a\nb"),
    (":{|\n| indented\n|}\nb", "b"),
    ("{|\n| by a template\n{{end}}\nb", "b"),
    ("a\n{| open\n! head\n|-\n| cell\n\nstill here\n\n== H ==\ntext", "a\n\nstill here\n\nH\n\ntext"),
    ("a\n| stray cell\n|}\nb", "a\nb"),
    ("a {| b |} c || d", "a {| b |} c || d"),
])
def test_tables_go_and_what_follows_an_open_one_stays(wikitext: str, expected: str) -> None:
    assert text(wikitext) == expected


@pytest.mark.parametrize(("wikitext", "expected"), [
    ("one\ntwo\n\nthree\n\n\n\nfour", "one two\n\nthree\n\nfour"),
    ("一\n二", "一二"),
    ("== A ==\ntext\n=== B ===\n== C == <!-- c -->\nmore", "A\n\ntext\n\nC\n\nmore"),
    ("text\n== See also ==\n{{portal}}\n== References ==\n{{reflist}}\n[[Category:X]]", "text"),
    ("==== deep ====\n== D ==\n=== E ===\nx", "D\n\nE\n\nx"),
    ("a\n* one\n** two\n# three\n; term: what\n:: reply\nb", "a\none\ntwo\nthree\nterm: what\nreply\nb"),
    ("a\n----\nb\n* \n*{{x}}\nc - d", "a\nb\nc - d"),
    ("__TOC__\n__NOEDITSECTION__a\n__KEIN_INHALTSVERZEICHNIS__\n__init__", "a\n__init__"),
    ("a  b \t c   \n   indented \r\nd\r\n", "a b c\nindented\nd"),
    ("= not a heading\n==\n===x", "= not a heading\n==\n===x"),
    ("", ""), ("\n\n", ""), ("{{x}}", ""),
])  # fmt: skip
def test_lines_paragraphs_headings_and_lists(wikitext: str, expected: str) -> None:
    assert text(wikitext) == expected


@pytest.mark.parametrize(("wikitext", "expected"), [
    ("a-{zh-hans:简; zh-hant:繁}-b", "a简b"),
    ("-{zh-tw:台; zh-cn:陆;}--{zh-hk:港; zh-tw:台}-", "陆台"),
    ("-{text}--{}-", "text"),
    ("-{H|zh-cn:a;zh-tw:b}--{T|zh-cn:a}-x-{A|zh-cn:a;zh-tw:b}-", "xa"),
    ("-{R|raw}- -{zh-hans;zh-hant|both}-", "raw both"),
    ("-{zh-hans:{{lang|en|dog}};zh-hant:[[a|b]]}-", "dog"),
    ("{{lang|zh|-{zh-hans:国;zh-hant:國}-}}", "国"),
    ("-{a=>zh-cn:b;}-", "b"),
])
def test_one_variant_of_a_language_is_taken(wikitext: str, expected: str) -> None:
    assert text(wikitext, CHINESE) == expected


def test_variants_off_a_wiki_without_them_are_taken_only_when_they_are_rules() -> None:
    assert text("2-{methyl}-x -{zh-hans:a;zh-hant:b}-") == "2-{methyl}-x a"


@pytest.mark.parametrize(("names", "links"), [
    ({6: "Datei", 14: "Kategorie"}, "[[Datei:Hund|mini|ein [[Hund]]]][[Kategorie:Hund]]"),
    ({6: "Fichier", 14: "Catégorie"}, "[[fichier:Chien|vignette]][[Image:Chien]][[Catégorie:Chien]][[Category:x]]"),
    ({6: "Файл", 14: "Категория"}, "[[Файл:Собака|мини|собака]][[ФАЙЛ:a]][[категория:Собаки]]"),
    ({6: "ファイル", 14: "カテゴリ"}, "[[ファイル:犬|サムネイル]][[カテゴリ:犬]][[File:犬]]"),
    ({6: "Tep mong", 14: "Phan loai"}, "[[Tep_mong:x|nho]][[ tep mong :x]][[Phan loai:x]]"),
])  # fmt: skip
def test_namespaces_of_any_language_are_known_from_siteinfo(names: dict[int, str], links: str) -> None:
    own = {key: (name, *CANONICAL[key]) for key, name in names.items()}
    site = Site("xx", "xxwiki", "first-letter", CANONICAL | own)
    assert text(f"a {links} b", site) == "a b"


def test_templates_of_one_language_hold_on_its_wikis_alone() -> None:
    french, german = Site("fr", "frwiki"), Site("de", "dewiki")
    assert text("au {{s|XIX|e}}, {{unité|5|km}}, {{date|1|mai|1900}}", french) == "au XIXe siècle, 5 km, 1 mai 1900"
    assert text("au {{s|XIX|e}}.") == "au."
    assert text("{{Höhe|115|DE-NHN}}", german) == "115 m"
    assert text("{{link-en|犬|Dog}} {{tsl|en|Dog|犬}}", CHINESE) == "犬 犬"
    assert text("{{bd|1879年|3月|1955年|4月}}", CHINESE) == "1879年3月－1955年4月"


def test_wiktionary_entries_keep_their_labels_links_and_forms() -> None:
    site = Site("en", "enwiktionary")
    wikitext = "==English==\n===Noun===\n{{en-noun}}\n# {{lb|en|rare}} A [[pet]]; see {{m|en|hound}}."
    wikitext += "\n# {{plural of|en|dog}}"
    assert text(wikitext, site) == "English\n\nNoun\n\n(rare) A pet; see hound.\nplural of dog"


def test_an_article_begins_with_its_title_and_nothing_is_none() -> None:
    assert article(Page("Dog", 1, "'''Dogs''' bark."), ENGLISH) == "Dog\n\nDogs bark."
    assert article(Page("Dog", 1, "{{delete}}\n== A ==\n"), ENGLISH) is None


@pytest.mark.parametrize(("wikitext", "kept"), [
    ("{{open | x\n\ntext after", ["text after"]),
    ("{{open\n== Heading ==\ntext after }} more", ["Heading", "text after", "more"]),
    ("[[open and text after", ["open and text after"]),
    ("[[a|b] text [[c]] after", ["text c after"]),
    ("text }} more ]] after", ["text", "more", "after"]),
    ("<ref>open. Text after <ref>x</ref> end", ["Text after", "end"]),
    ("<!-- open. Text after", ["Text after"]),
    ("<nowiki>open [[a|b]]", ["open b"]),
    ("<math>open [[a|b]]", ["open b"]),
    ("<gallery>\ntext after", ["text after"]),
    ("{{a [[b }} c ]] d", ["c", "d"]),
    ("[[a {{b ]] c }} d", ["c", "d"]),
    ("-{open text", ["open text"]),
])  # fmt: skip
def test_markup_that_is_not_closed_loses_its_mark_alone(wikitext: str, kept: list[str]) -> None:
    done = text(wikitext)
    assert all(words in done for words in kept)
    assert not re.search(r"\{\{|\}\}|\[\[|\]\]|<!--|<\w", done)


MARKUP = st.sampled_from([
    "{{", "}}", "[[", "]]", "[", "]", "|", "{|", "|}", "|-", "\n", "\n\n", "'", "''", "'''", "=", "==", "<ref>",
    "</ref>", "<ref", "/>", "<!--", "-->", "<nowiki>", "</nowiki>", "<pre>", "</pre>", "<math>", "</math>", "<br>",
    "<table>", "</table>", "-{", "}-", "zh-hans:", ";", "&amp;", "&#1;", "&", "(", ")", ", ", "* ", ": ", "# ", "File:",
    "a.jpg", "de:", "convert", "5", "lang", "nowrap", "quote", "formatnum:", "http://", "__TOC__", "word",
    "\0", "\1", "\ufdd0", "国", " ", "\ud800", "val", "e=", "as of", "13", "end", "!", "frac", "\r",
])  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(st.lists(MARKUP | st.text(max_size=5), max_size=60).map("".join), st.sampled_from([ENGLISH, CHINESE]))
def test_any_text_is_taken_and_comes_out_tidy(wikitext: str, site: Site) -> None:
    done = text(wikitext, site)
    assert not re.search("[\0\1\r\t]|  |\n\n\n| $|^ ", done)
    assert len(done) <= 8 * len(wikitext) + 20
    assert all(line == line.strip() for line in done.split("\n"))


PLAIN = st.text(st.characters(exclude_characters="[]{}|'<>=*#:;&_~-\0\1\r", exclude_categories=["Cs"]))


@settings(max_examples=800, deadline=None)
@given(PLAIN)
def test_text_without_markup_stays_but_for_white_space(plain: str) -> None:
    assert "".join(text(plain).split()) == "".join(plain.split())


def test_text_without_markup_in_any_script_stays() -> None:
    plain = "It's 5 - 3 = 2; see (a) and [b]: \"x_y\" costs $5 & more.\n\nКошка, 猫は、قط.\n\nMain() {x} a|b"
    assert text(plain) == plain


N = 120_000
HOSTILE = {
    "open templates": "{{" * N, "open links": "[[" * N, "open both": "{{[[" * N, "closing": "}}]]" * N,
    "deep templates": "{{" * N + "x" + "}}" * N, "deep kept templates": "{{nowrap|" * N + "x" * N + "}}" * N,
    "deep links": "[[a|" * N + "x" + "]]" * N, "crossed": "{{[[" * N + "}}]]" * N,
    "links across": "[[{{" * N + "]]" * N,
    "open comments": "<!--" * N, "open refs": "<ref>" * N, "cut refs": "<ref name=a" * N, "open math": "<math>" * N,
    "open nowiki": "<nowiki>" * N, "open tables": "\n{|" * N, "deep tables": "\n{|" * N + "\n|}" * N,
    "html tables": "<table>" * N + "</table>" * N, "cut tags": "<br " * N, "less than": "<" * N,
    "quotes": "'''a''b" * N, "apostrophes": "'" * N, "urls": "[http://a " * N, "variants": "-{zh-hans:" * N,
    "rules": "-{" + "zh-cn:a;" * N + "}-", "arrows": "-{" + ";a=>" * N + "}-", "headings": "==a==\n" * N,
    "spaces": "x" + " " * N * 10 + "y", "lists": ": " * N + "{|", "lines": "\n" + " " * 50 + "\n" * N,
    "brackets": "({{a}}, " * N, "gaps": "(" + "{{a}}; " * N, "files": "[[File:a.jpg|thumb|b " * N,
    "comma, gaps": "long text " * N + "," + "{{a}}," * N,
    "arguments": "{{convert" + "|1|to" * N + "}}", "named": "{{lang|" + "a=|" * N + "}}",
    "pipes": "[[(" + "a (" * N + "|]]",
    "paragraph": "word\n" * N, "entities": "&#1" * N, "underlines": "__A" * N,
    "equals": "=" * N, "refs": "<ref>a</ref>" * N,
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_markup_takes_linear_time(name: str) -> None:
    """120,000 squared is 14 billion steps, minutes even in C: the test would not end. Each takes a second at most."""
    assert not re.search(r"\{\{|\[\[|<!--|\n\n\n", text(HOSTILE[name]))


@pytest.mark.timeout(60)
def test_a_hostile_siteinfo_takes_linear_time() -> None:
    for head in (b'<namespace ' + b'key="1" ' * N + b"<x>", b'<namespace key="1">' * N, b"<dbname>" * N):
        assert site_of(b"<mediawiki><siteinfo>" + head).language == "en"


def test_names_of_templates_are_not_kept_whatever_their_length() -> None:
    tracemalloc.start()
    for number in range(30):
        assert text("{{" + f"{number}" + "x" * 1_000_000 + "}}after") == "after"
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 10_000_000


def test_depth_is_cut_where_joining_would_take_squared_time() -> None:
    assert text("{{nowrap|" * 30 + "x" + "}}" * 30) == "x"
    assert text("{{nowrap|" * 100 + "x" + "}}" * 100 + "after") == "after"


def test_the_same_site_built_twice_strips_alike() -> None:
    assert text("[[Datei:x|y]] {{lang|de|z}}", replace(ENGLISH)) == "z"
