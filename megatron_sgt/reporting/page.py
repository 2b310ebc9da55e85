"""One self-contained HTML file of pictures, tables and texts, without external resources."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 1180px; margin: 2em auto;
       padding: 0 1.5em; }
h1 { font-size: 1.6em; margin: 0; } h2 { font-size: 1.15em; margin: 2em 0 .3em; }
p.lead, figcaption { color: #555; margin: .2em 0 .8em; } figure { margin: 0 0 1em; }
img { max-width: 100%; height: auto; } code { font-family: ui-monospace, monospace; }
.cards { display: flex; flex-wrap: wrap; gap: .6em; margin: 1.2em 0; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .45em .9em; min-width: 6.5em; }
.card b { display: block; font-size: 1.15em; } .card span { color: #666; font-size: .85em; }
.note { border-left: 4px solid #d55e00; background: #fdf3ec; padding: .4em .9em; margin: .4em 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } th { text-align: left; color: #555; }
th, td { padding: .25em 1.1em .25em 0; border-bottom: 1px solid #e5e5e5; vertical-align: top; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 13px; line-height: 1.35; }
"""


class Page:
    """Collects sections, then writes one HTML file and, beside it, every picture as a PNG."""

    def __init__(self, title: str, lead: str) -> None:
        self.title = title
        self._body = [f"<h1>{html.escape(title)}</h1>", f'<p class="lead">{html.escape(lead)}</p>']
        self._pictures: list[tuple[str, bytes]] = []

    def notes(self, texts: Iterable[str]) -> None:
        self._body += [f'<p class="note">{html.escape(text)}</p>' for text in texts]

    def cards(self, pairs: Iterable[tuple[str, str]]) -> None:
        inside = "".join(
            f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
            for name, value in pairs
        )
        self._body.append(f'<div class="cards">{inside}</div>')

    def picture(self, name: str, heading: str, caption: str, figure: Figure | None) -> None:
        """A section with the picture ``name``.png; without a figure it says that there is nothing to show."""
        self._body.append(f"<h2>{html.escape(heading)}</h2>")
        if figure is None:
            self._body.append('<p class="lead">Nothing was recorded for this picture.</p>')
            return
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
        data = stream.getvalue()
        self._pictures.append((name, data))
        encoded = base64.b64encode(data).decode("ascii")
        self._body.append(
            f'<figure><img alt="{html.escape(heading)}" src="data:image/png;base64,{encoded}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def table(self, heading: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        if lines:
            head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
            body = "".join(f"<tr>{line}</tr>" for line in lines)
            self._body.append(f"<h2>{html.escape(heading)}</h2><table><tr>{head}</tr>{body}</table>")

    def text(self, heading: str, text: str) -> None:
        self._body.append(
            f"<h2>{html.escape(heading)}</h2><details><summary>show</summary><pre>{html.escape(text)}</pre></details>"
        )

    def write(self, path: Path) -> list[Path]:
        """Write ``path`` and the PNGs into its folder; returns all files.

        Raises:
            OSError: a file cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f"<style>{_STYLE}</style></head><body>{''.join(self._body)}</body></html>\n",
            encoding="utf-8",
            errors="backslashreplace",  # the name of a folder may be no UTF-8
        )
        files = [path]
        for name, data in self._pictures:
            file = path.parent / f"{name}.png"
            file.write_bytes(data)
            files.append(file)
        return files
