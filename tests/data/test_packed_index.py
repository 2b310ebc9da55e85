"""The files of a packing: mapped, and of documents of the split alone."""

from pathlib import Path

import numpy as np

from megatron_sgt.data.best_fit import pack
from megatron_sgt.data.packed_index import open_packing, save_packing
from megatron_sgt.data.splits import split_parts


def test_files_are_mapped_and_number_the_documents_of_the_data_set(tmp_path: Path) -> None:
    lengths = np.array([5, 3, 20, 0, 8, 1, 2, 6, 30, 4], np.int32)
    for part in split_parts(lengths, (0.5, 0.5, 0.0), 8, "best_fit")[:2]:
        save_packing(str(tmp_path), part, lengths, 8, 7)
        begins, pieces = open_packing(str(tmp_path), part)
        expected, numbers = pack(lengths[part.first : part.last], 8, 7)
        assert isinstance(begins, np.memmap) and isinstance(pieces, np.memmap)
        assert np.array_equal(begins, expected) and np.array_equal(pieces - [part.first, 0], numbers)
        assert len(begins) == part.samples + 1
        assert set(pieces[:, 0]) == {n for n in range(part.first, part.last) if lengths[n]}
