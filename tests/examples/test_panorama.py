"""The example of windows: its panorama closes."""

import re


def test_the_ends_meet(run):
    printed = run("panorama")
    steps = re.findall(r": ([\d.]+) from column to column, ([\d.]+) where the ends meet", printed)
    assert len(steps) == 2 and all(float(ends) < 3 * float(inside) for inside, ends in steps)
    hills = printed.splitlines()[2:]
    assert len(hills) == 8 and all(row[:8] == row[96:] for row in hills)
