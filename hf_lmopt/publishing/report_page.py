"""
The report as one HTML file: nothing is fetched, nothing is run, and it reads in the dark, in print and read aloud.

Whatever comes from the run is escaped. Pictures are embedded twice, for a light and for a dark screen.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .finding import Finding


GENERATOR = "hf-lmopt report"

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #24292f; --pale: #5d6570; --line: #d8dde3;
  --problem: #b3261e; --warning: #8a5a00; --note: #1f5fa8; --fine: #1a7f43; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #1b1e23; --ink: #dfe3e8; --pale: #a2abb6;
  --line: #3a4048; --problem: #ff8a80; --warning: #f2b84b; --note: #8ec1ff; --fine: #6fd39a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 0.75rem; font-size: 1.25rem; }
h3 { margin: 0 0 0.15rem; font-size: 1rem; }
p { margin: 0.35rem 0; max-width: 44rem; }
.pale, figcaption, footer { color: var(--pale); }
.advice { margin: 0.75rem 0; padding: 0.6rem 1rem 0.7rem; border-left: 4px solid var(--tone);
  border-radius: 2px; background: color-mix(in srgb, var(--tone) 8%, transparent); }
.advice strong { color: var(--tone); }
.problem { --tone: var(--problem); } .warning { --tone: var(--warning); }
.note { --tone: var(--note); } .fine { --tone: var(--fine); }
figure { margin: 1.75rem 0 2.25rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-top: 0.35rem; font-size: 0.9rem; max-width: 44rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 1rem 0.35rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 500; width: 42%; }
ul { padding-left: 1.2rem; }
footer { margin-top: 3rem; padding-top: 0.75rem; border-top: 1px solid var(--line); font-size: 0.85rem; }
@media print { body { padding: 0; max-width: none; font-size: 10.5pt; } h2 { break-after: avoid; }
  figure, .advice, tr { break-inside: avoid; } .advice { background: none; } }
"""


@dataclass(frozen=True)
class Picture:
    """One panel, drawn: its words and its PNG for light and for dark screens."""

    name: str
    title: str
    caption: str
    light: bytes
    dark: bytes


def report_page(
    title: str,
    summary: str,
    findings: Sequence[Finding],
    pictures: Sequence[Picture],
    left_out: Mapping[str, str],
    facts: Mapping[str, str],
    source: str,
) -> str:
    """
    Puts a report together.

    Args:
        title (`str`):
            Name of the run.
        summary (`str`):
            The run in a sentence.
        findings (`Sequence[Finding]`):
            The advice, the gravest first.
        pictures (`Sequence[Picture]`):
            The panels that have figures.
        left_out (`Mapping[str, str]`):
            Titles of the others, with what would fill them.
        facts (`Mapping[str, str]`):
            Rows of the table.
        source (`str`):
            The file that all of it was read from.

    Returns:
        `str`: the HTML.
    """
    sections = [
        f"<header>\n<h1>{escape(title)}</h1>\n<p class='pale'>{escape(summary)}</p>\n</header>",
        f"<section>\n<h2>What stands out</h2>\n{_advice(findings)}\n</section>",
        f"<section>\n<h2>Figures</h2>\n{_pictures(pictures)}{_left_out(left_out)}\n</section>",
        f"<section>\n<h2>Facts</h2>\n{_facts(facts)}\n</section>",
        f"<footer>Written by <code>hf-lmopt report</code> from {escape(source)} alone.</footer>",
    ]
    body = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{GENERATOR}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} - training report</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _advice(findings: Sequence[Finding]) -> str:
    if not findings:
        return "<div class='advice fine'><p>Nothing stands out in the figures that are there.</p></div>"
    return "\n".join(
        f"<div class='advice {finding.severity}'>\n<p><strong>{finding.severity.capitalize()}.</strong> "
        f"{escape(finding.evidence)}</p>\n<p>{escape(finding.action)}</p>\n</div>"
        for finding in findings
    )


def _pictures(pictures: Sequence[Picture]) -> str:
    return "".join(
        f"<figure id='{escape(picture.name)}'>\n<picture>\n"
        f"<source media='screen and (prefers-color-scheme: dark)' srcset='{_embedded(picture.dark)}'>\n"
        f"<img src='{_embedded(picture.light)}' alt='{escape(f'{picture.title}. {picture.caption}')}'>\n</picture>\n"
        f"<figcaption>{escape(picture.caption)}</figcaption>\n</figure>\n"
        for picture in pictures
    )


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _left_out(left_out: Mapping[str, str]) -> str:
    if not left_out:
        return ""
    titles_by_source: dict[str, list[str]] = {}
    for title, filled_by in left_out.items():
        titles_by_source.setdefault(filled_by, []).append(title)
    items = "".join(
        f"<li>{escape('; '.join(titles))}: from {escape(filled_by)}.</li>\n"
        for filled_by, titles in titles_by_source.items()
    )
    return f"<h3>Not logged by this run</h3>\n<ul class='pale'>\n{items}</ul>"


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(value)}</td></tr>\n" for name, value in facts.items()
    )
    return f"<table>\n<tbody>\n{rows}</tbody>\n</table>"
