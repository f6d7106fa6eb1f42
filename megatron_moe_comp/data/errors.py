"""The error every module here raises for what a user can put right, and what commands do then."""

import sys
from collections.abc import Callable


class PreparationError(ValueError):
    """Input or options that cannot be prepared.

    The message names the option or file, its value, the requirement and the remedy.
    """


def run_command(name: str, run: Callable[[], None]) -> int:
    """Run a command; the process's exit status, 2 for what the user can put right."""
    try:
        run()
    except PreparationError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted: run the same command again", file=sys.stderr)
        return 130
    return 0
