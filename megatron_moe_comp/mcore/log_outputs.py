"""Where figures go besides the console: files that rank 0 writes, TensorBoard and W&B."""

from pathlib import Path

from megatron.training import get_tensorboard_writer, get_wandb_writer


def require_writable(option: str, path: str) -> None:
    """Creates the file and its directory where they are missing, on rank 0.

    Raises:
        ValueError: rank 0 cannot write the file that `option` names.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("a"):
            pass
    except OSError as error:
        raise ValueError(
            f"{option}={path}: rank 0 must be able to write this file, but {error.strerror}. Name "
            "a file in a directory that you may write to."
        ) from error


def write_scalars(scalars: dict[str, float], iteration: int) -> None:
    """Writes the values to TensorBoard and W&B, on the rank that has their writers."""
    writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
    if writer:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if wandb_writer:
        wandb_writer.log(scalars, iteration)
