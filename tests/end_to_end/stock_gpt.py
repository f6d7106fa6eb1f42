"""Megatron's GPT pretraining without anything of ours but CPU host mode: the baseline of tests.

Data, batches and loss are pretrain_gpt_moe.py's; layer spec, dispatcher and flags are stock. What
is below is in the shape of Megatron-LM's pretrain_gpt.py, and docs/migrating.md changes both alike.
"""

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args

from megatron_moe_comp.cpu_host import patches, settings
from pretrain_gpt_moe import datasets_provider, forward_step

if __name__ == "__main__":
    patches.enable()
    datasets_provider.is_distributed = True

    args = parse_and_validate_args(
        extra_args_provider=settings.add_settings,
    )
    model_cfg = gpt_config_from_args(args)
    full_config = pretrain_cfg_container_from_args(args, model_cfg)
    pretrain(
        full_config,
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )
