from megatron_sgt.data.hard_texts import HARD_TEXTS


def test_the_hard_texts_hold_what_makes_tokenizers_differ() -> None:
    assert len(set(HARD_TEXTS)) == len(HARD_TEXTS) == 24
    whole = "|".join(HARD_TEXTS)
    needed = [
        "  ",
        "\t",
        "\r\n",
        "\x00",
        "\ufeff",
        "\u200b",
        "\u200d",
        "e\u0301",
        "北",
        "ع",
        "न",
        "🙂",
        "</s>",
        "[SEP]",
    ]
    assert all(sign in whole for sign in needed)
    assert "" in HARD_TEXTS and any(t.startswith(" ") for t in HARD_TEXTS) and any(t.endswith("\n") for t in HARD_TEXTS)
