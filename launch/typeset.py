"""Tables in text: columns as wide as what stands in them, so that they never collide."""

from collections.abc import Sequence

GAP = "  "


def typeset(
    head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)
) -> list[str]:
    """Return aligned lines, the head first.

    Args:
        head: Titles of the columns.
        rows: Cells; a row with fewer than there are columns ends in a text that spans the rest.
        left: Numbers of the columns that are set flush left; all others are flush right.
    """
    whole = [row for row in rows if len(row) == len(head)]
    # A spanning text takes part in no column's width; the cells before it do.
    parts = [row[:-1] for row in rows if len(row) < len(head)]
    widths = [
        max(len(row[n]) for row in [head, *whole, *parts] if n < len(row)) for n in range(len(head))
    ]

    def line(cells: Sequence[str]) -> str:
        spans = len(cells) < len(head)
        set_cells = [
            cell
            if spans and n == len(cells) - 1
            else (cell.ljust(widths[n]) if n in left else cell.rjust(widths[n]))
            for n, cell in enumerate(cells)
        ]
        return GAP.join(set_cells).rstrip()

    return [line(cells) for cells in (head, *rows)]
