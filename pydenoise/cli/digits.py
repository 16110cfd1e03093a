"""Solvers side by side on the digits: what ``pydenoise sample`` and the demo compute, tabulate and draw."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MOST_CALLS_A_STEP = 4  # a Runge-Kutta step of PNDM
REFERENCE_CALLS = 200  # of DPM-Solver++ 3M: its samples are 0.004 from those of 1000 DDIM steps
STOCHASTIC = "random"  # such solvers have no distance: they go elsewhere from the same start
SCALE = 4  # screen pixels of a digit's pixel
GAP = 2
LABEL = 140
HEADING = 20


def solvers() -> dict:
    """Name -> solver: all of ``pydenoise.samplers`` that take a number of steps and no further network."""
    from pydenoise import samplers as s

    return {
        "ddpm": s.DDPM(),
        "ddim": s.DDIM(),
        "fast-ddpm": s.FastDDPM(),
        "time-shift": s.TimeShift(s.DDIM()),
        "euler": s.Euler(),
        "euler-ancestral": s.EulerAncestral(),
        "heun": s.Heun(spacing="karras"),  # with few steps of equal length in time it diverges
        "pndm-s": s.PNDM("s"),
        "pndm-f": s.PNDM("f"),
        "pndm-fon": s.PNDM("fon"),
        "plms": s.PNDM("plms"),
        "dpm++-2m": s.DPMSolverPP(2),
        "dpm++-3m": s.DPMSolverPP(3),
        "dpm++-2m-sde": s.DPMSolverPP(2, sde=True),
        "unipc": s.UniPC(),
        "evodiff": s.EVODiff(),
    }


@dataclass(frozen=True)
class Task:
    """What is sampled: ``labels`` and ``seeds`` [N], one of each for an image; ``guidance`` 1: the class alone."""

    labels: Sequence[int]
    seeds: Sequence[int]
    guidance: float = 1.0
    backend: str = "auto"
    device: str = "cpu"


@dataclass
class Row:
    """One solver with one budget of evaluations."""

    solver: str
    evaluations: int  # the budget
    calls: int  # of the model, at most the budget
    agreement: float  # share of the images whose nearest real digits are of their class
    distance: float | None  # root mean square of the difference of pixels from the reference; None: a random solver
    milliseconds: float  # an image, the network included


@dataclass
class Comparison:
    """Rows, and for the picture each row's images [N, 1, 8, 8] and the reference's."""

    rows: list[Row]
    images: list
    reference: object
    skipped: list[tuple[str, int]]  # (solver, evaluations) of budgets that are too small for it


def steps_within(solver, schedule, evaluations: int) -> int | None:
    """The most steps that take at most so many calls of the model; ``None``: the solver needs more."""
    from pydenoise.samplers import Conversion

    steps = evaluations
    while steps > 0:
        try:
            times = solver.timesteps(schedule, steps)
            excess = solver.plan(schedule, times, Conversion()).calls - evaluations
        except ValueError:  # more steps than the solver can space, or fewer than it needs
            excess = 1
        if excess <= 0:
            return steps
        steps -= -(-excess // MOST_CALLS_A_STEP)
    return None


def compare(
    model, names: Sequence[str], budgets: Sequence[int], task: Task, real, say: Callable[[str], None]
) -> Comparison:
    """Every solver of ``names`` with every budget, from the same noise; ``real``: (images, labels) to judge by."""
    from pydenoise.models.digits_quality import class_agreement, rms_distance
    from pydenoise.samplers import DPMSolverPP, NoiseSchedule

    schedule, known = NoiseSchedule.linear(), solvers()
    model = model.to(task.device)
    say(f"the reference: {REFERENCE_CALLS} evaluations")
    reference, _, _ = sample(model, schedule, DPMSolverPP(3), REFERENCE_CALLS, task)
    result = Comparison([], [], reference, [])
    import torch

    labels = torch.tensor(task.labels)
    for name in names:
        for budget in budgets:
            steps = steps_within(known[name], schedule, budget)
            if steps is None:
                result.skipped.append((name, budget))
                continue
            say(f"{name}: {budget} evaluations")
            images, seconds, plan = sample(model, schedule, known[name], steps, task)
            distance = None if plan.needs_noise else rms_distance(images, reference)
            agreement = class_agreement(images, labels, *real)
            result.rows.append(Row(name, budget, plan.calls, agreement, distance, seconds / max(1, len(images)) * 1e3))
            result.images.append(images)
    return result


def sample(model, schedule, solver, steps: int, task: Task):
    """(images on the CPU, seconds, the plan). On a CPU the seconds are the median call's times the calls."""
    import torch

    from pydenoise.samplers import Sampler

    labels = torch.tensor(task.labels, device=task.device)
    null = torch.full_like(labels, model.null_class)
    guided = task.guidance != 1
    sampler = Sampler(
        model, schedule, solver, steps, guidance_scale=task.guidance if guided else None, backend=task.backend
    )
    options = {
        "shape": (len(labels), 1, 8, 8),
        "seed": list(task.seeds),
        "conditioning": {"labels": labels},
        "unconditional": {"labels": null} if guided else None,
        "device": task.device,
    }
    marks = [time.perf_counter()]
    if task.device == "cpu":  # elsewhere calls are not done when they return, and telling of them costs time
        options["callback"] = lambda info: marks.append(time.perf_counter())
    images = sampler.sample(**options).cpu()
    seconds = time.perf_counter() - marks[0]
    if task.device == "cpu":
        each = [after - before for before, after in zip(marks, marks[1:], strict=False)]
        seconds = statistics.median(each) * len(each)
    return images, seconds, sampler.plan


# ------------------------------------------------------------------------------------------------------------- table


def table(result: Comparison, title: str):
    """A rich table: a row per solver and budget."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, title=title, title_style="bold", padding=(0, 1, 0, 0))
    made.add_column("solver", no_wrap=True)
    for heading in ("evaluations", "class agreement", "distance", "ms per image"):
        made.add_column(heading, justify="right", no_wrap=True)
    previous, several = None, len({row.evaluations for row in result.rows}) > 1
    for row in result.rows:
        if several and previous not in (None, row.solver):
            made.add_section()
        distance = STOCHASTIC if row.distance is None else f"{row.distance:.3f}"
        name = "" if row.solver == previous else row.solver
        figures = (f"{row.agreement:.0%}", distance, f"{row.milliseconds:.2f}")
        made.add_row(name, str(row.calls), *figures)
        previous = row.solver
    return made


def footnote(result: Comparison, task: Task) -> str:
    """What the columns mean, and which budgets were too small."""
    import torch

    from pydenoise.models.digits_quality import NEIGHBOURS

    threads = f"{torch.get_num_threads()} thread{'' if torch.get_num_threads() == 1 else 's'}"
    where = threads if task.device == "cpu" else task.device
    text = (
        f"{len(task.labels)} images, all solvers from the same noise. Class agreement: the share whose {NEIGHBOURS} "
        "nearest real digits are mostly of the class asked for (real digits among the others: 99%). Distance: root "
        f"mean square difference of pixels, -1 to 1, from {REFERENCE_CALLS} evaluations of DPM-Solver++ 3M; solvers "
        f"that draw noise on the way end elsewhere. Time: on {where}, the network included."
    )
    if result.skipped:
        budgets: dict[str, list[str]] = {}
        for name, budget in result.skipped:
            budgets.setdefault(name, []).append(str(budget))
        text += " Too few evaluations for: " + "; ".join(f"{name} ({', '.join(of)})" for name, of in budgets.items())
        text += "."
    return text


# ----------------------------------------------------------------------------------------------------------- picture


def draw(result: Comparison, task: Task, columns: int = 10):
    """The picture, [H, W, 3] uint8: the reference and a row per solver, a group of digits per budget.

    Every group shows the same images: one of each class first, at most ``columns``.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    chosen = _one_of_each(task.labels)[:columns]
    names = list(dict.fromkeys(row.solver for row in result.rows))
    budgets = sorted({row.evaluations for row in result.rows})
    cell = 8 * SCALE + GAP
    group = len(chosen) * cell + 4 * GAP
    canvas = Image.new("RGB", (LABEL + len(budgets) * group, HEADING + (len(names) + 1) * cell), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)

    def put(images, x: int, y: int) -> None:
        for place, index in enumerate(chosen):
            canvas.paste(_paper(images[index, 0]), (x + place * cell, y))

    pen.text((4, HEADING + 8), f"reference ({REFERENCE_CALLS})", fill="black", font=font)
    for column, budget in enumerate(budgets):
        left = LABEL + column * group
        pen.text((left, 2), f"{budget} evaluations", fill="black", font=font)
        put(result.reference, left, HEADING)
    for line, name in enumerate(names, 1):
        pen.text((4, HEADING + line * cell + 8), name, fill="black", font=font)
    for row, images in zip(result.rows, result.images, strict=True):
        left = LABEL + budgets.index(row.evaluations) * group
        put(images, left, HEADING + (names.index(row.solver) + 1) * cell)
    return np.asarray(canvas)


def _one_of_each(labels: Sequence[int]) -> list[int]:
    """Indices of all labels: the first of each class, then the second of each, and so on."""
    seen: dict[int, int] = {}
    ranks = []
    for label in labels:
        ranks.append(seen.get(label, 0))
        seen[label] = ranks[-1] + 1
    return sorted(range(len(labels)), key=lambda index: (ranks[index], labels[index]))


def _paper(digit):
    """[8, 8], -1 to 1, as a PIL image: ink is black."""
    from PIL import Image

    grey = ((1 - digit.clamp(-1, 1)) * 127.5).round().byte()
    return Image.fromarray(grey.repeat_interleave(SCALE, 0).repeat_interleave(SCALE, 1).numpy())


# -------------------------------------------------------------------------------------------------------------- both


def compare_and_draw(
    model, names: Sequence[str], budgets: Sequence[int], task: Task, target: Path, console
) -> list[Row]:
    """The table on ``console`` and the picture ``target``."""
    from pydenoise.imaging import Picture, write_picture
    from pydenoise.models.digits_quality import real_digits

    with console.status("") as status:
        result = compare(model, names, budgets, task, real_digits(), status.update)
    guided = "" if task.guidance == 1 else f", guidance {task.guidance:g}"
    console.print(table(result, f"Solvers on the digits denoiser{guided}"))
    console.print(footnote(result, task))
    write_picture(target, Picture(draw(result, task)))
    return result.rows
