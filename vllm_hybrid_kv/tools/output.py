# SPDX-License-Identifier: Apache-2.0
"""How every tool prints its result, writes it to files and reports errors.

A command describes its result as parts, which are lines of text and `Table`s, and as a JSON
document. `write` sends them to the places that the user chose:

    def plan(json_: JsonOption = None, plot: PlotOption = None, markdown: MarkdownOption = False):
        check_paths(json_, plot)  # before any work
        ...
        table = Table("KV groups", ("kind", ">blocks"), [("full attention", "1,024")])
        write(document, lambda: ["A summary.", table], schema=1, json_=json_, markdown=markdown)

Any error that the user can correct is a `ToolError`, or another `HybridKVError`. `main` prints it
as one line and exits with its status. No tool prints an error or raises `typer.Exit` for one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ByteSize
from rich import box
from rich import table as rich_table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from vllm_hybrid_kv.errors import HybridKVError

LEAST_WIDTH = 80
"""Columns of the narrowest table, and of every table that does not go to a terminal."""

LEAST_TEXT = 16
"""Characters from which words in a column of text are broken if a table is too wide."""

JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the result as JSON to this file; - prints it.")
]
PlotOption = Annotated[
    Path | None, typer.Option(help="Draw the result into this file. Needs matplotlib.")
]
MarkdownOption = Annotated[bool, typer.Option("--markdown", help="Print tables as Markdown.")]


class ToolError(HybridKVError):
    """A tool cannot do what the user wants; the message is printed as one line.

    Attributes:
        status: The exit status; 2 means wrong usage.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


Cell = str | Text


@dataclass(frozen=True)
class Table:
    """A table for the screen and for Markdown.

    Attributes:
        title: The line above it.
        columns: The headers. A leading `>` aligns a column right and keeps its cells unbroken.
        rows: The cells. Markdown drops their styles.
        note: The line below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def markdown(self) -> str:
        """Return the table as GitHub's Markdown."""
        headers = [name.removeprefix(">") for name in self.columns]
        rules = ["---:" if name.startswith(">") else "---" for name in self.columns]
        lines = [_markdown_row(row) for row in (headers, rules, *self.rows)]
        above, below = ([f"**{self.title}**", ""] if self.title else []), ["", self.note]
        return "\n".join([*above, *lines, *(below if self.note else [])])

    def fitted(self, width: int) -> Iterator[Table]:
        """Split the table by columns into tables of at most `width` characters.

        The first column is in each of them.
        """
        least = [self._least_width(i) + 2 for i in range(len(self.columns))]
        kept, used = [0], least[0]
        for i in range(1, len(self.columns)):
            if used + least[i] > width and len(kept) > 1:
                yield self._of(kept)
                kept, used = [0], least[0]
            kept.append(i)
            used += least[i]
        yield self._of(kept)

    def _of(self, kept: Sequence[int]) -> Table:
        columns, rows = [self.columns[i] for i in kept], [[r[i] for i in kept] for r in self.rows]
        return replace(self, columns=columns, rows=rows)

    def _least_width(self, i: int) -> int:
        cells = [str(row[i]) for row in self.rows]
        if self.columns[i].startswith(">"):
            return max(map(len, (*self.columns[i][1:].split(), *cells)))
        words = " ".join((self.columns[i], *cells)).split()
        return min(max(map(len, words), default=0), LEAST_TEXT)

    def __rich__(self) -> rich_table.Table:
        table = rich_table.Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
            show_edge=False,
        )
        for name in self.columns:
            if name.startswith(">"):
                table.add_column(name[1:].replace(" ", "\n"), justify="right", no_wrap=True)
            else:
                table.add_column(name, overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
        return table


def _markdown_row(cells: Iterable[Cell]) -> str:
    plain = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(plain)} |"


def show(parts: Iterable[Cell | Table], markdown: bool = False) -> None:
    """Print parts on standard output.

    Args:
        parts: Lines and tables.
        markdown: Whether tables are printed as Markdown instead of for a terminal.
    """
    console = Console()
    console.width = max(console.width, LEAST_WIDTH)
    # A reader of a pipe needs lines whole, and Markdown wraps on its own.
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
            title, note = f"\n{part.title}" if part.title else "", f"{part.note}\n"
            lines = (title + capture.get() + (note if part.note else "")).splitlines()
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
        parts: Returns what is printed, unless JSON is.
        schema: The version of the document. It grows when a key is removed or changes its meaning,
            and is the key `schema` of each object.
        json_: The file for the document; `-` prints it instead of the parts.
        markdown: Whether tables are printed as Markdown.
        plot: The file for the picture.
        draw: Draws the picture into a file.

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
def figure(path: Path, *shape: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a matplotlib figure and its axes to draw on, then save it.

    Args:
        path: The file; its suffix is the format.
        shape: Rows and columns of axes.
        options: Of matplotlib's `subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(*shape, layout="constrained", **options)
    try:
        yield drawn, axes
        drawn.savefig(path, dpi=150)
    finally:
        pyplot.close(drawn)


def progress_bar(*texts: str) -> Progress:
    """Return a progress bar on standard error.

    Args:
        texts: rich's formats of further columns, such as `{task.fields[rate]}`.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        *map(TextColumn, texts),
        console=Console(stderr=True),
    )


def format_size(size: int) -> str:
    """Return bytes in the largest binary unit that they fill, like `1.5 GiB`."""
    units = ("TiB", "GiB", "MiB", "KiB")
    unit = next((unit for unit in units if ByteSize(size).to(unit) >= 1), "B")
    return f"{ByteSize(size).to(unit):.5g} {unit}"
