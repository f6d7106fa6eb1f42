"""Makes one HTML page of result files: figures, and tables of their numbers.

    python -m megatron_moe_comp.report RESULTS... -o report.html

RESULTS are files, or directories that hold them at any depth, of benchmarks/network.py (speed),
benchmarks/quality.py (perplexity and loss) and --moe-a2a-stats-json (bytes). Figures whose data are
absent are left out, and the page says what would produce them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_moe_comp.report.inputs import InputError, read_results

try:
    from megatron_moe_comp.report.page import build_page
except ModuleNotFoundError as error:
    if error.name != "matplotlib":
        raise
    sys.exit("Figures need Matplotlib: pip install -c constraints.txt matplotlib")


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page; exits with 1 and a message if a file cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_moe_comp.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"))
    options = parser.parse_args(arguments)
    try:
        page = build_page(read_results(options.results))
        options.output.write_text(page)
    except (InputError, OSError) as error:
        sys.exit(str(error))
    print(f"{options.output}: {page.count('<figure>')} figures, {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
