"""Runs an entry script that knows nothing of this package with compressed all-to-alls.

    torchrun --nproc-per-node 8 -m megatron_moe_comp.run Megatron-LM/pretrain_gpt.py FLAGS ...

The script is in the shape of Megatron-LM's pretrain_gpt.py and unchanged. Two names of Megatron are
replaced in this process before it imports them; see `training/megatron_lm_script.py`.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Runs the script that the command line names with the flags after it."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit(
            f"{' '.join(sys.argv[1:2]) or 'no script'}: not a file. Usage: "
            "torchrun ... -m megatron_moe_comp.run SCRIPT.py FLAGS ..."
        )
    del sys.argv[0]
    # As Python does for a script: what lies beside it, a checkout of Megatron, too, comes first.
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    # After that: it imports Megatron.
    from megatron_moe_comp.training.megatron_lm_script import replace_names

    replace_names()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
