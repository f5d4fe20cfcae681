"""What a dump says about its wiki: language, names of the namespaces, and so what the prefix of a link means.

Format: https://www.mediawiki.org/xml/export-0.11/ (element siteinfo); canonical namespace names:
https://www.mediawiki.org/wiki/Manual:Namespace.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from engine.data.wiki.xmltext import unescape
from engine.errors import UserError

LinkKind = Literal["text", "media", "file", "category", "language"]

CANONICAL: dict[int, tuple[str, ...]] = {
    -2: ("Media",), -1: ("Special",), 1: ("Talk",), 2: ("User",), 3: ("User talk",), 4: ("Project",),
    5: ("Project talk",), 6: ("File", "Image"), 7: ("File talk", "Image talk"), 8: ("MediaWiki",),
    9: ("MediaWiki talk",), 10: ("Template",), 11: ("Template talk",), 12: ("Help",), 13: ("Help talk",),
    14: ("Category",), 15: ("Category talk",),
}  # fmt: skip
"""Names that hold on every wiki, by key; those of siteinfo are added to them."""

# Aliases are not in siteinfo. These are in wide use, and hardly an article's title begins with one of them and a colon.
_FILE_ALIASES = """Bild Datei Fichier Archivo Imagen Immagine Imagem Ficheiro Arquivo Afbeelding Bestand Plik
Grafika Файл Изображение Зображення ファイル 画像 文件 档案 檔案 图像 圖像 파일 그림 ملف صورة پرونده Fil Tiedosto Kuva
Soubor Fájl Kép Dosya Resim Tập_tin Hình Berkas Gambar קובץ תמונה Αρχείο Εικόνα Fitxer Imatge चित्र Mynd Dosiero Slika
Датотека"""
_CATEGORY_ALIASES = """Kategorie Catégorie Categoría Categoria Categorie Kategoria Категория Категорія カテゴリ 分类
分類 분류 تصنيف رده Kategori Luokka Kategória Thể_loại קטגוריה Κατηγορία श्रेणी Flokkur Bólkur Kategorio Kategorija
Категорија Категории Katégória"""

_LANGUAGES = frozenset("""
aa ab ace ady af ak als alt am ami an ang ann anp ar arc ary arz as ast atj av avk awa ay az azb ba ban bar bat-smg bbc
bcl bdr be be-tarask be-x-old bew bg bh bi bjn blk bm bn bo bpy br bs btm bug bxr ca cbk-zam cdo ce ceb ch cho chr chy
ckb co cr crh cs csb cu cv cy da dag de dga din diq dsb dtp dty dv dz ee el eml en eo es et eu ext fa fat ff fi fiu-vro
fj fo fon fr frp frr fur fy ga gag gan gcr gd gl glk gn gom gor got gpe gsw gu guc gur guw gv ha hak haw he hi hif ho hr
hsb ht hu hy hyw hz ia iba id ie ig igl ii ik ilo inh io is it iu ja jam jbo jv ka kaa kab kbd kbp kcg kg kge ki kj kk
kl km kn ko koi kr krc ks ksh ku kus kv kw ky la lad lb lbe lez lfn lg li lij lld lmo ln lo lrc lt ltg lv lzh mad mai
map-bms mdf mg mh mhr mi min mk ml mn mni mnw mos mr mrj ms mt mus mwl my myv mzn na nah nan nap nds nds-nl ne new ng
nia nl nn no nov nqo nr nrm nso nup nv ny oc olo om or os pa pag pam pap pcd pcm pdc pfl pi pih pl pms pnb pnt ps pt pwn
qu rm rmy rn ro roa-rup roa-tara rsk ru rue rup rw sa sah sat sc scn sco sd se sg sgs sh shi shn shy si simple sk skr sl
sm smn sn so sq sr srn ss st stq su sv sw szl szy ta tay tcy tdd te tet tg th ti tig tk tl tly tn to tpi tr trv ts tt
tum tw ty tyv udm ug uk ur uz ve vec vep vi vls vo vro wa war wo wuu xal xh xmf yi yo yue za zea zgh zh zh-classical
zh-min-nan zh-yue zu""".split())

VARIANT_LANGUAGES = frozenset(("zh", "gan", "sr", "sh", "kk", "ku", "iu", "shi", "tg", "uz", "crh", "ike", "wuu"))
"""Languages whose wikis write -{..}-: https://www.mediawiki.org/wiki/Writing_systems/LanguageConverter."""

_FILE_NAME = re.compile(
    r"\.(?:jpe?g|png|gif|svg|tiff?|webp|xcf|bmp|djvu|pdf|stl|og[gav]|opus|flac|mp3|wav|midi?|webm|mpe?g)\Z",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Site:
    """One wiki. `namespaces` maps a key such as 6 to all its names: the wiki's own first, then the canonical ones."""

    language: str = "en"
    dbname: str = ""
    case: str = "first-letter"
    namespaces: Mapping[int, tuple[str, ...]] = field(default_factory=lambda: dict(CANONICAL), hash=False)

    @cached_property
    def keys(self) -> dict[str, int]:
        """The namespace key of each name, in lower case."""
        return {name.lower(): key for key, names in self.namespaces.items() for name in names if name}

    @cached_property
    def _kinds(self) -> dict[str, LinkKind]:
        kinds: dict[str, LinkKind] = {code: "language" for code in _LANGUAGES}
        kinds |= {name.replace("_", " ").lower(): "file" for name in _FILE_ALIASES.split()}
        kinds |= {name.replace("_", " ").lower(): "category" for name in _CATEGORY_ALIASES.split()}
        special: dict[int, LinkKind] = {-2: "media", 6: "file", 14: "category"}
        return kinds | {name: special.get(key, "text") for name, key in self.keys.items()}

    def link_kind(self, target: str) -> LinkKind:
        """What a link to `target`, written without a leading colon, is. "text": the reader sees its label."""
        prefix, colon, name = target.partition(":")
        if not colon:
            return "text"
        kind = self._kinds.get(prefix.replace("_", " ").strip().lower(), "text")
        # A prefix we don't know before the name of an image is a wiki's own alias of File.
        return "file" if kind == "text" and _FILE_NAME.search(name.rstrip()) else kind

    def namespace_of(self, title: str) -> int:
        """The key of the namespace that a page's title names; 0 where it names none."""
        prefix, colon, _ = title.partition(":")
        return self.keys.get(prefix.replace("_", " ").strip().lower(), 0) if colon else 0


def site_of(head: bytes) -> Site:
    """The wiki, from the beginning of its dump up to </siteinfo>; without siteinfo an English one.

    Raises UserError for a document type declaration: no dump has one, and it may define entities without end."""
    if b"<!DOCTYPE" in head or b"<!ENTITY" in head:
        raise UserError("the XML declares a document type (<!DOCTYPE or <!ENTITY); a wiki's dump never does: refused")
    text = head.decode("utf-8", "replace")
    dbname = _element(text, "dbname")
    names: dict[int, tuple[str, ...]] = {}
    for match in re.finditer(r"<namespace\b([^<>]*+)>(?:(?<=/>)|([^<]*+)</namespace>)", text):
        if own_key := re.search(r'\bkey="(-?\d{1,6})"', match[1]):
            names[int(own_key[1])] = (unescape(match[2] or "").replace("_", " "),)
    for key, canonical in CANONICAL.items():
        own = names.get(key, ())
        names[key] = own + tuple(name for name in canonical if name not in own)
    return Site(_language(text, dbname), dbname, _element(text, "case") or "first-letter", names)


def _element(text: str, name: str) -> str:
    match = re.search(f"<{name}>([^<]*)</{name}>", text)
    return unescape(match[1]).strip() if match else ""


def _language(text: str, dbname: str) -> str:
    """The language's code: of xml:lang, else of a dbname such as zh_min_nanwiki, else English."""
    root = re.search(r'<mediawiki\b[^<>]*\bxml:lang="([A-Za-z0-9-]+)"', text)
    if root:
        return root[1].lower()
    name = re.match(r"([a-z_]+?)wik(?:i|tionary|ibooks|inews|iquote|isource|iversity|ivoyage)$", dbname)
    return name[1].replace("_", "-") if name else "en"
