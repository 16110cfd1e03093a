"""Windows: they give the whole sample of a local denoiser, go round where axes wrap, and take little memory."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pydenoise import step_row as C
from pydenoise.samplers import (
    DDIM,
    DDPM,
    PNDM,
    DPMSolverPP,
    EulerAncestral,
    EVODiff,
    Heun,
    NoiseSchedule,
    OverlappedWindows,
    Sampler,
    ShiftedWindows,
    TimeShift,
    UniPC,
    _window_grid,
)
from pydenoise.samplers import windows as module
from pydenoise.samplers.ddim import ddim_row

SCHEDULE = NoiseSchedule.linear()
ALPHAS = SCHEDULE.alphas_cumprod
SHAPE = (2, 3, 20, 28)


def parts_of(t, x):
    return (part.sqrt().view(-1, *(1,) * (x.dim() - 1)).to(x) for part in (ALPHAS[t.long()], 1 - ALPHAS[t.long()]))


def pointwise(x, t, mean=0.3):
    """The noise in x, for x0 ~ N(mean, 0.2^2) everywhere."""
    alpha, sigma = parts_of(t, x)
    return sigma * (x - alpha * mean) / (alpha**2 * 0.04 + sigma**2)


def sample(denoiser, solver=None, steps=6, observers=(), shape=SHAPE, seed=0, **options):
    named = {
        name: options.pop(name) for name in ("guidance_scale", "learned_variance", "input_scale") if name in options
    }
    run = Sampler(denoiser, SCHEDULE, solver or DDIM(), steps, observers=observers, **named)
    return run.sample(shape=shape, seed=seed, **options)


def shifted(denoiser, window=(8, 8), solver=None, **options):
    """(the denoiser, what a sampler takes with it)."""
    own = {
        name: options.pop(name) for name in ("shifts", "wrap", "crop", "coordinates", "max_batch") if name in options
    }
    windows = ShiftedWindows(denoiser, window, **({"mix": 0.0, "shifts": 4} | own | options.pop("own", {})))
    return sample(windows, solver, observers=[windows], **options)


# ----------------------------------------------------------------------------------- windows and the whole: identities

SOLVERS = [DDIM(), DDIM(eta=1.0), DDPM(), DPMSolverPP(3), UniPC(3), PNDM("f"), PNDM("plms"), Heun(), EulerAncestral(),
           EVODiff(), TimeShift(DDIM())]  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: f"{solver.name} {getattr(solver, 'variant', '')}")
def test_windows_of_a_local_denoiser_are_the_whole(solver):
    """Every solver works as on the whole sample: controls, noise, history and the saved sample are not cut up."""
    whole = sample(pointwise, solver)
    assert torch.equal(shifted(pointwise, solver=solver, wrap=(-1,)), whole)
    assert torch.equal(sample(OverlappedWindows(pointwise, (8, 8), overlap=0), solver), whole)


@pytest.mark.parametrize("weights", ["uniform", "linear", "cosine"])
@pytest.mark.parametrize("wrap", [(), (-1,), (-2, -1)])
def test_weighted_means_of_equal_outputs(weights, wrap):
    windows = OverlappedWindows(pointwise, (8, 9), overlap=(3, 5), weights=weights, wrap=wrap)
    torch.testing.assert_close(sample(windows), sample(pointwise), rtol=0, atol=2e-6)


@pytest.mark.parametrize("max_batch", [1, 3, 100])
@pytest.mark.parametrize("pieces", [None, 1])
def test_batches_do_not_matter(max_batch, pieces):
    whole = sample(pointwise, DDIM(eta=1.0))
    assert torch.equal(shifted(pointwise, solver=DDIM(eta=1.0), own={"max_batch": max_batch}, max_batch=pieces), whole)


def test_guidance():
    means = torch.tensor([0.5, -0.5])

    def denoiser(x, t, mean):
        return pointwise(x, t, mean.view(-1, 1, 1, 1))

    options = {"guidance_scale": 2.0, "conditioning": {"mean": means}, "unconditional": {"mean": 0 * means}}
    whole = sample(denoiser, **options)
    assert torch.equal(shifted(denoiser, **options), whole)
    assert torch.equal(sample(OverlappedWindows(denoiser, (8, 8), overlap=0, max_batch=3), **options), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")
def test_dtypes(dtype):
    whole = sample(pointwise, dtype=dtype)
    assert torch.equal(shifted(pointwise, dtype=dtype), whole)
    found = sample(OverlappedWindows(pointwise, (8, 8), overlap=4), dtype=dtype)
    bound = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-12}[dtype]
    assert found.dtype == dtype and (found - whole).abs().max() <= bound


def test_learned_variance():
    def denoiser(x, t):
        return torch.cat([pointwise(x, t), x.clamp(-1, 1)], 1)

    whole = sample(denoiser, DDPM("learned_range"))
    assert torch.equal(shifted(denoiser, solver=DDPM("learned_range")), whole)
    assert torch.equal(sample(OverlappedWindows(denoiser, (8, 8), overlap=0), DDPM("learned_range")), whole)


@pytest.mark.parametrize("shape", [(0, 3, 20, 28), (1, 3, 8, 8), (1, 3, 9, 15), (1, 3, 8, 31)])
@pytest.mark.parametrize("wrap", [(), (-2, -1)])
def test_sizes(shape, wrap):
    whole = sample(pointwise, shape=shape)
    assert torch.equal(shifted(pointwise, shape=shape, own={"wrap": wrap}), whole)
    found = sample(OverlappedWindows(pointwise, (8, 8), overlap=3, wrap=wrap), shape=shape)
    torch.testing.assert_close(found, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape, window, wrap", [
    ((2, 3, 13, 6, 8), (4, None, None), (-3,)),  # a video, windows along its frames
    ((2, 3, 13, 6, 8), (4, 3, 4), (-1,)),
    ((2, 3, 6, 29), (10,), ()),  # along the width only
    ((2, 3, 50), 8, (-1,)),  # a sequence
    ((1, 2, 9, 10), 4, ()),
])  # fmt: skip
def test_videos_and_sequences(shape, window, wrap):
    whole = sample(pointwise, shape=shape)
    assert torch.equal(shifted(pointwise, window, shape=shape, own={"wrap": wrap, "shifts": 3}), whole)
    found = sample(OverlappedWindows(pointwise, window, overlap=2, wrap=wrap), shape=shape)
    torch.testing.assert_close(found, whole, rtol=0, atol=2e-6)


# -------------------------------------------------------------------------------------------------------- convolutions


@pytest.fixture(scope="module")
def kernel():
    return torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(1)) / 9


def test_a_margin_of_the_radius_gives_the_whole_convolution(kernel):
    """Up to the border of the sample, where both see zeros; and round it, where an axis wraps."""

    def zeros(x, t):
        return F.conv2d(x, kernel, padding=2)

    def ring(x, t):
        return F.conv2d(F.pad(F.pad(x, (2, 2, 0, 0), mode="circular"), (0, 0, 2, 2)), kernel)

    x, t = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)), torch.tensor([5, 5])
    for overlap, weights in ((4, "uniform"), (6, "linear"), (7, "cosine")):
        options = {"overlap": overlap, "margin": 2, "weights": weights}
        torch.testing.assert_close(OverlappedWindows(zeros, (10, 12), **options)(x, t), zeros(x, t), rtol=0, atol=2e-5)
        found = OverlappedWindows(zeros, (10, 12), wrap=(-1,), **options)(x, t)
        torch.testing.assert_close(found, ring(x, t), rtol=0, atol=2e-5)


def test_without_a_margin_the_interior_agrees(kernel):
    """Two windows of 12 with an overlap of 4: all that one of them alone, 2 from its side, says."""
    x, t = torch.randn((1, 3, 20, 20), generator=torch.Generator().manual_seed(2)), torch.tensor([5])
    whole = F.conv2d(x, kernel, padding=2)
    found = OverlappedWindows(lambda x, t: F.conv2d(x, kernel, padding=2), (12, 12), overlap=4)(x, t)
    alone = [*range(8), *range(12, 20)]
    torch.testing.assert_close(found[..., alone, :][..., alone], whole[..., alone, :][..., alone], rtol=0, atol=2e-5)
    assert (found - whole).abs().max() > 0.01


def test_a_panorama_is_equivariant(kernel):
    """Turned noise gives the turned panorama, by what is between two windows; shifted windows, by a window."""

    def local(x, t):
        return 0.5 * pointwise(x, t) + 0.05 * F.conv2d(x, kernel, padding=2)

    x = torch.randn((1, 3, 12, 32), generator=torch.Generator().manual_seed(3))
    moved = ShiftedWindows(local, (12, 8), shifts=4, wrap=(-1,))
    around = OverlappedWindows(local, (12, 8), overlap=4, wrap=(-1,))
    for denoiser, observers, turn in ((around, [], 4), (moved, [moved], 8)):
        run = Sampler(denoiser, SCHEDULE, DPMSolverPP(2), 6, observers=observers)
        turned = run.sample(x.roll(turn, -1))
        torch.testing.assert_close(turned, run.sample(x).roll(turn, -1), rtol=0, atol=1e-5)
        assert (turned - run.sample(x.roll(turn + 1, -1)).roll(-1, -1)).abs().max() > 1e-4, "a seam is somewhere"


def test_offsets_move_and_come_back():
    seen = []

    def denoiser(x, t):
        seen.append(x[0, 0, 0].clone())
        return torch.zeros_like(x)

    x = torch.arange(24.0).expand(1, 1, 2, 24)
    windows = ShiftedWindows(denoiser, (2, 8), shifts=4, wrap=(-1,), max_batch=3)
    for call in range(5):
        windows.begin_step(call, 5)
        windows(x, torch.tensor([0]))
    assert [int(first[0]) for first in seen] == [0, 2, 4, 6, 0]
    assert [windows.graph_key(call) for call in range(5)] == [0, 1, 2, 3, 0]


def test_gradients():
    """Through windows, as through the whole."""
    x = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(6), requires_grad=True)
    windows = ShiftedWindows(pointwise, (8, 8), shifts=4, mix=0.0, wrap=(-1,))
    gradients = []
    for denoiser, observers in ((pointwise, []), (windows, [windows]),
                                (OverlappedWindows(pointwise, (8, 8), overlap=3), [])):  # fmt: skip
        run = Sampler(denoiser, SCHEDULE, DDIM(), 4, observers=observers)
        (gradient,) = torch.autograd.grad(run.sample(x, differentiable="checkpoint").square().sum(), x)
        gradients.append(gradient)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- conditions


def test_conditions_of_a_window():
    """Images of the sample's size are cut like it, rows follow their sample, and coordinates say where a window is."""
    image = torch.randn(1, 2, 20, 28, generator=torch.Generator().manual_seed(4))
    gain = torch.tensor([1.0, 2.0])
    y, x = (((torch.arange(size) * 2 + 1) / size - 1) for size in (20, 28))
    places = torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]

    def denoiser(x, t, image, nested, where, word):
        assert word == "same" and nested["table"].shape == (7, 2)
        return pointwise(x, t) + (image.sum(1) + where[:, 0] - where[:, 1])[:, None] * nested["gain"].view(-1, 1, 1, 1)

    given = {"image": image, "nested": {"gain": gain, "table": torch.zeros(7, 2)}, "word": "same"}
    x, t = torch.randn(SHAPE), torch.tensor([400, 3])
    expected = denoiser(x, t, where=places, **given)
    options = {"wrap": (-1,), "max_batch": 5, "crop": ["image"], "coordinates": "where"}
    moved = ShiftedWindows(denoiser, (8, 8), shifts=4, mix=0, **options)
    for call in range(4):
        moved.begin_step(call, 4)
        torch.testing.assert_close(moved(x, t, **given), expected, rtol=0, atol=1e-6)
    around = OverlappedWindows(denoiser, (8, 8), overlap=4, **options)
    torch.testing.assert_close(around(x, t, **given), expected, rtol=0, atol=5e-6)
    assert torch.equal(around(x, t, **(given | {"image": image.expand(2, -1, -1, -1)})), around(x, t, **given))


def test_times_of_frames():
    """A time for every frame goes with the frame."""

    def denoiser(x, t):
        return x * t[:, None, :, None, None]

    x, t = torch.randn(2, 1, 9, 3, 3), torch.rand(2, 9)
    assert torch.equal(OverlappedWindows(denoiser, (4, None, None), overlap=0)(x, t), denoiser(x, t))
    assert torch.equal(OverlappedWindows(denoiser, (2, 2), overlap=0)(x, t), denoiser(x, t))


# ----------------------------------------------------------------------------------- what docked windows evaluate again


def chain(x, calls, shifts, mix, denoiser):
    """[B, C, 12] in windows of 8, step by step and window by window, as the source has it (DDIM), with z = 0."""
    run = Sampler(pointwise, SCHEDULE, DDIM(), calls)
    levels = [*run.plan.levels, type(run.plan.levels[0]).clean()]
    x = x.clone()
    for call in range(calls):
        level, target, t = levels[call], levels[call + 1], torch.tensor([int(run.times[call])])
        offset = call % shifts * (8 // shifts)
        new, done = x.clone(), torch.zeros(12, dtype=torch.bool)
        offset = offset if offset + 8 <= 12 else 0
        starts = [offset] + ([0] if offset else []) + ([4] if offset < 4 else [])
        for start in starts:
            here = slice(start, start + 8)
            again = level.alpha / target.alpha * new[..., here]
            given = torch.where(done[here], mix * again + (1 - mix) * x[..., here], x[..., here])
            values = ddim_row(run.conversion, level, target)
            x = x.clone()
            x[..., here] = given
            new[..., here] = values[C.SAMPLE] * given + values[C.OUTPUT] * denoiser(given, t)
            done[here] = True
        x = new
    return x


@pytest.mark.parametrize("mix", [0.3, 1.0])
@pytest.mark.parametrize("way", ["plain", "guided", "scaled"])
def test_docked_windows_denoise_again(mix, way, monkeypatch):
    """The state that docks find, noised again, and what they make of it: the source's loop, without its noise."""
    monkeypatch.setattr(module, "step_variance", lambda level, target: 0.0)

    def local(x, t, mean=0.3):
        return pointwise(x, t, mean) + 0.1 * x.mean(-1, keepdim=True)  # a window's output depends on its neighbours

    def denoiser(x, t, mean=None):
        x = x / 2 if way == "scaled" else x
        return local(x, t) if mean is None else local(x, t, mean.view(-1, 1, 1))

    def combined(x, t):
        return local(x, t, 0.0) + 3.0 * (local(x, t, 0.5) - local(x, t, 0.0))

    x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(5))
    windows = ShiftedWindows(denoiser, 8, shifts=4, mix=mix, max_batch=3)
    options, told = {}, {}
    if way == "guided":
        options, told = {"guidance_scale": 3.0}, {"conditioning": {"mean": torch.full((2,), 0.5)}}
        told["unconditional"] = {"mean": torch.zeros(2)}
    if way == "scaled":
        options = {"input_scale": lambda level: 2.0}
    found = Sampler(windows, SCHEDULE, DDIM(), 7, observers=[windows], **options).sample(x, seed=0, **told)
    expected = chain(x, 7, 4, mix, combined if way == "guided" else local)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_noise_of_docked_windows():
    """Renoised states have the level's distribution; the noise is the seed's, whatever the batch."""
    windows = ShiftedWindows(pointwise, (8, 8), shifts=4)
    run = Sampler(windows, SCHEDULE, DDIM(), 50, observers=[windows])
    found = run.sample(shape=(24, 3, 20, 20), seed=0)
    whole = sample(pointwise, steps=50, shape=(24, 3, 20, 20))
    assert abs(float(found.mean()) - 0.3) < 0.01 and abs(float(found.std() - whole.std())) < 0.01
    assert abs(float(found[..., :4].std() - whole.std())) < 0.01, "at the border, where the docks are"
    x = torch.randn(SHAPE)
    assert torch.equal(run.sample(x, seed=1), run.sample(x, seed=1, max_batch=1))
    assert not torch.equal(run.sample(x, seed=1), run.sample(x, seed=2))
    alone = run.sample(x[1:], seed=[7])
    assert torch.equal(run.sample(x, seed=[3, 7])[1:], alone)


def test_mixing_is_refused_where_it_means_nothing():
    windows = ShiftedWindows(pointwise, (8, 8))
    for options, message in (
        ({"solver": Heun()}, "mix: this solver begins several calls"),
        ({"solver": DDIM(), "dynamic_threshold": 0.9}, "mix: cannot be used with dynamic_threshold"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampler(windows, SCHEDULE, num_steps=4, observers=[windows], **options).sample(shape=SHAPE, seed=0)
    with pytest.raises(ValueError, match="graph: no CUDA graph"):
        Sampler(windows, SCHEDULE, DDIM(), 4, observers=[windows], graph=True).sample(shape=SHAPE, seed=0)
    around = Sampler(lambda x, t: windows(x + 0, t), SCHEDULE, DDIM(), 4, observers=[windows])
    with pytest.raises(RuntimeError, match="mix needs a Sampler whose denoiser it is"):
        around.sample(shape=SHAPE, seed=0)
    with pytest.raises(RuntimeError, match="mix needs a Sampler"):
        ShiftedWindows.__call__(_told(ShiftedWindows(pointwise, (8, 8))), torch.randn(SHAPE), torch.tensor([3, 3]))


def _told(windows):
    windows.begin_step(1, 4)
    return windows


# ------------------------------------------------------------------------------------------------------------ the grid


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("size", [8, 9, 12, 15, 16, 17, 24, 31])
def test_every_place_is_new_once(size, wraps):
    """And windows of one stage are apart."""
    for offset in range(8):
        new, stages = torch.zeros(size, dtype=torch.int64), {}
        for span in _window_grid.shifted_spans(size, 8, offset, wraps):
            where = (span.start + torch.arange(8)) % size
            assert wraps or span.start + 8 <= size
            new[where[span.low : span.high]] += 1
            stages.setdefault(span.stage, torch.zeros(size, dtype=torch.int64))[where] += 1
        assert new.eq(1).all() and all(covered.max() == 1 for covered in stages.values())


# -------------------------------------------------------------------------------------------------------------- memory


class _Largest(TorchDispatchMode):
    """Elements of the largest tensors that operations make."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and "empty" in str(func) or "zeros" in str(func):
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("mode", ["shifted", "overlapped"])
def test_memory_beside_the_sample_does_not_grow(mode):
    """One tensor of the sample's size is made, the output; everything else has the size of the windows."""

    def made(width):
        x, t = torch.randn(1, 3, 16, width), torch.tensor([3])
        denoiser = (
            ShiftedWindows(pointwise, (8, 8), shifts=4, mix=0, wrap=(-1,), max_batch=4)
            if mode == "shifted"
            else OverlappedWindows(pointwise, (8, 8), overlap=4, wrap=(-1,), max_batch=4)
        )
        _told(denoiser) if mode == "shifted" else None
        denoiser(x, t)
        with _Largest() as largest:
            denoiser(x, t)
        assert largest.sizes.count(x.numel()) == 1
        return max(size for size in largest.sizes if size != x.numel())

    assert made(64) == made(640) == 4 * 3 * 8 * 8


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("options, message", [
    ({"denoiser": 3}, "denoiser: expected a callable"),
    ({"window": 0}, "window: expected at least 1"),
    ({"window": (None, None)}, "window: expected the size of a window along at least one axis"),
    ({"window": "ab"}, "window: expected an int"),
    ({"wrap": (1,)}, "wrap: expected negative numbers"),
    ({"wrap": -1}, "wrap: expected negative numbers"),
    ({"wrap": (-3,)}, "wrap: axis -3 has no windows"),
    ({"window": (8, None), "wrap": (-1,)}, "wrap: axis -1 has no windows"),
    ({"max_batch": 0}, "max_batch: expected at least 1"),
    ({"crop": "image"}, "crop: expected a list"),
    ({"coordinates": 1}, "coordinates: expected a keyword's name"),
    ({"overlap": 8}, "overlap: expected from 0 .* to 7, got 8"),
    ({"overlap": 3, "margin": 2}, "overlap: expected from 4"),
    ({"overlap": (1, 2, 3)}, "overlap: expected one number, or one for each"),
    ({"margin": -1}, "margin: expected at least 0"),
    ({"weights": "gauss"}, "weights: expected one of"),
    ({"shifts": 0}, "shifts: expected at least 1"),
    ({"shifts": 9}, "shifts: expected at most the window's 8"),
    ({"mix": 2}, "mix: expected a number from 0 to 1"),
    ({"mix": "all"}, "mix: expected a number"),
])  # fmt: skip
def test_bad_arguments(options, message):
    given = {"denoiser": pointwise, "window": (8, 8)} | options
    kinds = (ShiftedWindows,) if {"shifts", "mix"} & set(options) else (OverlappedWindows,)
    for kind in kinds:
        more = {} if kind is ShiftedWindows or "overlap" in given else {"overlap": 4}
        with pytest.raises((TypeError, ValueError), match=message):
            kind(**given, **more)


def test_bad_calls():
    x, t = torch.randn(1, 3, 8, 20), torch.tensor([3])

    def call(denoiser=pointwise, window=(8, 8), x=x, told=None, **options):
        return OverlappedWindows(denoiser, window, overlap=2, **options)(x, t, **(told or {}))

    for arguments, message in (
        ({"window": (9, 8)}, r"window: \(9, 8\) is larger than the sample's \(8, 20\)"),
        ({"window": (8, 8, 8)}, "x: expected 3 axes"),
        ({"x": x[0, 0]}, "x: expected a tensor"),
        ({"window": 8, "wrap": (-3,)}, "wrap: no axis -3"),
        ({"crop": ["image"]}, "crop: the denoiser was given no 'image'"),
        ({"crop": ["image"], "told": {"image": x[..., :5]}}, "crop: expected 'image' of shape"),
        ({"coordinates": "where", "told": {"where": 1}}, "coordinates: 'where' is also"),
        ({"denoiser": lambda x, t: 1}, "denoiser: expected a tensor"),
        ({"denoiser": lambda x, t: x[..., :3]}, "denoiser: expected windows of shape"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call(**arguments)
    with pytest.raises(RuntimeError, match=re.escape("begin_step comes first")):
        ShiftedWindows(pointwise, (8, 8))(x, t)
    with pytest.raises(ValueError, match="shifts: 8 offsets do not fit into a window of 4"):
        _told(ShiftedWindows(pointwise, (4, 8)))(x, t)
