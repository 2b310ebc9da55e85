import json
from pathlib import Path

import pytest

from megatron_sgt.config.data import DataConfig, TokenizerConfig
from megatron_sgt.data.tokenizer import (
    ORIGIN_FILE,
    build_tokenizer,
    read_origin,
    resolve_vocab_size,
    tokenizer_of,
    write_origin,
)
from megatron_sgt.errors import DataError


def make_hf_json(path: Path, eod: str | None = "<|endoftext|>") -> Path:
    """A byte-level BPE without merges: every byte is a token."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if eod:
        tokenizer.add_special_tokens([eod])
    tokenizer.save(str(path))
    return path


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    from transformers import PreTrainedTokenizerFast

    file = make_hf_json(tmp_path / "plain.json")
    PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>").save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


TEXTS = ["", " a  b\t\n\nc ", "naïve 漢字 😀\r\n", "<s> </s> <0x0A>"]


def test_sentencepiece(sp_model: str) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(type="sentencepiece", model=sp_model))
    assert (tokenizer.vocab_size, tokenizer.eod) == (320, 2)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(3 <= i < 320 for i in ids), "control tokens are never produced from text"


def test_sentencepiece_fingerprint_is_that_of_the_contents(sp_model: str, tmp_path: Path) -> None:
    original = build_tokenizer(TokenizerConfig(type="sentencepiece", model=sp_model))
    copy = tmp_path / "elsewhere.model"
    copy.write_bytes(Path(sp_model).read_bytes())
    assert (
        build_tokenizer(TokenizerConfig(type="sentencepiece", model=str(copy))).fingerprint() == original.fingerprint()
    )


def test_huggingface_file(tmp_path: Path) -> None:
    file = make_hf_json(tmp_path / "tokenizer.json")
    tokenizer = build_tokenizer(TokenizerConfig(type="huggingface", model=str(file)))
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    for text in TEXTS[:3]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    folder = build_tokenizer(TokenizerConfig(type="huggingface", model=str(tmp_path)))
    assert folder.fingerprint() == tokenizer.fingerprint()


def test_huggingface_folder(hf_folder: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(type="huggingface", model=str(hf_folder)))
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    for text in TEXTS[:3]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    before = tokenizer.fingerprint()
    assert before == build_tokenizer(TokenizerConfig(type="huggingface", model=str(hf_folder))).fingerprint()
    config = json.loads((hf_folder / "tokenizer_config.json").read_text())
    (hf_folder / "tokenizer_config.json").write_text(json.dumps({**config, "extra": 1}))
    assert before != build_tokenizer(TokenizerConfig(type="huggingface", model=str(hf_folder))).fingerprint()


def test_a_tokenizer_without_an_end_of_text_says_so_when_asked(tmp_path: Path) -> None:
    file = make_hf_json(tmp_path / "t.json", eod=None)
    tokenizer = build_tokenizer(TokenizerConfig(type="huggingface", model=str(file)))
    with pytest.raises(DataError, match=r"no end-of-text token.*\|endoftext\|"):
        _ = tokenizer.eod


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_missing_and_damaged_files(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="does not exist"):
        build_tokenizer(TokenizerConfig(type=kind, model=str(tmp_path / "none")))  # type: ignore[arg-type]
    (tmp_path / "bad").write_bytes(b"{not a tokenizer")
    with pytest.raises(DataError, match="is not a"):
        build_tokenizer(TokenizerConfig(type=kind, model=str(tmp_path / "bad")))  # type: ignore[arg-type]
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder"):
        build_tokenizer(TokenizerConfig(type=kind, model=str(tmp_path / "folder")))  # type: ignore[arg-type]
    assert capfd.readouterr().err == "", "the libraries print nothing beside the message"


def test_an_empty_vocabulary_is_damage(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}')
    with pytest.raises(DataError, match=r"t\.json has an empty vocabulary"):
        build_tokenizer(TokenizerConfig(type="huggingface", model=str(tmp_path / "t.json")))


def test_vocabulary_of_the_model(sp_model: str) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(type="sentencepiece", model=sp_model))
    assert resolve_vocab_size(None, tokenizer) == 320
    assert resolve_vocab_size(512, tokenizer) == 512
    assert resolve_vocab_size(100, None) == 100
    with pytest.raises(DataError, match=r"vocab_size 319 is smaller than the 320 ids"):
        resolve_vocab_size(319, tokenizer)
    with pytest.raises(DataError, match="must be set"):
        resolve_vocab_size(None, None)


def test_a_run_that_begins_documents_needs_the_token(tmp_path: Path, sp_model: str) -> None:
    file = make_hf_json(tmp_path / "t.json")
    assert build_tokenizer(TokenizerConfig(type="sentencepiece", model=sp_model)).bos == 1
    for add_bos in (False, True):
        data = DataConfig(tokenizer=TokenizerConfig.at(file, add_bos))
        with pytest.raises(DataError, match=r"has no beginning-of-text token .*data\.tokenizer\.add_bos"):
            _ = tokenizer_of(data).bos if add_bos is False else tokenizer_of(data)  # type: ignore[union-attr]


def test_the_origin_holds_as_long_as_the_files_stay(tmp_path: Path) -> None:
    assert read_origin(tmp_path) is None
    make_hf_json(tmp_path / "tokenizer.json")
    write_origin(tmp_path, "f" * 64, add_bos=True)
    assert read_origin(tmp_path) is not None
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert build_tokenizer(TokenizerConfig.at(tmp_path)).fingerprint() == "f" * 64
    make_hf_json(tmp_path / "tokenizer.json", eod="<eos>")
    assert read_origin(tmp_path) is None
    assert build_tokenizer(TokenizerConfig.at(tmp_path)).fingerprint() != "f" * 64
    (tmp_path / ORIGIN_FILE).write_text("[]")
    assert read_origin(tmp_path) is None


def test_a_class_in_python_alone_keeps_no_ordinary_added_token(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"<unk>": 0, "<eos>": 1, "a": 2, "b": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    settings = {"tokenizer_class": "CTRLTokenizer", "unk_token": "<unk>", "eos_token": "<eos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert build_tokenizer(TokenizerConfig.at(tmp_path)).encode("a <eos>")[0] == 2
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
    added = {"added_tokens_decoder": {"4": {"content": "covfefe", **flags}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | added))
    with pytest.raises(DataError, match=r"is a CTRLTokenizer, .* its added token 'covfefe' .*; convert it"):
        build_tokenizer(TokenizerConfig.at(tmp_path))
