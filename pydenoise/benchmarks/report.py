"""What a run leaves behind: a table on the terminal, a JSON file and a plot."""

import json
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

VERDICT_STYLE = {"met": "green", "missed": "red", "undecided": "yellow"}


def seconds_text(seconds: float) -> str:
    """A duration in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:.0f} {unit}"
    raise AssertionError("unreachable")


def print_tables(result: dict, console: Console | None = None) -> None:
    """One table per group: a row for each case and provider of ours, a column for each provider it is compared with."""
    console = console or Console()
    _print_machine(result, console)
    groups: dict[str, list[dict]] = {}
    for record in result["cases"]:
        groups.setdefault(record["group"], []).append(record)
    for group, records in groups.items():
        console.print(_group_table(result, group, records))
    _print_troubles(result, console)


def _print_machine(result: dict, console: Console) -> None:
    machine, peaks = result["machine"], result["peaks"]
    console.print(f"[bold]{result['suite']}[/bold]  {machine['gpu'] or machine['cpu']}, {machine['threads']} threads, "
                  f"torch {machine['versions']['torch']}", highlight=False)  # fmt: skip
    copies = ", ".join(f"{rate / 1e9:.0f} GB/s at {int(size) >> 20} MiB" for size, rate in peaks["copy"].items())
    text = f"peaks: fp32 {peaks['fma_f32'] / 1e9:.0f} GFLOP/s, bf16 {peaks['bf16_dot'] / 1e9:.0f} GFLOP/s, copy {copies}"
    console.print(text, highlight=False)
    for kind in ("fma_f32", "bf16_dot"):
        console.print(f"  {kind}: {peaks['source'][kind]}", style="dim", highlight=False)


def _group_table(result: dict, group: str, records: list[dict]) -> Table:
    providers = result["providers"]
    timed = {name for record in records for name, state in record["providers"].items() if "timing" in state}
    ours = [name for name in providers if name in timed and providers[name]["ours"]]
    others = [name for name in providers if name in timed and not providers[name]["ours"]]
    shared = others if ours else others[1:]
    caption = "median; in the provider columns: how many times faster ours is (range of the median); A/A: ours over itself"
    table = Table(title=group, caption=caption, title_justify="left", caption_justify="left")
    for heading in ("case", "provider", "time", "best", "of floor", "error"):
        table.add_column(heading, justify="left" if heading in ("case", "provider") else "right")
    for name in shared:
        table.add_column("vs " + providers[name]["label"], justify="right")
    for heading in ("A/A", "bars"):
        table.add_column(heading)
    for record in records:
        subjects = [name for name in ours if "timing" in record["providers"][name]]
        subjects = subjects or [name for name in others if "timing" in record["providers"][name]]
        for number, name in enumerate(subjects):
            label = record["name"] if number == 0 else ""
            control = _control_text(record) if number == 0 else ""
            ratios = [_ratio_text(record, name, other) for other in shared]
            state = record["providers"][name]
            table.add_row(label, providers[name]["label"], *_state_texts(state), *ratios, control, _bars_text(record, name))
        table.add_section()
    return table


def _state_texts(state: dict) -> tuple[str, str, str, str]:
    timing, fraction, error = state["timing"], state["floor_fraction"], state.get("error")
    return (
        seconds_text(timing["median_s"]),
        seconds_text(timing["min_s"]),
        "" if fraction is None else f"{fraction:.0%}",
        "" if error is None else f"{error:.0e}",
    )


def _ratio_text(record: dict, name: str, other: str) -> Text:
    comparison = record["comparisons"].get(name, {}).get(other)
    if comparison is None:
        return Text("")
    if record["group"] == "overhead":
        extra = comparison["extra_s"]
        return Text(f"{extra['median'] * 1e6:+.1f} µs ({extra['low'] * 1e6:+.1f} to {extra['high'] * 1e6:+.1f})")
    ratio = comparison["speedup"]
    style = "green" if ratio["low"] > 1 else "red" if ratio["high"] < 1 else ""
    return Text(f"{ratio['median']:.2f}× ({ratio['low']:.2f}–{ratio['high']:.2f})", style=style)


def _control_text(record: dict) -> str:
    if record["control"] is None:
        return ""
    ratio = record["control"]["speedup"]
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _bars_text(record: dict, name: str) -> Text:
    text = Text()
    for bar in record["bars"]:
        if bar["subject"] != name:
            continue
        target = f"≥{bar['target']:.2f}×" if bar["kind"] == "speedup" else f"≤{seconds_text(bar['target'])}"
        text.append(f"{target} {bar['against'] or ''} {bar['verdict']}\n", style=VERDICT_STYLE[bar["verdict"]])
    text.rstrip()
    return text


def _print_troubles(result: dict, console: Console) -> None:
    """Who was left out, and why; wrong and failed providers first. A reason shared by many cases is said once."""
    seen: dict[tuple[str, str, str], list[str]] = {}
    for record in result["cases"]:
        for name, state in record["providers"].items():
            if state["status"] != "ok":
                seen.setdefault((state["status"], name, state["reason"]), []).append(record["key"])
    for status, style in (("wrong", "bold red"), ("failed", "red"), ("skipped", "dim")):
        for (kind, name, reason), keys in seen.items():
            if kind != status or reason == "no part of this case":
                continue
            where = keys[0] if len(keys) == 1 else f"{len(keys)} cases"
            console.print(Text(f"{status}: {name} ({where}): {reason}", style=style))


def write_json(result: dict, folder: Path) -> Path:
    """Write ``result`` to ``folder`` under the suite's name and the date; returns the path."""
    path = folder / f"{_stem(result)}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n")
    return path


def _stem(result: dict) -> str:
    return f"{result['suite']}-{re.sub('[^0-9T]', '', result['machine']['date'][:19])}"


def write_plot(result: dict, folder: Path) -> Path:
    """Write a PNG: for every case, how many times faster ours is than each other provider, with its range.

    Raises ``ImportError`` where matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        (f"{record['key']}  [{result['providers'][name]['label']}]", comparisons)
        for record in result["cases"]
        for name, comparisons in record["comparisons"].items()
        if record["group"] not in ("overhead", "import")
    ]
    others = [n for n, p in result["providers"].items() if not p["ours"] and any(n in row[1] for row in rows)]
    figure, axes = pyplot.subplots(figsize=(10, 1.8 + 0.28 * max(len(rows), 1)), layout="constrained")
    for number, name in enumerate(others):
        points = [(y, row[1][name]["speedup"]) for y, row in enumerate(rows) if name in row[1]]
        x = [ratio["median"] for _, ratio in points]
        below = [max(0.0, ratio["median"] - ratio["low"]) for _, ratio in points]
        above = [max(0.0, ratio["high"] - ratio["median"]) for _, ratio in points]
        heights = [y + 0.5 * ((number + 0.5) / len(others) - 0.5) for y, _ in points]
        axes.errorbar(x, heights, xerr=[below, above], fmt="o", markersize=4, label=result["providers"][name]["label"])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("how many times faster ours is (right of the line: ours is faster)")
    machine = result["machine"]
    axes.set_title(f"{result['suite']}: {machine['gpu'] or machine['cpu']}, {machine['threads']} threads", fontsize=9)
    if others:
        axes.legend(fontsize=7, ncols=min(len(others), 6), loc="upper center", bbox_to_anchor=(0.5, -0.09))
    path = folder / f"{_stem(result)}.png"
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
