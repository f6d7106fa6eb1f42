import pytest

from megatron_moe_comp.plan.operations import tokens_per_rank, weights_per_rank
from megatron_moe_comp.plan.shape import Layout, Stack, layout_of_args, model_of_args
from megatron_moe_comp.training.arguments import parse_command

GPT = """
    torchrun --nproc-per-node 8 /somewhere/pretrain_gpt_moe.py --num-layers 6 --hidden-size 64
    --num-attention-heads 4 --seq-length 32 --num-experts 8 --moe-router-topk 2
    --expert-model-parallel-size 4 --micro-batch-size 2 --global-batch-size 64 --vocab-size 1000
"""
T5 = """
    finetune_t5_moe.py --encoder-num-layers 2 --decoder-num-layers 4 --hidden-size 64
    --num-attention-heads 4 --encoder-seq-length 32 --decoder-seq-length 8 --num-experts 8
    --micro-batch-size 2 --t5-activation geglu --ffn-hidden-size 96
"""


def read(command, ranks=16, ranks_per_node=8):
    args = parse_command(command.split())
    layout = layout_of_args(args, ranks, ranks_per_node, load=1.0)
    return model_of_args(args, layout), layout


def test_a_gpt():
    model, layout = read(GPT)
    assert model.stacks == (Stack(6, 6, 32),)
    assert (model.hidden_size, model.ffn_hidden_size, model.moe_ffn_hidden_size) == (64, 256, 256)
    assert (model.num_experts, model.topk, model.micro_batch_size) == (8, 2, 2)
    assert model.num_microbatches == 2  # 64 samples, 2 on each of 16 ranks at a time
    assert (model.dtype, model.prob_bytes, model.vocab_size) == ("float32", 4, 1000)
    assert (layout.expert_parallel, layout.near_peers, layout.far_peers) == (4, 3, 0)


def test_its_variations():
    model, layout = read(
        f"{GPT} --bf16 --moe-router-dtype fp32 --moe-layer-freq ([0]+[1]*2)*2 --swiglu "
        "--moe-ffn-hidden-size 32 --group-query-attention --num-query-groups 2 --kv-channels 32 "
        "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1 "
        "--pipeline-model-parallel-size 2 --sequence-parallel --recompute-granularity selective "
        "--recompute-modules moe --moe-shared-expert-intermediate-size 16",
        ranks_per_node=2,
    )
    assert model.stacks == (Stack(6, 4, 32),)
    assert (model.dtype, model.prob_bytes, model.gated) == ("bfloat16", 4, True)
    assert (model.ffn_hidden_size, model.moe_ffn_hidden_size) == (128, 32)
    assert (model.attention_size, model.kv_size, model.shared_expert_size) == (128, 64, 16)
    assert model.recompute == "moe"
    assert model.num_microbatches == 8
    assert (layout.near_peers, layout.far_peers) == (1, 2)
    assert tokens_per_rank(model, layout, model.stacks[0]) == 32
    dense, experts = weights_per_rank(model, layout)
    assert experts == 8 * 3 * 64 * 32 * 4 / 4 / 2
    attention = 64 * (128 + 64 + 64 + 128)
    layers = 6 * attention + 2 * 3 * 64 * 128 + 4 * (64 * 8 + 3 * 64 * 16)
    assert dense == (layers + 1000 * 64) / 2 / 2


def test_a_t5():
    model, _ = read(T5)
    assert model.stacks == (Stack(2, 2, 32), Stack(4, 4, 8, attentions=2))
    assert model.gated
    assert model.moe_ffn_hidden_size == 96


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python train.py --num-layers 2", "which script .* pretrain_gpt_moe.py"),
        ("--num-layers 2", "which script"),
        (GPT.replace("--num-experts 8 ", ""), "--num-experts: "),
    ],
)
def test_refusals(command, message):
    with pytest.raises(ValueError, match=message):
        read(command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_parallel": 3}, "--ranks=8: cannot be divided into expert parallel groups of 3"),
        ({"tensor_parallel": 16}, "tensor, pipeline and context parallel groups of 16"),
        ({"ranks_per_node": 0}, "--ranks-per-node=0: "),
        ({"load": 0.5}, "--load=0.5: "),
    ],
)
def test_layouts_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Layout(**{"ranks": 8, "expert_parallel": 4, "ranks_per_node": 4} | options)


def test_expert_tensor_parallel_ranks_fill_a_node():
    layout = Layout(16, 4, 4, tensor_parallel=4, expert_tensor_parallel=4)
    assert (layout.near_peers, layout.far_peers) == (0, 3)
