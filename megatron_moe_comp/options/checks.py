"""How an option is named to users, and the check of a choice."""


def flag(name: str) -> str:
    """Returns the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError where `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(
            f"{flag(name)}={value}: not one of {', '.join(choices)}. Choose one of these."
        )
