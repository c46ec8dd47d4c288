# SPDX-License-Identifier: Apache-2.0
"""Print the result of a tool, write it to files, and report errors.

A command calls `check_paths` before any work. It describes its result as parts, which are lines of
text and `Table`s, and as a JSON document. `write` sends them to the places that the user chose.

For an error that the user can correct, a tool raises a `ToolError`, or another `HybridKVError`.
`main` prints it as one line and exits with status 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ByteSize
from rich import box
from rich import table as rich_table
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.text import Text

from vllm_hybrid_kv.errors import HybridKVError

LEAST_WIDTH = 80
"""A table may be this many characters wide, even if the terminal is narrower or there is none."""

LEAST_TEXT = 16
"""If a table is too wide, words of more characters than this may be broken."""

JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the result as JSON to this file; - prints it.")
]
PlotOption = Annotated[
    Path | None, typer.Option(help="Draw the result into this file. Needs matplotlib.")
]
MarkdownOption = Annotated[bool, typer.Option("--markdown", help="Print tables as Markdown.")]


class ToolError(HybridKVError):
    """A tool cannot do what the user wants; the message is printed as one line."""


Cell = str | Text


@dataclass(frozen=True)
class Table:
    """A table for the screen and for Markdown.

    Attributes:
        title: The line above the table.
        columns: The headers. A leading `>` aligns a column right and keeps its cells unbroken.
        rows: The cells. Markdown drops their styles.
        note: The line below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def markdown(self) -> str:
        """Return the table as GitHub's Markdown."""
        names = [name.removeprefix(">") for name in self.columns]
        rules = ["---:" if name.startswith(">") else "---" for name in self.columns]
        lines = [
            " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row)
            for row in (names, rules, *self.rows)
        ]
        title = f"**{self.title}**" if self.title else ""
        return "\n\n".join(
            filter(None, (title, "\n".join(f"| {line} |" for line in lines), self.note))
        )

    def fitted(self, width: int) -> Iterator[rich_table.Table]:
        """Split the table by columns into tables of at most `width` characters.

        Each of these tables starts with the first column.
        """
        shown = [0]
        for i in range(1, len(self.columns)):
            if len(shown) > 1 and sum(map(self._least_width, (*shown, i))) > width:
                yield self._part(shown)
                shown = [0]
            shown.append(i)
        yield self._part(shown)

    def _least_width(self, i: int) -> int:
        """Return how many characters a column needs at least, including the space after it."""
        name, cells = self.columns[i], [str(row[i]) for row in self.rows]
        if name.startswith(">"):
            return 2 + max(map(len, (*name[1:].split(), *cells)))
        words = " ".join((name, *cells)).split()
        return 2 + min(max(map(len, words), default=0), LEAST_TEXT)

    def _part(self, shown: Sequence[int]) -> rich_table.Table:
        part = rich_table.Table(
            box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False
        )
        for name in (self.columns[i] for i in shown):
            if name.startswith(">"):
                part.add_column(name[1:].replace(" ", "\n"), justify="right", no_wrap=True)
            else:
                part.add_column(name, overflow="fold")
        for row in self.rows:
            cells = (row[i] for i in shown)
            part.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
        return part


def show(parts: Iterable[Cell | Table], markdown: bool = False) -> None:
    """Print lines and tables on standard output, with tables for a terminal or as Markdown."""
    console = Console()
    console.width = max(console.width, LEAST_WIDTH)
    # Programs that read a pipe need whole lines, and viewers of Markdown wrap lines themselves.
    whole = markdown or not console.is_terminal
    for part in parts:
        if not isinstance(part, Table):
            console.print(part, markup=False, highlight=False, soft_wrap=whole)
        elif markdown:
            print(f"\n{part.markdown()}\n")
        else:
            with console.capture() as capture:
                for piece in part.fitted(console.width):
                    console.print()
                    console.print(piece)
            title = f"\n{part.title}" if part.title else ""
            lines = (title + capture.get() + part.note).splitlines()
            print("\n".join(map(str.rstrip, lines)))


def write(
    document: Any,
    parts: Callable[[], Iterable[Cell | Table]],
    *,
    schema: int,
    json_: Path | None = None,
    markdown: bool = False,
    plot: Path | None = None,
    draw: Callable[[Path], None] | None = None,
) -> None:
    """Write a result to every place that the user chose.

    Args:
        document: The result as JSON: an object, or a list of objects.
        parts: Returns the lines and tables to print, unless JSON is printed.
        schema: The document's version, written as the key `schema`. It grows when a key is removed
            or changes its meaning.
        json_: The file for the document; `-` prints it instead of the parts.
        markdown: Whether tables are printed as Markdown.
        plot: The file for the picture, which `draw` draws.

    Raises:
        ToolError: A file cannot be written.
    """
    if json_ is not None:
        rows = document if isinstance(document, list) else [document]
        rows = [{"schema": schema, **row} for row in rows]
        text = json.dumps(rows if isinstance(document, list) else rows[0], indent=1) + "\n"
        if str(json_) == "-":
            sys.stdout.write(text)
        else:
            try:
                json_.write_text(text)
            except OSError as error:
                raise ToolError(f"--json: {json_}: {error.strerror}") from None
    if str(json_) != "-":
        show(parts(), markdown)
    if plot is not None and draw is not None:
        try:
            draw(plot)
        except (OSError, ValueError) as error:
            raise ToolError(f"--plot: {plot}: {error}") from None


def check_paths(json_: Path | None, plot: Path | None) -> None:
    """Check that output files can be written, before a command does any work.

    Raises:
        ToolError: A file's folder does not exist, the file is a folder, or matplotlib is not
            installed or does not know the file's format.
    """
    for option, path in (("--json", json_), ("--plot", plot)):
        if path is None or str(path) == "-":
            continue
        reason = "Is a directory" if path.is_dir() else "No such file or directory"
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ToolError(f"{option}: {path}: {reason}")
    if plot is None:
        return
    try:
        import matplotlib  # noqa: F401
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError:
        raise ToolError("--plot needs matplotlib: pip install 'vllm-hybrid-kv[plot]'") from None
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if (ending := plot.suffix[1:].lower()) and ending not in formats:
        raise ToolError(f"--plot: {plot}: {ending!r} is none of {', '.join(formats)}")


@contextmanager
def figure(
    path: Path, *shape: int, figsize: tuple[float, float], **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Yield a matplotlib figure and its axes to draw on, then save it.

    `shape` and `options` are those of matplotlib's `subplots`; `figsize` is in inches.
    """
    from matplotlib.figure import Figure

    drawn = Figure(figsize=figsize, layout="constrained")
    yield drawn, drawn.subplots(*shape, **options)
    drawn.savefig(path, dpi=150)


def progress_bar(*texts: str) -> Progress:
    """Return a progress bar on standard error with further columns, in rich's formats."""
    return Progress(
        *Progress.get_default_columns(), *map(TextColumn, texts), console=Console(stderr=True)
    )


def counted(number: int, noun: str) -> str:
    """Return a number with a noun: `1 request`, `1,024 requests`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_size(size: int) -> str:
    """Return bytes in the largest binary unit that they fill, like `1.5 GiB`."""
    units = ("TiB", "GiB", "MiB", "KiB")
    unit = next((unit for unit in units if ByteSize(size).to(unit) >= 1), "B")
    return f"{ByteSize(size).to(unit):.5g} {unit}"
