"""Texts that show how a tokenizer splits: plain ones, and hard ones that tokenizers differ in."""

from __future__ import annotations

PLAIN = (
    "Hello world",
    "The quick brown fox jumps over the lazy dog. It didn't stop, it's there: they're 12 of 345 (about 3.5 %).",
    "First line\nsecond line\n\nA paragraph after an empty line.",
    "def f(x, y=1):\n    for i in range(10):\n        if x[i] != y: return i\n    return None",
    "1, 12, 123, 1234, 12345 and 1234567.89 of 2024-11-29",
    '{"key": "value", "list": [1, 2.5, true], "path": "https://example.com/a/b?c=d&e=f#g"}',
)
"""Texts without anything rare. A tokenizer that splits one of these otherwise is another tokenizer."""

HARD = (
    "   spaces   before, between    and after   ",
    "tab\tand\t\ttabs\n\t\tindented\n        more\n",
    "windows\r\nlines\r\n\r\n\nand\n\n\n\nmany",
    "it's we'LL they'Re I'M you'd 'tis d'Artagnan",
    "HTMLParser camelCase snake_case SCREAMING_CASE kebab-case McDonald",
    "for(int i=0;i<10;++i){a[i]+=b[i]*c;} // x\n/* y */ #include <z>",
    '$100 €5 50% #tag @user ^_^ :-) ~!@#$%^&*()_+{}|:"<>?',
    "½ ² ٣٤٥ १२३ Ⅻ ① 12a34 0x1F 1,234,567",
    "Zażółć gęślą jaźń. Größe, naïve, œuvre, Việt Nam",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m Vie\u0323\u0302t",
    "\ufb01 \ufb02 ＡＢＣ ㌔ ™ © ß ẞ İ ı ſ ǅ",
    "“quotes” ‘single’ — dash – en … ellipsis « guillemets »",
    "Ελληνικά Русский текст",
    "日本語のテキスト、カタカナ。中文，标点！？",
    "한국어 텍스트 ㄱㄴㄷ \u1112\u1161\u11ab",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "हिन्दी में लिखा हुआ पाठ, क्या यह ठीक है?",
    "اَلْعَرَبِيَّةُ لُغَةٌ جَمِيلَةٌ، أليس كذلك؟ עברית",
    "বাংলা লেখা தமிழ் తెలుగు မြန်မာ ខ្មែរ",
    "👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 👍🏽 🇩🇪🇫🇷 ❤\ufe0f",
    "\u00a0nbsp\u2003em\u200bzero\u200dwidth\ufeff",
)
"""Numbers, marks, scripts, emoji, white space and code in which tokenizers differ."""
