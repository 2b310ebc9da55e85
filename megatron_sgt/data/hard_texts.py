"""Texts on which two tokenizers that should be one are compared. No text of ordinary prose finds a difference."""

HARD_TEXTS = (
    "The quick brown fox, jumps over  two   lazy dogs.\n\n\tdef f(x: int) -> int:\n        return x ** 2  # 3.14159\n",
    " leading and trailing spaces ",
    "   three before,   three between,   three after   ",
    "\n\nnewlines\n \n\n\nat\nboth ends\n\n",
    "\ttabs\t\tand \t mixed\n\t",
    "lines of\r\nanother\r\n\r\nsystem\rand of an old one",
    "naïve café – “quotes” … 北京 Владивосток नमस्ते 🙂👩‍🚀 \u00a0\u200b ﬁ Å Å ①",
    "天地玄黃，宇宙洪荒。日本語のテキストと한국어 문장。",
    "🙂🙃 👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪🇯🇵 ☺️",
    "e\u0301 \u00e9 n\u0303 \u00f1 a\u0323\u0302 \u1ead o\u0308\u0304 Z\u0351\u036f\u0347",
    "السلام عليكم ورحمة الله، كَتَبَ ١٢٣ \u202bשָׁלוֹם\u202c",
    "हिन्दी में क्ष त्र ज्ञ, বাংলা, தமிழ், ไทย, ភាសាខ្មែរ",
    "0 00 007 3.14159 1,234,567.89 1e-10 0x1F 12345678901234567890 ²³½ ٣ Ⅷ",
    "a" * 400 + " " * 100 + "=" * 100 + "1" * 100 + "!" * 50,
    "aaaaaaaaaaaaaaaaaa        1234567890 0000 ======== \r\n\r\n\x00\x7f",
    "for (int i = 0; i < n; ++i) {\n    s += a[i]->x * b[i]; // sum\n}\n#define F(x) ((x)&0xff)\n<p class='a'>&amp;",
    "<s> </s> <unk> <0x0A> <|endoftext|>",
    "a<|begin_of_text|>b<|end_of_text|>c <|eot_id|><|im_start|>user\n<|im_end|> <bos><eos><pad>",
    "[CLS] one [SEP] two[MASK][PAD][UNK] ##three <mask>four</s><s>",
    "\ufeffbegins with a byte order mark\ufeff",
    "NUL\x00inside, \x00\x00, and \x01\x1b[0m\x7f\x85 controls",
    "zero\u200bwidth\u200c and\u200d joined\u2060 s\u00adoft \u2028 line \u2029 paragraph \ufffd \ue000 \U0010ffff",
    "don't we'll I'VE it’s ’twas rock'n'roll — e.g. i.e. U.S.A. state-of-the-art x_y CamelCase ALLCAPS",
    "",
)  # fmt: skip
"""Texts that the exported tokenizer must encode and decode as the training tokenizer does."""
