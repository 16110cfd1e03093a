"""``pydenoise sample`` and the digits of ``pydenoise demo``: the table, the picture, what is refused."""

import json
import sys

import numpy as np
import pytest
import torch

from pydenoise.cli import digits, sample
from pydenoise.imaging import read_picture
from pydenoise.models import DigitsUNet
from pydenoise.models.digits import save_digits
from pydenoise.samplers import Conversion, NoiseSchedule

pytest.importorskip("rich")
pytest.importorskip("PIL")
pytest.importorskip("sklearn")

SCHEDULE = NoiseSchedule.linear()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "new" / "digits.png"


@pytest.fixture
def few(monkeypatch):
    """The reference is not what is tested."""
    monkeypatch.setattr(digits, "REFERENCE_CALLS", 20)


def test_every_solver_is_offered():
    assert tuple(digits.solvers()) == sample.SOLVERS


@pytest.mark.parametrize("name", sample.SOLVERS)
def test_budgets_are_kept_and_used(name):
    """At most so many calls, and one more step would take more."""
    solver = digits.solvers()[name]
    for budget in (5, 10, 20, 50):
        steps = digits.steps_within(solver, SCHEDULE, budget)
        if steps is None:
            assert name in ("pndm-f", "pndm-fon") and budget <= 10
            continue
        calls, more = (
            solver.plan(SCHEDULE, solver.timesteps(SCHEDULE, count), Conversion()).calls for count in (steps, steps + 1)
        )
        assert calls <= budget < more


def test_table_picture_and_json(cli, few, target, tmp_path):
    table = tmp_path / "table.json"
    names = ["ddim", "ddpm", "heun", "pndm-f"]
    options = ["--classes", 3, 8, "--images", 2, "--evaluations", 10, 5, "--json", table, "--out", target]
    code, out, err = cli("sample", "--solver", *names, *options)
    assert code == 0, err
    for word in ("ddim", "class agreement", "distance", "ms per image", "random", "4 images", "pndm-f (5, 10)"):
        assert word in " ".join(out.split())
    assert [line for line in out.splitlines() if line.startswith("wrote")] == [f"wrote {target}", f"wrote {table}"]
    rows = json.loads(table.read_text())
    assert [(row["solver"], row["evaluations"]) for row in rows] == [(n, k) for n in names[:3] for k in (5, 10)]
    assert [row["calls"] for row in rows] == [5, 10, 5, 10, 5, 9]
    assert [row["distance"] is None for row in rows] == [False, False, True, True, False, False]
    assert 0 < rows[1]["distance"] < rows[0]["distance"] < 0.5 and rows[1]["agreement"] >= 0.75
    pixels = read_picture(target).pixels
    height, width = pixels.shape[:2]
    cell = 8 * digits.SCALE + digits.GAP
    assert height == digits.HEADING + 4 * cell and width == digits.LABEL + 2 * (4 * cell + 4 * digits.GAP)


def test_the_same_seed_gives_the_same_and_images_do_not_depend_on_others(few):
    from pydenoise.models import load_digits

    model, solver = load_digits(), digits.solvers()["ddpm"]
    both = digits.Task((4, 7), (24, 27))
    with torch.inference_mode():
        first, again = (digits.sample(model, SCHEDULE, solver, 4, both)[0] for _ in range(2))
        alone, _, _ = digits.sample(model, SCHEDULE, solver, 4, digits.Task((7,), (27,)))
        other, _, _ = digits.sample(model, SCHEDULE, solver, 4, digits.Task((7,), (28,)))
    assert torch.equal(first, again)
    torch.testing.assert_close(alone[0], first[1], atol=1e-4, rtol=1e-4)
    assert (other - alone).abs().max() > 0.1


def test_tasks_of_options():
    from pydenoise.cli.main import build_parser

    parse = build_parser().parse_args
    wide, narrow = (
        sample.task(parse(["sample", "--images", "3", "--seed", "5", *classes])) for classes in ([], ["--classes", "7"])
    )
    assert len(wide.labels) == 30 and len(set(wide.seeds)) == 30
    pairs = list(zip(wide.labels, wide.seeds, strict=True))
    assert [pair for pair in pairs if pair[0] == 7] == list(zip(narrow.labels, narrow.seeds, strict=True))
    assert len(sample.task(parse(["sample", "--quick"])).labels) == 20
    assert sample.task(parse(["sample", "--guidance", "2.5"])).guidance == 2.5


def test_guidance_calls_the_model_with_and_without_the_class(few):
    class Watched(torch.nn.Module):
        null_class = 10

        def forward(self, x, t, labels):
            seen.append(sorted(labels.tolist()))
            return x

    for guidance, expected in ((1.0, [3]), (2.0, [3, 10])):
        seen: list = []
        digits.sample(Watched(), SCHEDULE, digits.solvers()["ddim"], 2, digits.Task((3,), (0,), guidance))
        assert seen == [expected] * 2


def test_quick_defaults(cli, few, target):
    code, out, err = cli("sample", "--quick", "--solver", "unipc", "--out", target, "--backend", "reference")
    assert code == 0, err
    assert "20 images" in out and "10" in out


def test_other_weights(cli, refused, few, target, tmp_path):
    torch.manual_seed(0)
    save_digits(DigitsUNet(multipliers=(1,), attention_levels=()), tmp_path / "m.safetensors")
    options = ("--quick", "--solver", "ddim", "--classes", 1, "--out", target)
    assert cli("sample", *options, "--weights", tmp_path / "m.safetensors")[0] == 0
    assert "no such weights file" in refused("sample", *options, "--weights", tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--solver", "rk4"), "invalid choice"),
        (("--evaluations", 0), "at least 1"),
        (("--evaluations", 1001), "at most 1000"),
        (("--evaluations", 3, "--solver", "pndm-f"), "--evaluations: 3 are too few for pndm-f"),
        (("--classes", 10), "expected a digit"),
        (("--guidance", "-1"), "expected a finite number, 0 or more"),
        (("--guidance", "nan"), "expected a finite number"),
        (("--seed", "-3"), "expected a whole number"),
        (("--backend", "metal"), "invalid choice"),
        (("--out", "digits.bmp"), "unknown extension"),
    ],
)
def test_bad_options_are_one_line_before_anything_is_computed(refused, monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DigitsUNet, "forward", lambda *args: pytest.fail("the network ran"))
    assert message in refused("sample", *options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_backends_and_devices_that_are_not_here(refused, few, target):
    options = ("sample", "--quick", "--solver", "ddim", "--classes", 1, "--out", target)
    assert "torch finds no CUDA device" in refused(*options, "--device", "cuda")
    assert "cuda" in refused(*options, "--backend", "cuda")


def test_a_missing_package_is_named_with_its_extra(refused, monkeypatch, target):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install pydenoise[demo]" in refused("sample", "--out", target)


def test_the_picture_shows_one_of_each_class_first():
    assert digits._one_of_each([5, 5, 2, 2, 9]) == [2, 0, 4, 3, 1]
    ink = torch.full((1, 1, 8, 8), 1.0)
    ink[..., 0, 0] = -3.0
    picture = np.asarray(digits._paper(ink[0, 0]))
    assert picture.shape == (8 * digits.SCALE,) * 2 and picture[0, 0] == 255 and picture[-1, -1] == 0


def test_part_of_the_demo(cli, few, target, tmp_path):
    code, out, err = cli("demo", "--only", "digits", "--digits-output", target, "--json", tmp_path / "t.json")
    assert code == 0, err
    rows = json.loads((tmp_path / "t.json").read_text())["digits"]
    assert {row["solver"] for row in rows} == set(sample.SOLVERS) - {"pndm-f", "pndm-fon"}
    assert f"wrote {target}" in out and read_picture(target).pixels.shape[0] > 400
    poor = [row for row in rows if row["agreement"] < 0.8]
    assert not poor
