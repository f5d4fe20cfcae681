"""Texts of many scripts, on which two forms of a vocabulary are compared: the same ones every time, made here."""

# ruff: noqa: E501, RUF001  (sentences as they are written)
from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence

_SEED = 28
_SENTENCES = (
    "All human beings are born free and equal in dignity and rights; they don't know it's so, or they'll say THEY'RE.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Straße, Größe, Übermut.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits : « c’est l’été », dit-on.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos. ¿Qué? ¡Mañana, niño!",
    "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Zażółć gęślą jaźń.",
    "Všichni lidé rodí se svobodní a sobě rovní. Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. İstanbul'da ışık, ğ ve I.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.",
    "Minden emberi lény szabadon születik; árvíztűrő tükörfúrógép. Ko‘p tilli o‘zbekcha.",
    "Все люди рождаются свободными и равными в своём достоинстве и правах. Съешь же ещё этих булок.",
    "Всі люди народжуються вільними і рівними у своїй гідності: ґава, їжак, є. Ђаци, љубав, џеп.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια. Ἐν ἀρχῇ ἦν ὁ λόγος.",
    "Բոլոր մարդիկ ծնվում են ազատ ու հավասար։ ყველა ადამიანი იბადება თავისუფალი.",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. בְּרֵאשִׁית בָּרָא אֱלֹהִים",
    "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق. بِسْمِ ٱللَّهِ ١٢٣٤",
    "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند. پچگژ ۱۲۳",
    "تمام انسان آزاد اور حقوق و عزت کے اعتبار سے برابر پیدا ہوئے ہیں۔",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। क्षत्रिय १२३",
    "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে। ੴ ਸਤਿ ਨਾਮੁ। ગુજરાતી લિપિ",
    "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர். ప్రతిపత్తిస్వత్వముల విషయమున మానవులెల్లరును",
    "ಎಲ್ಲಾ ಮಾನವರೂ ಸ್ವತಂತ್ರರಾಗಿಯೇ ಜನಿಸಿದ್ದಾರೆ. മനുഷ്യരെല്ലാവരും തുല്യാവകാശങ്ങളോടും. සියලු මනුෂ්‍යයෝ",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ๑๒๓ ມະນຸດທຸກຄົນເກີດມາ",
    "လူတိုင်းသည် တူညီလွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် မွေးဖွားလာသူများဖြစ်သည်။ មនុស្សទាំងអស់កើតមកមានសេរីភាព",
    "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。“引号”《书名》",
    "人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心，臺灣正體字。龍龜鬱",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。カタカナ、ﾊﾝｶｸ、ー",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 한글 각",
    "ሁሉም ሰዎች ነጻ ሆነው የተወለዱ ናቸው። ᎣᏏᏲ ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ ⴰⵎⴰⵣⵉⵖ བོད་སྐད། ᠮᠣᠩᠭᠣᠯ",
    "∀x ∈ ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β → ∑ᵢ xᵢ², ½ ≠ ⅓, 10⁻³ µm, 25 °C, №5, €99.90, ¥100, £5, ©®™ …—–",
    "🙂 👩\u200d👩\u200d👧\u200d👦 🇩🇪🇯🇵 ✊🏽 ❤️ ☃ ♞ 🀄 text 🚀🚀🚀 end",
)
_SHAPES = (
    " ", "  ", "   ", "a", " a", "a ", "  a  ", "\n", "\n\n", "\n\n\n", " \n ", "\t", "\t\tx\ty", "\r\n", "a\r\nb\r\n\r\nc", "a\n\n  b\n   \nc ",
    "ab\u00a0cd\u2003ef\u3000gh", "x \u2028 y\u2029z\u0085w", "\ufeffstart", "e\u0301 \u00e9 \u1e9b\u0323 ﬁ ｆｕｌｌ　ｗｉｄｔｈ ① ㎏ ＡＢＣ１２３", "\u2581a \u2581 \u2581\u2581b\u2581",
    "<0x41> <0x0A> <0xE2>", "0 1 12 123 1234 12345678901234567890 3.14 1,000,000 0x1F 1e-9 007 ٣٤ ४५", "!!! ??? ... --- === *** ### ((())) [[]] {{}} <<>> |||| ~~~~ ^^^^ ``` \"\"\" ''' ,,, ;;;",
    "don't I'm you'll WE'VE he'd it's 'S 'Ll 'ſ 'tis rock'n'roll o'clock", "snake_case camelCase PascalCase kebab-case SCREAMING_CASE dotted.name path/to/file.txt C:\\dir",
    "def f(x: int) -> str:\n    \"\"\"Doc.\"\"\"\n    if x > 0:\n\n        return f\"{x!r:>10}\"\n\treturn None  # tab\n", "#include <stdio.h>\nint main(void) { printf(\"%d\\n\", 1 << 3); return 0; }\n",
    "<html lang=\"en\"><body class='x'>&nbsp;&lt;b&gt;</body></html>", "{\"key\": [1, 2.5, null, true], \"k\\u00e9\": \"v\\n\"}", "SELECT * FROM t WHERE a<>'b' AND c>=1;", "https://example.org/a/b?c=d&e=%20f#g user@example.org",
    "| a | b |\n|---|:-:|\n| 1 | 2 |\n\n- [x] done\n* **bold** _it_ `code`\n\n> quote\n", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "abababababababababababababababababababab", "aaaa aaaaa aaaaaa  aaaaaaa", "xyzxyzxyz" * 8, " " * 70, "\n" * 40, "-" * 80, "数" * 50, "ha" * 40 + "!" * 40,
    "\x01 \x02\x1b[0m \x7f \u200b\u200e\u200f \u202eabc\u202c \ufffd \ue000 \U000f0000 \U0010fffd", "rare \u4dff \U00020000 \U0002a6d6 \U0001f9ff \U00010330\U00010331 \U0001d573",
    # Letters that a normaliser changes, each with a mark that joins it: sentencepiece looks for the longest known string
    # of characters, `tokenizers` for the whole of what is shown as one letter.
    *(" ".join(letter + mark for letter in "AEINOSZaeioＡＥＩＯａｅｉｏ①½ﬁГИЙАЕабе") for mark in "\u0301\u0308\u0327\u200d\ufe0f\u3099"),
)  # fmt: skip
_LETTERS = (
    (0x61, 0x7A), (0xC0, 0x24F), (0x250, 0x2AF), (0x370, 0x3FF), (0x400, 0x52F), (0x531, 0x587), (0x5D0, 0x5EA), (0x620, 0x6D3), (0x710, 0x72F), (0x904, 0x94D), (0x985, 0x9CD), (0xA05, 0xA4D), (0xA85, 0xACD), (0xB05, 0xB4D), (0xB85, 0xBCD), (0xC05, 0xC4D), (0xC85, 0xCCD), (0xD05, 0xD4D), (0xD85, 0xDDF), (0xE01, 0xE4D), (0xE81, 0xECD), (0xF40, 0xFBC), (0x1000, 0x104F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x135A), (0x13A0, 0x13F4), (0x1401, 0x166C), (0x16A0, 0x16EA), (0x1780, 0x17D3), (0x1820, 0x1878), (0x1E00, 0x1EFF), (0x1F00, 0x1FFC), (0x2000, 0x206F), (0x2070, 0x209C), (0x20A0, 0x20BF), (0x2100, 0x214F), (0x2150, 0x218B), (0x2190, 0x21FF), (0x2200, 0x22FF), (0x2460, 0x24FF), (0x2500, 0x257F), (0x2600, 0x26FF), (0x2D30, 0x2D67), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x3105, 0x312F), (0x3200, 0x32FE), (0x3300, 0x33FF), (0x4E00, 0x9FA5), (0xA000, 0xA48C), (0xAC00, 0xD7A3), (0xF900, 0xFA6D), (0xFB00, 0xFB06), (0xFB1D, 0xFB4F), (0xFE70, 0xFEFC), (0xFF01, 0xFFEF), (0x10330, 0x1034A), (0x1D400, 0x1D7FF), (0x1F300, 0x1F64F), (0x20000, 0x2A6D6),
)  # fmt: skip


def many_scripts(pieces: Sequence[str] = ()) -> list[str]:
    """Sentences, words in some 60 alphabets, runs of spaces and signs, code, and strings of a vocabulary's own pieces;
    every character is one that all libraries have known for years."""
    rng = random.Random(_SEED)
    alphabets = [[chr(code) for code in range(first, last + 1) if unicodedata.category(chr(code)) != "Cn"] for first, last in _LETTERS]
    words = ["".join(rng.choices(alphabet, k=rng.randrange(1, 9))) for alphabet in alphabets for _ in range(12)]
    made = [" ".join(rng.choices(words, k=rng.randrange(2, 9))) for _ in range(300)]
    made += [" ".join(words[at : at + 12]) for at in range(0, len(words), 12)]
    signs = [*"  \n\t.,'!?-_<>|/0123456789", "  ", "\n\n", "\u2581", "é", "е\u0301", "🙂", "数", "の"]
    common = [piece for piece in pieces if piece]
    made += ["".join(rng.choice(common or words) if rng.random() < 0.7 else rng.choice(signs) for _ in range(rng.randrange(1, 25))) for _ in range(1500)]
    made += ["".join(rng.choices(signs, k=rng.randrange(1, 40))) for _ in range(300)]
    # Of a run there are many splits that are equally good, where two libraries may choose differently.
    made += [sign * rng.randrange(2, 48) for sign in "=-*#._~!?/|+ \na0A1數あ가и" for _ in range(6)]
    long = " ".join(rng.sample(_SENTENCES, len(_SENTENCES))), "\n".join(made[:200])
    return ["", *_SENTENCES, *_SHAPES, *made, *long]
