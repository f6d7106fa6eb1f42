"""Published checkpoints to ones that the entry scripts load.

hf_t5.py              the command: python -m megatron_moe_comp.tasks.t5.convert.hf_t5 --help
  -> hf_t5_files.py   a Hugging Face T5 directory: configuration, tensors, tokenizer
  -> t5_weights.py    its tensors under Megatron's names and in its layouts
  -> t5_checkpoint.py a torch_dist checkpoint of them, by Megatron
"""
