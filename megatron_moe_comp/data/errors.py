"""The error every module here raises for what a user can put right."""


class PreparationError(ValueError):
    """Input or options that cannot be prepared.

    The message names the option or file, its value, the requirement and the remedy.
    """
