from functools import cache

import pytest

from tests.mcore.saved_models import start_pool


@pytest.fixture(scope="module")
def pools():
    """Returns the pool of a layout by its name, each started once."""
    started = []

    @cache
    def start(layout):
        started.append(start_pool(layout))
        return started[-1]

    yield start
    for pool in started:
        pool.close()
