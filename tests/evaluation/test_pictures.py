"""Tables in terminals of any width."""

import re

import pytest
from rich.console import Console
from rich.table import Table

from lit_mm.evaluation import pictures

NUMBERS = [[f"{10**power + row:,}.{row} ({row}.25) GiB" for row in range(3)] for power in range(9)]


def made() -> Table:
    table = Table(title="of several words", title_justify="left")
    table.add_column("experiment")
    for power in range(9):
        table.add_column(f"ten to the power of {power}", justify="right")
    for row in range(3):
        table.add_row(f"base + [bold]an[/bold] overlay + m3/convllava_{row}", *(column[row] for column in NUMBERS))
    return table


@pytest.mark.parametrize("width", [60, 80, 100, 160, 400])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_leaves_out_columns_and_shortens_no_number(monkeypatch, capsys, width, terminal):
    def console(**given):
        return Console(**{"width": width, "force_terminal": terminal, "no_color": True, **given})

    monkeypatch.setattr(pictures, "Console", console)
    table = made()
    for _ in range(2):  # the table itself stays whole
        pictures.print_whole(table)
        printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        lines = printed.splitlines()
        note = lines.pop() if "no room in" in lines[-1] else ""
        assert "…" not in printed
        assert not terminal or max(map(len, lines)) <= width
        for power, column in enumerate(NUMBERS):
            left_out = re.search(rf"power of {power}(,|$)", note) is not None
            assert all(cell in printed for cell in column) != left_out
        assert all(f"m3/convllava_{row}" in printed for row in range(3))
        assert bool(note) == (terminal and width < 200)
