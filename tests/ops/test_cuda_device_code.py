"""What nvcc makes of the CUDA kernels, read from PTX and from the report of ptxas."""

import re
import shutil

import pytest

from tests.cuda_emulation import build

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")


@pytest.fixture(scope="module", params=[80, 90], ids=["sm_80", "sm_90"])
def architecture(request):
    return request.param


@pytest.fixture(scope="module", params=build.OPS)
def op(request):
    return request.param


@pytest.fixture(scope="module")
def device_code(op, architecture):
    return build.device_code(op, architecture)


def kernels_of(ptx):
    """The text of each kernel, by mangled name."""
    parts = re.split(r"\.entry\s+(\w+)", ptx)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_nothing_is_spilled(op, device_code):
    ptx, report = device_code
    found = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    # The routine for division has a line, too, where the assembler makes it a function.
    assert len(found) >= len(kernels_of(ptx)) >= (6 if op == "lsh_hash" else 12)
    assert set(found) == {("0", "0", "0")}


def test_every_float_operation_rounds_once(device_code):
    """Without flags against it: the kernels ask for each operation by name."""
    ptx, _ = device_code
    assert "mul.rn.f32" in ptx
    for forbidden in (r"\.ftz\b", r"\bfma\.", r"\bmad\.\w+\.f32", r"\bapprox\b"):
        assert not re.search(forbidden, ptx), forbidden


@pytest.mark.parametrize("op", ["quantize_pack", "unpack_dequantize"], scope="module")
def test_rows_and_messages_move_16_bytes_at_a_time(device_code):
    """In every kernel the message does, in those for aligned rows the rows do too."""
    ptx, _ = device_code
    for name, text in kernels_of(ptx).items():
        is_wide = "Lb1ELi" in name
        vectors = {
            kind: len(re.findall(rf"\b{kind}\.global(?:\.\w+)*\.v4\.", text))
            for kind in ("ld", "st")
        }
        rows, message = ("ld", "st") if "quantize_pack_kernel" in name else ("st", "ld")
        assert vectors[message] >= 1, name
        assert (vectors[rows] >= 1) == is_wide, name
