"""Token ids in Megatron's indexed format; the only module here that imports Megatron.

Importing it takes seconds, hence the modules that decide whether there is anything to do do not.
"""

from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_moe_comp.data.encoding import EncodedDocument


def token_dtype(vocab_size: int) -> str:
    """The numpy name of the smallest dtype Megatron stores such ids in: uint16 or int32."""
    return DType.optimal_dtype(vocab_size).__name__


class TokenFileWriter:
    """Writes one .bin/.idx pair."""

    def __init__(self, bin_path: Path, idx_path: Path, dtype: str) -> None:
        self._idx_path = idx_path
        self._builder = IndexedDatasetBuilder(str(bin_path), dtype=getattr(np, dtype))

    def add(self, document: EncodedDocument) -> None:
        """Append a document with its sequences."""
        self._builder.add_document(document.ids, document.sequence_lengths)

    def close(self) -> None:
        """Write the index and close both files."""
        self._builder.finalize(str(self._idx_path))
