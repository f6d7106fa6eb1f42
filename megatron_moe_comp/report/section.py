"""Section: one question that the report answers, with its pictures and tables."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Picture:
    """A figure as SVG."""

    caption: str
    svg: str


@dataclass(frozen=True)
class Table:
    """A table; its first columns are text, the others numbers."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class Section:
    """A heading, what to know to read it, pictures, and their numbers."""

    title: str
    text: str
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Missing:
    """A section whose data are absent."""

    title: str
    remedy: str
    """What would produce them."""


def number(value: float | None, digits: int, unit: str = "") -> str:
    """Returns a number with this many decimals; "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def spread(middle: float | None, low: float | None, high: float | None, digits: int) -> str:
    """Returns "middle (low to high)", or what there is of it."""
    if middle is None or low is None or high is None:
        return number(middle, digits)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
