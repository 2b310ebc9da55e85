from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from megatron_sgt.data.special_tokens import read_as_text


def test_a_special_token_that_is_a_piece_of_the_model_is_cut() -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((sign, -5.0) for sign in "ab</s>")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    before = tokenizer.encode("a b/").ids
    read_as_text(tokenizer)
    assert tokenizer.encode("a</s>b </s>").tokens == [*"▁a</s>b▁</s>"]
    assert tokenizer.encode("a b/").ids == before


def test_ordinary_added_tokens_stay_unless_they_bound_documents() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1, "<eos>": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken("<eos>"), AddedToken("<think>")])
    read_as_text(tokenizer)
    assert tokenizer.encode("a <eos> <think>").ids == [0, 2, 3]
    read_as_text(tokenizer, [2])
    assert tokenizer.encode("a <eos> <think>").ids == [0, 1, 1, 3]
    assert tokenizer.token_to_id("<eos>") == 2


def test_a_word_that_merely_holds_a_special_token_is_left_whole() -> None:
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "EOS": 1, "GEOSPHERE": 2, "EOSIN": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("EOS", single_word=True)])
    before = tokenizer.encode("GEOSPHERE EOSIN").ids
    read_as_text(tokenizer)
    assert tokenizer.encode("GEOSPHERE EOSIN").ids == before == [2, 3]
    assert 1 not in tokenizer.encode("EOS EOSIN EOS").ids


def test_a_model_that_finds_none_is_left_as_it_is() -> None:
    """Every rule costs time at every text."""
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "a": 2, "sep": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[UNK]", "[SEP]"])
    read_as_text(tokenizer)
    assert isinstance(tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
    assert tokenizer.encode("a [SEP] a").ids == [2, 0, 0, 0, 2]
