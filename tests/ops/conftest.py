import os

import pytest
import torch

from megatron_moe_comp import ops

ISA_VARIABLE = "MEGATRON_MOE_COMP_CPU_ISA"


@pytest.fixture(scope="module", params=["avx512", "avx2", "generic"])
def isa(request):
    """Each instruction set that this machine has, in turn."""
    outside = os.environ.get(ISA_VARIABLE)
    os.environ[ISA_VARIABLE] = request.param
    try:
        message = torch.empty(0, dtype=torch.uint8)
        ops.quantize_pack(torch.empty(0, 8), None, message, [], key=0, offset=0, stream=0)
        yield request.param
    except ValueError as error:
        if "this machine has no such instructions" not in str(error):
            raise
        pytest.skip(str(error))
    finally:
        os.environ.pop(ISA_VARIABLE)
        if outside is not None:
            os.environ[ISA_VARIABLE] = outside
