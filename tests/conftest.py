from functools import cache

import pytest

from tests.gloo import GlooPool


@pytest.fixture(scope="session", params=[2, 4], ids=["2ranks", "4ranks"])
def pool(request):
    """Plain gloo processes."""
    pool = GlooPool(request.param)
    yield pool
    pool.close()


def initialize_megatron_groups(rank):
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from megatron_moe_comp.cpu_host import patches

    patches.enable()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    tensor_parallel.model_parallel_cuda_manual_seed(1)


@pytest.fixture(scope="session", params=[2, 4], ids=["ep2", "ep4"])
def megatron_pool(request):
    """Processes with Megatron's groups, all ranks expert parallel, in CPU host mode."""
    pool = GlooPool(request.param, initialize_megatron_groups)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def pools():
    """Returns the pool of a layout by its name, each started once."""
    from tests.saved_models import start_pool

    started = []

    @cache
    def start(layout):
        started.append(start_pool(layout))
        return started[-1]

    yield start
    for pool in started:
        pool.close()
