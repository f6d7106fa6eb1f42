from types import SimpleNamespace

import pytest

from megatron_moe_comp.options.config import CompressionConfig
from megatron_moe_comp.training import hooks
from megatron_moe_comp.training.clustering_adaptation import LshAdaptation
from megatron_moe_comp.training.stats_logger import StatsLogger


def test_our_function_comes_after_the_one_that_is_there():
    calls = []

    def users(*args, **kwargs):
        calls.append((args, kwargs))
        return "result"

    config = SimpleNamespace(finalize_model_grads_func=users)
    hooks.after_gradients(config, lambda: calls.append("first"))
    hooks.after_gradients(config, lambda: calls.append("second"))
    assert config.finalize_model_grads_func("model", num_tokens=3) == "result"
    assert calls == [(("model",), {"num_tokens": 3}), "first", "second"]


def test_without_one_it_comes_after_megatrons(monkeypatch):
    calls = []
    monkeypatch.setattr(hooks, "finalize_model_grads", lambda *args: calls.append(args))
    config = SimpleNamespace(finalize_model_grads_func=None)
    hooks.after_gradients(config, lambda: calls.append("ours"))
    config.finalize_model_grads_func("model")
    assert calls == [("model",), "ours"]


@pytest.mark.parametrize("method", ["none", "lsh"])
def test_statistics_and_clustering_keep_a_users_function(method):
    calls = []
    model = SimpleNamespace(
        post_wrap_hooks=[],
        transformer=SimpleNamespace(finalize_model_grads_func=lambda model: calls.append(model)),
    )
    compression = CompressionConfig(moe_a2a_compress=method)
    step = lambda: SimpleNamespace(iteration=0)  # noqa: E731
    args = SimpleNamespace(log_interval=10, train_iters=10)
    StatsLogger(compression, step, args).attach(model, [])
    LshAdaptation(compression, step, lambda: None, lambda state: None).attach(model, 0)
    with pytest.MonkeyPatch.context() as patch:
        module = "megatron_moe_comp.training.clustering_adaptation.sum_over_ranks"
        patch.setattr(module, lambda values: values)
        model.transformer.finalize_model_grads_func("the model")
    assert calls == ["the model"]
