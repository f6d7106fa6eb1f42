"""The emulated CUDA kernels under sanitizers, and whether the tests see bugs that are put in."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cuda_emulation import build
from tests.cuda_emulation.run_cases import run

pytestmark = pytest.mark.skipif(build.missing_tool() is not None, reason=str(build.missing_tool()))


@pytest.mark.parametrize(
    "sanitizer", ["plain", "address", "undefined", pytest.param("thread", marks=pytest.mark.slow)]
)
def test_nothing_to_report(sanitizer, digests):
    end = run(sanitizer)
    assert end.returncode == 0, end.stderr[-5000:]
    assert end.stderr == ""
    assert set(end.stdout.split()) == digests[sanitizer == "thread"]


@pytest.fixture(scope="module")
def digests():
    """What is right: the one digest of both orders of threads, and that of the shorter run."""
    found = {}
    for few_blocks in (False, True):
        found[few_blocks] = set(run("plain", few_blocks=few_blocks).stdout.split())
        assert len(found[few_blocks]) == 1
    return found


class Mutation(NamedTuple):
    """A bug: text of a source and what takes its place."""

    bug: str
    file: str
    old: str
    new: str
    seen_by: str = "plain"


PACK, UNPACK = "cuda/quantize_pack.cu", "cuda/unpack_dequantize.cu"
CLUSTERS = "cuda/cluster_sum.cu"
HASH = "cuda/lsh_hash.cu"
MUTATIONS = [
    Mutation("codes leave before all are there", PACK,
             "    __syncthreads();\n    copy_out(part", "    copy_out(part"),
    Mutation("the next part overwrites this one", PACK,
             "    if (first < num_groups) __syncthreads();", ""),
    Mutation("the block's maximum is read too early", PACK,
             "    __syncthreads();\n#pragma unroll\n    for (int i = 0; i < kThreads",
             "#pragma unroll\n    for (int i = 0; i < kThreads"),
    Mutation("the next row's maximum overwrites this one's", PACK,
             "warps[row % 2]", "warps[0]", "thread"),
    Mutation("a lane is left out of the maximum", PACK, "0xffffffffu, value", "0x7fffffffu, value"),
    Mutation("half of the random bits are used twice", PACK, "words[i] >> 16", "words[i] & 0xffff"),
    Mutation("a pair of codes is shifted too far", PACK,
             "pairs[3] << 2 * num_bits", "pairs[3] << 3 * num_bits"),
    Mutation("a row of NaN is not one of zeros", PACK, "word &= mask", "word &= ~0u"),
    Mutation("reads behind the last column", PACK, "i < columns ? values[i] : 0", "values[i]",
             "address"),
    Mutation("bits behind the last column are not zeros", PACK, "bytes &= (", "bytes |= 0 & ("),
    Mutation("keeps more than fits", PACK, "if (kLong && i >= kKeptGroups) continue;", "",
             "undefined"),
    Mutation("two blocks write the same bytes", PACK,
             "params.table.tiles_per_row = 1;", "params.table.tiles_per_row = 2;", "thread"),
    Mutation("the first tile of a segment is another's", "cuda/tiles.cuh",
             "first_tile <= index", "first_tile < index"),
    Mutation("the last tile of a segment is full", "cuda/tiles.cuh",
             "left < table.rows_per_tile ?", "left < 0 ?"),
    Mutation("the second launch begins where the first ended", "cuda/tiles.cuh",
             "      table.num_segments = 0;\n      tiles = 0;", "      table.num_segments = 0;"),
    Mutation("rows are aligned because they are wide", "cuda/tiles.cuh",
             "call.hidden % kGroup == 0 && ", "call.hidden % kGroup == 0 || ", "undefined"),
    Mutation("writes in front of the codes", "cuda/staging.cuh",
             "if (at >= first && at + kVector <= last) {\n      *re",
             "if (at + kVector <= last) {\n      *re"),
    Mutation("four bytes at any address", "cuda/staging.cuh",
             "(offset | num_bytes) % 4 == 0", "num_bytes % 4 == 0", "undefined"),
    Mutation("codes are read before all are there", UNPACK,
             "  __syncthreads();\n", ""),
    Mutation("the second four values begin a bit too early", UNPACK,
             "bit + i * num_bits", "bit + (i - i / 4) * num_bits"),
    Mutation("the rows of a cluster in fours, the last ones not", CLUSTERS,
             "if (i + k < work.last) pieces", "if (i + k < work.last - 1) pieces"),
    Mutation("the last block goes on behind the last cluster", CLUSTERS,
             "const bool exists = cluster < p.num_clusters;", "const bool exists = true;",
             "address"),
    Mutation("rows are aligned because the values are", CLUSTERS,
             "(call.rows) |", "(call.values) |", "undefined"),
    Mutation("writes behind the last column", UNPACK, "if (i < count) target", "target", "address"),
    Mutation("codes are mixed before all are there", HASH,
             "  __syncthreads();\n  for (int i = threadIdx.x; i < num_rows",
             "  for (int i = threadIdx.x; i < num_rows"),
    Mutation("a stage begins before the last one has ended", HASH,
             "  __syncthreads();\n}\n\ntemplate <typename Row>\n__global__",
             "}\n\ntemplate <typename Row>\n__global__"),
    Mutation("the next columns overwrite these", HASH,
             "      __syncthreads();\n    }\n#pragma unroll", "    }\n#pragma unroll"),
    Mutation("any lane has the code of the largest", HASH,
             "upper == largest ? static_cast<uint32_t>(candidate) : 0",
             "static_cast<uint32_t>(candidate)"),
    Mutation("the last block has coordinates behind the last", HASH,
             "left < p.block_size ? left", "left < 0 ? left"),
    Mutation("reads behind the last column of a row", HASH,
             "row < num_rows && k < columns", "row < num_rows", "address"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.bug)
def test_a_bug_is_seen(mutation, digests, tmp_path):
    kernels = tmp_path / "kernels"
    shutil.copytree(build.KERNELS, kernels, ignore=shutil.ignore_patterns("cpu", "*.cpp"))
    source = kernels / mutation.file
    text = source.read_text()
    assert text.count(mutation.old) == 1, "the mutation does not fit the source any more"
    source.write_text(text.replace(mutation.old, mutation.new))
    op = Path(mutation.file).stem
    op = op if op in build.SOURCES else "quantize_pack"
    end = run(mutation.seen_by, **{op: kernels})
    if mutation.seen_by == "plain":
        assert set(end.stdout.split()) != digests[False]
    else:
        assert end.returncode != 0
        assert {"address": "AddressSanitizer", "undefined": "runtime error",
                "thread": "data race"}[mutation.seen_by] in end.stderr  # fmt: skip
