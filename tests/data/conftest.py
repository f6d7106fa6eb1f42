"""Small corpora, and how the tests read back what a preparation wrote."""

import warnings
from pathlib import Path

import pytest

from megatron_moe_comp.data.outputs import Outputs

# Big enough for a few hundred merges and with what source code needs kept: tabs, runs of spaces,
# trailing blanks, carriage returns, no final newline.
CODE = """def function_{i}(self, value, other=None):
    \"\"\"Return the value that number {i} names.\"\"\"
\tif value is None:
        return other   \n    for item in range({i}):\r
        value = value + item  # step {i}
    return self.function_{i}(value, other) or [{i}, {i} + 1]"""


@pytest.fixture
def code_directory(tmp_path: Path) -> Path:
    """Twenty text files in nested folders."""
    root = tmp_path / "code"
    for i in range(20):
        path = root / f"package_{i % 3}" / f"module_{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        # As bytes: text mode would translate the carriage return.
        path.write_bytes((CODE.replace("{i}", str(i)) * (1 + i % 4)).encode())
    return root


@pytest.fixture
def read_split():
    """A function from a prefix and a split to its documents as text, through Megatron's classes."""
    with warnings.catch_warnings(action="ignore"):
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.tokenizers import MegatronTokenizer

    def read(prefix: Path, split: str) -> list[str]:
        outputs = Outputs(prefix)
        tokenizer = MegatronTokenizer.from_pretrained(
            tokenizer_path=str(outputs.tokenizer), metadata_path={"library": "sentencepiece"}
        )
        with warnings.catch_warnings(action="ignore"):
            dataset = IndexedDataset(str(outputs.data_path(split)))
        texts = []
        for ids in dataset:
            assert ids[-1] == tokenizer.eod
            assert tokenizer.eod not in ids[:-1]
            texts.append(tokenizer.detokenize(ids[:-1].tolist()))
        assert list(dataset.document_indices) == list(range(len(texts) + 1))
        return texts

    return read


@pytest.fixture
def read_files():
    """A function from a prefix to the content of every file under it, by ending."""

    def read(prefix: Path) -> dict[str, bytes]:
        return {
            path.name.removeprefix(prefix.name): path.read_bytes()
            for path in prefix.parent.glob(f"{prefix.name}[_.]*")
            if path.is_file() and path.suffix != ".lock"
        }

    return read
