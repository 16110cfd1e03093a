"""What a run leaves behind: a table on the terminal, a JSON file and a plot."""

import json
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pydenoise.benchmarks.providers import NO_PART

CAPTION = (
    "time: median; vs: how many times faster ours is: median over the rounds (and its range, on wide terminals), then "
    "the ratio of the best samples, which is the one to trust on a busy machine; "
    "A/A: a contender over itself, the noise of this run; error: against float64, relative to the largest value"
)
RANGES_FROM_WIDTH = 170
PIPED_WIDTH = 240
NOISY_ABOVE = 1.15  # of the A/A ratio's range
VERDICT_MARK = {"met": "✓", "missed": "✗", "undecided": "?"}
VERDICT_STYLE = {"met": "green", "missed": "red", "undecided": "yellow"}


def seconds_text(seconds: float) -> str:
    """A duration in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:.0f} {unit}"
    raise AssertionError("unreachable")


def bytes_text(count: float) -> str:
    """A number of bytes in MiB."""
    return f"{count / 2**20:.0f} MiB"


def print_tables(result: dict, console: Console | None = None) -> None:
    """One table per group: a row for each case and provider of ours, a column for each provider it is compared with."""
    console = console or Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    _print_machine(result, console)
    groups: dict[str, list[dict]] = {}
    for record in result["cases"]:
        groups.setdefault(record["group"], []).append(record)
    ranges = console.width >= RANGES_FROM_WIDTH
    for group, records in groups.items():
        if any("memory" in state for record in records for state in record["providers"].values()):
            console.print(_memory_table(result, group, records))
        else:
            console.print(_group_table(result, group, records, ranges))
    if "int8" in {provider["precision"] for provider in result["providers"].values()}:
        for groups in _groups_with_the_same_providers(result):
            console.print(_peers_table(result, groups))
    console.print(CAPTION, style="dim", highlight=False)
    _print_noise(result, console)
    _print_troubles(result, console)


def _print_machine(result: dict, console: Console) -> None:
    machine, peaks = result["machine"], result["peaks"]
    load = f", load average {machine['load_average'][0]:.1f} at the start" if machine["load_average"] else ""
    where = f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}"
    console.print(f"[bold]{result['suite']}[/bold]  {where}{load}", highlight=False)
    copies = ", ".join(f"{rate / 1e9:.0f} GB/s at {int(size) >> 20} MiB" for size, rate in peaks["copy"].items())
    arithmetic = f"fp32 {peaks['fma_f32'] / 1e9:.0f} GFLOP/s, bf16 {peaks['bf16_dot'] / 1e9:.0f} GFLOP/s"
    int8 = f"int8 {peaks['vnni_dot'] / 1e9:.0f} GOP/s"
    console.print(f"peaks: {arithmetic}, {int8}, copy {copies}", highlight=False)
    for kind in ("fma_f32", "bf16_dot", "vnni_dot"):
        console.print(f"  {kind}: {peaks['source'][kind]}", style="dim", highlight=False)


def _group_table(result: dict, group: str, records: list[dict], ranges: bool) -> Table:
    providers = result["providers"]
    timed = {name for record in records for name, state in record["providers"].items() if "timing" in state}
    ours = [name for name in providers if name in timed and providers[name]["ours"]]
    others = [name for name in providers if name in timed and not providers[name]["ours"]]
    shared = others if ours else []
    table = Table(title=group, title_justify="left")
    for heading in ("case", "provider", "time", "best", "of floor", "error"):
        table.add_column(heading, justify="left" if heading in ("case", "provider") else "right", no_wrap=True)
    for name in shared:
        table.add_column("vs " + providers[name]["label"], justify="right")
    table.add_column("A/A")
    table.add_column("bars", no_wrap=True)
    for record in records:
        subjects = [name for name in ours if "timing" in record["providers"][name]]
        subjects = subjects or [name for name in others if "timing" in record["providers"][name]]
        for number, name in enumerate(subjects):
            label = record["name"] if number == 0 else ""
            control = _control_text(record, ranges) if number == 0 else ""
            ratios = [_ratio_text(record, name, other, ranges) for other in shared]
            state = record["providers"][name]
            bars = _bars_text(result, record, name)
            table.add_row(label, providers[name]["label"], *_state_texts(state), *ratios, control, bars)
        table.add_section()
    return table


def _memory_table(result: dict, group: str, records: list[dict]) -> Table:
    table = Table(title=group, title_justify="left")
    for heading in ("case", "provider", "peak", "time", "bars"):
        table.add_column(heading, justify="right" if heading in ("peak", "time") else "left", no_wrap=True)
    for record in records:
        for name, state in record["providers"].items():
            if "memory" in state:
                peak, seconds = (state["memory"][key] for key in ("peak_bytes", "seconds"))
                texts = (result["providers"][name]["label"], bytes_text(peak), seconds_text(seconds))
                table.add_row(record["name"], *texts, _bars_text(result, record, name))
    return table


def _groups_with_the_same_providers(result: dict) -> list[list[str]]:
    """Groups whose records name the same timed providers, so that a table of all of them has no empty columns."""
    timed: dict[str, set[str]] = {}
    for record in result["cases"]:
        names = {name for name, state in record["providers"].items() if "timing" in state}
        timed.setdefault(record["group"], set()).update(names)
    shared: dict[frozenset[str], list[str]] = {}
    for group, names in timed.items():
        if names:
            shared.setdefault(frozenset(names), []).append(group)
    return list(shared.values())


def _peers_table(result: dict, groups: list[str]) -> Table:
    """Every provider's own time and accuracy: coarser numbers are no fair price for speed.

    With one thread the time is the processor's, where it was taken: it stays meaningful on a machine that others use.
    """
    providers = result["providers"]
    records = [record for record in result["cases"] if record["group"] in groups]
    timings = [state["timing"] for record in records for state in record["providers"].values() if "timing" in state]
    alone = result["machine"]["threads"] == 1 and all(timing["cpu_min_s"] is not None for timing in timings)
    kind = "cpu_min_s" if alone else "min_s"
    names = [n for n in providers if any("timing" in record["providers"].get(n, {}) for record in records)]
    time = "processor time" if kind == "cpu_min_s" else "time"
    table = Table(
        title=f"{', '.join(groups)}: best {time}, signal-to-noise ratio of the result in dB", title_justify="left"
    )
    table.add_column("case", no_wrap=True)
    for name in names:
        table.add_column(providers[name]["label"], justify="right")
    for record in records:
        table.add_row(record["key"], *(_peer_text(record["providers"].get(name, {}), kind) for name in names))
    return table


def _peer_text(state: dict, kind: str) -> str:
    if "timing" not in state:
        return "–"
    ratio = state.get("snr_db")
    return seconds_text(state["timing"][kind]) + ("" if ratio is None else f"\n{ratio:.0f} dB")


def _state_texts(state: dict) -> tuple[str, str, str, str]:
    timing, fraction, error = state["timing"], state["floor_fraction"], state.get("error")
    return (
        seconds_text(timing["median_s"]),
        seconds_text(timing["min_s"]),
        "" if fraction is None else f"{fraction:.0%}",
        "" if error is None else f"{error:.0e}",
    )


def _ratio_text(record: dict, name: str, other: str, ranges: bool) -> Text:
    comparison = record["comparisons"].get(name, {}).get(other)
    if comparison is None:
        return Text("")
    if record["group"] == "overhead":
        extra = comparison["extra_s"]
        text = f" ({extra['low'] * 1e6:+.1f} to {extra['high'] * 1e6:+.1f})" if ranges else ""
        return Text(f"{extra['median'] * 1e6:+.1f} µs{text}")
    ratio = comparison["speedup"]
    style = "green" if ratio["low"] > 1 else "red" if ratio["high"] < 1 else ""
    text = Text(f"{ratio['median']:.2f}×{_range_text(ratio) if ranges else ''}", style=style)
    return text.append(f"\nbest {ratio['of_minima']:.2f}×", style="dim")


def _range_text(ratio: dict) -> str:
    return f" ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _control_text(record: dict, ranges: bool) -> str:
    if record["control"] is None:
        return ""
    ratio = record["control"]["speedup"]
    return f"{ratio['median']:.2f}{_range_text(ratio) if ranges else ''}"


def _bars_text(result: dict, record: dict, name: str) -> Text:
    text = Text()
    for bar in record["bars"]:
        if bar["subject"] != name:
            continue
        target = _target_text(bar["kind"], bar["target"])
        against = result["providers"][bar["against"]]["label"] if bar["against"] else ""
        line = f"{VERDICT_MARK[bar['verdict']]} {target} {against}".rstrip()
        text.append(("\n" if text else "") + line, style=VERDICT_STYLE[bar["verdict"]])
    return text


def _target_text(kind: str, target: float) -> str:
    if kind == "of floor":
        return f"≥{target:.0%} of floor"
    if kind == "peak bytes":
        return f"≤{bytes_text(target)}"
    return f"≥{target:.2f}×" if kind == "speedup" else f"≤{seconds_text(target)}"


def _print_noise(result: dict, console: Console) -> None:
    """Say so where contenders did not even agree with themselves."""
    controls = [record["control"]["speedup"] for record in result["cases"] if record["control"]]
    noisy = [ratio for ratio in controls if ratio["low"] < 1 / NOISY_ABOVE or ratio["high"] > NOISY_ABOVE]
    if noisy:
        text = f"noise: in {len(noisy)} of {len(controls)} cases the range of A/A reaches beyond "
        console.print(f"{text}{NOISY_ABOVE - 1:.0%}: the machine is busy, trust only the best samples", style="yellow")


def _print_troubles(result: dict, console: Console) -> None:
    """Who was left out, and why; wrong and failed providers first. A reason shared by many cases is said once."""
    seen: dict[tuple[str, str, str], list[str]] = {}
    for record in result["cases"]:
        for name, state in record["providers"].items():
            if state["status"] != "ok":
                seen.setdefault((state["status"], name, state["reason"]), []).append(record["key"])
    for status, style in (("wrong", "bold red"), ("failed", "red"), ("skipped", "dim")):
        for (kind, name, reason), keys in seen.items():
            if kind != status or reason == NO_PART:
                continue
            where = keys[0] if len(keys) == 1 else f"{len(keys)} cases"
            console.print(Text(f"{status}: {name} ({where}): {reason}", style=style))


def write_json(result: dict, folder: Path) -> Path:
    """Write ``result`` to ``folder`` under the suite's name and the date; returns the path.

    Providers that have no part in a case are left out of it.
    """
    path = folder / f"{_stem(result)}.json"
    cases = [record | {"providers": _with_part(record["providers"])} for record in result["cases"]]
    path.write_text(_json_text(result | {"cases": cases}) + "\n")
    return path


def _json_text(value: object, indent: int = 0) -> str:
    """JSON, one value a line: what fits into a line of 160 characters, and a list of numbers of any length."""
    flat = json.dumps(value, ensure_ascii=False, default=str)
    plain = isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value)
    if plain or not isinstance(value, (dict, list, tuple)) or len(flat) + indent <= 160:
        return flat
    inside = "\n" + " " * (indent + 1)
    if isinstance(value, dict):
        parts = [f"{json.dumps(str(key), ensure_ascii=False)}: {_json_text(v, indent + 1)}" for key, v in value.items()]
    else:
        parts = [_json_text(item, indent + 1) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return opening + inside + ("," + inside).join(parts) + "\n" + " " * indent + closing


def _with_part(providers: dict) -> dict:
    return {name: state for name, state in providers.items() if state.get("reason") != NO_PART}


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
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)  # the first case at the top
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("how many times faster ours is (right of the line: ours is faster)")
    machine = result["machine"]
    axes.set_title(f"{result['suite']}: {machine['gpu'] or machine['cpu']}, {machine['threads']} threads", fontsize=9)
    if others:
        figure.legend(fontsize=7, ncols=min(len(others), 6), loc="outside upper center")
    path = folder / f"{_stem(result)}.png"
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
