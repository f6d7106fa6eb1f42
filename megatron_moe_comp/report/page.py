"""The report as one HTML page that needs nothing else: no script, no font, no request."""

import re
from collections.abc import Iterator, Sequence
from html import escape
from itertools import count

from megatron_moe_comp.report.drawing import look, styles
from megatron_moe_comp.report.inputs import Results, Source
from megatron_moe_comp.report.network_figures import (
    break_even_section,
    phase_section,
    speedup_section,
)
from megatron_moe_comp.report.network_results import STOCK, cases
from megatron_moe_comp.report.quality_figures import loss_section, ratio_section, time_section
from megatron_moe_comp.report.quality_results import by_setting
from megatron_moe_comp.report.section import Missing, Picture, Section, Table
from megatron_moe_comp.report.traffic_figures import collect_traffic, load_section, wire_section

TITLE = "Compressed expert all-to-all: results"
FONTS = '"DejaVu Sans", Verdana, "Bitstream Vera Sans", Arial, sans-serif'
CSS = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; color: #111; background: #fff;
  font: 1rem/1.5 system-ui, "Segoe UI", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .25rem; border-top: 2px solid #111; padding-top: .5rem; }
p, ul { max-width: 46rem; margin: .5rem 0; }
code { overflow-wrap: anywhere; }
a { color: #0b57a4; }
.missing { border-left: 4px solid #bbb; padding-left: .75rem; }
.pictures { display: grid; gap: 1.25rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
figure { margin: .75rem 0 0; max-width: 36rem; min-width: 0; }
figcaption, caption { font-weight: 600; text-align: left; padding: .25rem 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: FONTS !important; }
.tables { display: flex; flex-wrap: wrap; gap: 1.25rem 3rem; margin: 1.25rem 0; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ccc; text-align: right;
  white-space: nowrap; }
thead th { border-bottom: 2px solid #111; vertical-align: bottom; white-space: normal; }
th.text, td.text { text-align: left; }
.prose td, .prose th { white-space: normal; overflow-wrap: anywhere; min-width: 7rem;
  vertical-align: top; }
@media print {
  @page { size: A4; margin: 14mm; }
  body { padding: 0; max-width: none; font-size: 9.5pt; }
  nav { display: none; }
  h2 { break-after: avoid; margin-top: 1.5rem; }
  .pictures { grid-template-columns: 1fr 1fr; }
  figure, tr { break-inside: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 7pt; }
  th, td { padding: .1rem .3rem; }
  td.number { white-space: normal; }
  thead { display: table-header-group; }
  svg, td, th { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
""".replace("FONTS", FONTS)


def sections(results: Results) -> list[Section | Missing]:
    """Returns the sections in the order of the page."""
    found, runs = cases(results.network), by_setting(results.quality)
    traffic = collect_traffic(runs, results.statistics)
    names = [*runs, *(method for case in found for method in case.methods), *traffic]
    with look():
        looks = styles(names, STOCK)
        return [
            speedup_section(found, looks),
            break_even_section(found),
            phase_section(found),
            ratio_section(runs, looks),
            loss_section(runs, looks),
            time_section(runs, found, looks),
            wire_section(traffic, looks),
            load_section(traffic, found),
        ]


def build_page(results: Results) -> str:
    """Returns the HTML page."""
    parts, numbers = sections(results), count(1)
    counts = (
        f"Network rows: {len(results.network)}. Quality runs: {len(results.quality)}. "
        f"Files of statistics: {len(results.statistics)}."
    )
    links = "".join(f'<li><a href="#{anchor(p.title)}">{escape(p.title)}</a></li>' for p in parts)
    inputs = "Inputs"
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # Browsers ask for /favicon.ico of a page that names none.
            f'<link rel="icon" href="data:,">\n<title>{TITLE}</title>\n<style>{CSS}</style>',
            f"</head>\n<body>\n<h1>{TITLE}</h1>\n<p>{counts}</p>",
            f'<nav><ul>{links}<li><a href="#{anchor(inputs)}">{inputs}</a></li></ul></nav>',
            *(render(part, numbers) for part in parts),
            f'<section id="{anchor(inputs)}"><h2>{inputs}</h2>',
            table(describe(results.sources), "prose"),
            "</section>\n</body>\n</html>\n",
        ]
    )


def anchor(title: str) -> str:
    """Returns a title as the name of a place in the page."""
    return re.sub(r"\W+", "-", title.lower())


def render(section: Section | Missing, numbers: Iterator[int]) -> str:
    """Returns a section as HTML; takes a number for each of its pictures."""
    start = f'<section id="{anchor(section.title)}"><h2>{escape(section.title)}</h2>'
    if isinstance(section, Missing):
        return f'{start}<p class="missing">Left out: needs {prose(section.remedy)}.</p></section>'
    figures = "".join(map(figure, section.pictures, numbers))
    pictures = f'<div class="pictures">{figures}</div>' if figures else ""
    tables = "".join(map(table, section.tables))
    text = f"<p>{prose(section.text)}</p>"
    return f'{start}{text}{pictures}<div class="tables">{tables}</div></section>'


def figure(picture: Picture, number: int) -> str:
    """Returns a picture as HTML, with names that no picture of another number has."""
    caption = escape(picture.caption)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\1figure{number}-", picture.svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{caption}"', 1)
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def table(content: Table, css_class: str = "") -> str:
    """Returns a table as HTML, in a box that scrolls where it is too wide."""

    def row(cells: Sequence[str], first: str, rest: str) -> str:
        written = [
            f'<{tag} class="{"text" if column < content.text_columns else "number"}">'
            f"{escape(cell)}</{tag}>"
            for column, cell in enumerate(cells)
            for tag in [rest if column else first]
        ]
        return f"<tr>{''.join(written)}</tr>"

    caption = escape(content.caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">'
        f'<table class="{css_class}"><caption>{caption}</caption>'
        f"<thead>{row(content.header, 'th', 'th')}</thead>"
        f"<tbody>{''.join(row(cells, 'th', 'td') for cells in content.rows)}</tbody></table></div>"
    )


def prose(text: str) -> str:
    """Returns text as HTML, what is in backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def describe(sources: Sequence[Source]) -> Table:
    """Returns where the numbers are from."""
    header = ("file", "kind", "results", "dates", "versions, model, machine", "commands or flags")
    rows = []
    for source in sources:
        told = ("; ".join(t) or "-" for t in (source.dates, source.versions, source.commands))
        rows.append((source.path, source.kind, str(source.entries), *told))
    return Table("Files that this page was made from", header, rows, len(header))
