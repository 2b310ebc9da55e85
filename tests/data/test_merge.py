import json
from pathlib import Path

import numpy as np
import pytest

from megatron_sgt.config import TokenizerConfig
from megatron_sgt.data.merge import merge
from megatron_sgt.data.preprocess import PreprocessOptions, preprocess
from megatron_sgt.data.shards import Shard
from megatron_sgt.errors import DataError
from tests.helpers.datasets import write_dataset

SUFFIXES = (".bin", ".idx", ".json")


@pytest.fixture
def shards(tmp_path: Path, sp_model: str) -> list[str]:
    """Of one line-file, two keys, with bad and empty documents; and ``whole``, its unsharded form."""
    texts = [json.dumps({"text": f"layer {i}" * (i % 5 > 0), "title": f"t{i}"}) for i in range(97)]
    texts[40] = texts[90] = "bad"
    (tmp_path / "a.jsonl").write_text("\n".join(texts))

    def make(name: str, **changes: object) -> None:
        tokenizer = TokenizerConfig(type="sentencepiece", model=sp_model)
        preprocess(
            PreprocessOptions(
                (str(tmp_path / "a.jsonl"),), str(tmp_path / name), tokenizer, ("text", "title"), append_eod=True,
                max_bad_documents=2, **changes,
            )  # type: ignore[arg-type]
        )  # fmt: skip

    make("whole")
    for i in range(3):
        make("x", shard=Shard(i, 3), resume=bool(i))
    return [str(tmp_path / f"x-0000{i}-of-00003_text_document") for i in range(3)]


def test_merged_shards_are_the_unsharded_data_set(tmp_path: Path, shards: list[str]) -> None:
    for key in ("text", "title"):
        info = merge([shard.replace("text", key) + ".idx" for shard in shards], str(tmp_path / key))
        assert info.documents == json.loads((tmp_path / f"{key}.json").read_text())["documents"]
        for suffix in SUFFIXES:
            assert (tmp_path / (key + suffix)).read_bytes() == (tmp_path / f"whole_{key}_document{suffix}").read_bytes()


def test_shards_must_be_complete_and_in_order(tmp_path: Path, shards: list[str]) -> None:
    a, b, c = shards
    other = write_dataset(tmp_path / "other", [3], vocab_size=9)
    for given, message in (
        ([a, c], "shard 1/3 is missing after .*00000-of"),
        ([b, c], "shard 0/3 is missing before .*00001-of"),
        ([a, b], "shard 2/3 is missing after .*00001-of"),
        ([b, a, c], "shard 0/3 is missing before"),
        ([a, b, a], "named more than once"),
        ([a, b, c, c.replace("text", "title")], "shard 0/3 is missing before"),
        ([a, b, c.replace("text", "title")], None),
    ):
        if message is not None:
            with pytest.raises(DataError, match=message):
                merge(given, str(tmp_path / "out"))
    record = json.loads(Path(b + ".json").read_text())
    record["made_from"]["inputs"][0][3] += 1
    Path(b + ".json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"are no shards of the same input: .*a\.jsonl has changed since"):
        merge(shards, str(tmp_path / "out"))
    Path(other + ".json").write_text(json.dumps({**record, "made_from": None, "tokenizer_ids": "aa"}))
    assert not list(tmp_path.glob("out*"))


def test_data_sets_that_do_not_go_together(tmp_path: Path) -> None:
    a, b = (write_dataset(tmp_path / name, [3, 2]) for name in "ab")
    base = {"tokenizer": "t", "tokenizer_fingerprint": "f", "tokenizer_ids": "i", "vocab_size": 9, "append_eod": True}
    for changes, message in (
        ({"tokenizer_fingerprint": "g"}, "were made with different tokenizers"),
        ({"tokenizer_ids": "j"}, "versions of the tokenizer's library"),
        ({"vocab_size": 8}, "vocabularies of different sizes"),
        ({"add_bos": True}, "begin with the beginning-of-text token"),
        ({"append_eod": False}, "end with the end-of-text token"),
    ):
        for prefix, record in ((a, base), (b, {**base, **changes})):
            Path(prefix + ".json").write_text(json.dumps(record))
        with pytest.raises(DataError, match=f"{a} and {b} .*{message}"):
            merge([a, b], str(tmp_path / "out"))
    Path(b + ".json").unlink()
    with pytest.raises(DataError, match=rf"which tokenizer {b} was made with \({b}.json is missing\)"):
        merge([a, b], str(tmp_path / "out"))
    Path(a + ".json").unlink()
    with pytest.raises(DataError, match="is one of the data sets to merge"):
        merge([a, b], a, overwrite=True)
    assert not list(tmp_path.glob("out*"))
    merge([a, b], str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"exists already.*--overwrite"):
        merge([b, a], str(tmp_path / "out"))


def test_megatrons_own_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of several sequences, as sentence splitting makes them; joined as Megatron itself joins them."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    monkeypatch.setattr("megatron_sgt.data.writer._BLOCK", 2)
    for name, documents in (("a", [[3, 1], [4]]), ("b", [[1, 5, 9]]), ("wide", [[2]])):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), np.int32 if name == "wide" else np.uint16)
        for lengths in documents:
            builder.add_document(torch.arange(sum(lengths)), lengths)
        builder.finalize(str(tmp_path / f"{name}.idx"))
    a, b, wide = (str(tmp_path / name) for name in ("a", "b", "wide"))
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), np.uint16)
    for prefix in (a, b):
        theirs.add_index(prefix)
    theirs.finalize(str(tmp_path / "theirs.idx"))
    (tmp_path / "ours.json.tmp").write_text("{}")  # of a killed process
    info = merge([a, b], str(tmp_path / "ours"))
    assert (info.documents, info.sequences, info.tokens) == (3, 6, 23)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    assert not (tmp_path / "ours.json").exists(), "nothing is known of their tokenizer"
    with pytest.raises(DataError, match="store ids as uint16 and int32"):
        merge([a, wide], str(tmp_path / "out"))
    with open(b + ".idx", "ab") as stream:
        stream.write(bytes(3))  # one mode per sequence
    with pytest.raises(DataError, match="a multimodal data set is not merged"):
        merge([a, b], str(tmp_path / "out"))
