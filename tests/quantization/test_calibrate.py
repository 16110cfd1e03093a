"""Calibration of models: batches in every form, timesteps, refusals, files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pydenoise.quantization import Arguments, Calibration, Scheme, TimestepBuckets, calibrate


class Denoiser(nn.Module):
    """A small network with a timestep, a layer that is not called, and one used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.embed = nn.Linear(1, 8)
        self.last = nn.Conv2d(8, 3, 3, padding=1)
        self.spare = nn.Linear(2, 2)
        self.eval()

    def forward(self, x, timestep, scale=1.0):
        timestep = torch.as_tensor(timestep, dtype=x.dtype).reshape(-1, 1)
        h = self.first(x) + self.embed(timestep / 1000)[:, :, None, None]
        h = torch.relu(self.middle(torch.relu(self.middle(h)))) * (1 + timestep.mean() / 100)
        return self.last(h) * scale


@pytest.fixture
def model():
    return Denoiser()


def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)).eval()


def x(n=2):
    return torch.randn(n, 3, 8, 8)


@pytest.mark.parametrize(
    "batch",
    [
        lambda: (x(), 500),
        lambda: [x(), torch.tensor([500, 500])],
        lambda: {"x": x(), "timestep": torch.tensor(500)},
        lambda: {"scale": 2.0, "timestep": 500.0, "x": x()},
        lambda: Arguments((x(),), {"timestep": 500}),
    ],
)
@pytest.mark.parametrize("argument", ["auto", "timestep"])
def test_batches_in_every_form(model, batch, argument):
    c = calibrate(model, [batch()], timestep_argument=argument, buckets=4)
    assert c.timestep_argument == "timestep"
    assert c.layers["first"].seen.tolist() == [False, False, True, False]
    assert c.layers["middle"].calls == 2
    assert c.uncalled == ("spare",) and set(c.layers) == {"first", "middle", "embed", "last"}
    assert "never called: spare" in str(c)


def test_timestep_by_position(model):
    c = calibrate(model, [(x(), 10), (x(), 990)], timestep_argument=1, buckets=2)
    assert c.layers["last"].seen.all()
    assert c.layers["last"].high[1] > c.layers["last"].high[0]


def test_a_model_without_timesteps():
    c = calibrate(plain(), [x()])
    assert c.timestep_argument is None and len(c.timesteps) == 1 and c.scheme == "auto"


def test_rows_with_timesteps_of_their_own(model):
    big = x(2)
    big[1] *= 100
    c = calibrate(model, [(big, torch.tensor([0, 999]))], buckets=10)
    first = c.layers["first"]
    assert first.counts.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert first.high[0] == big[0].max() and first.high[9] == big[1].max()


def test_buckets_follow_the_scheme_or_are_given(model):
    assert len(calibrate(model, [(x(), 1)]).timesteps) == 10
    assert len(calibrate(model, [(x(), 1)], scheme=Scheme("per_timestep", buckets=6)).timesteps) == 6
    assert len(calibrate(model, [(x(), 1)], scheme="per_tensor").timesteps) == 1
    ranges = TimestepBuckets((0.0, 3.0))
    assert calibrate(model, [(x(), -0.5)], buckets=ranges).layers["first"].seen.tolist() == [True, False, False]


def test_the_model_and_its_inputs_stay_as_they_are(model):
    class Inplace(nn.Sequential):
        def forward(self, x):
            return super().forward(x.mul_(2))

    twin = Inplace(nn.Conv2d(3, 3, 1)).eval()
    batch = x()
    kept = batch.clone()
    before = {key: value.clone() for key, value in twin.state_dict().items()}
    calibrate(twin, [batch])
    assert torch.equal(batch, kept)
    assert all(torch.equal(value, before[key]) for key, value in twin.state_dict().items())
    assert not any(module._forward_pre_hooks for module in twin.modules())


def test_a_generator_that_runs_the_model_is_not_observed(model):
    def batches():
        for _ in range(2):
            model(x() * 1e6, 0)
            yield x(), 0

    c = calibrate(model, batches(), buckets=1)
    assert c.batches == 2 and c.layers["first"].high < 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    c = calibrate(plain().to(dtype), [x().to(dtype)])
    assert c.layers["0"].channel_low.dtype == torch.float32


@pytest.mark.parametrize("layers", ["middle", ["mid*"], ("middle",)])
def test_chosen_layers(model, layers):
    assert list(calibrate(model, [(x(), 1)], layers=layers).layers) == ["middle"]


def test_constant_inputs_are_noted():
    c = calibrate(plain(), [torch.full((1, 3, 8, 8), 0.5)])
    assert c.constant[0] == "0"
    assert "constant input" in str(c)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: calibrate(m, []), ValueError, "^batches: expected at least one"),
        (lambda m: calibrate(m.train(), [(x(), 1)]), ValueError, "^model: .*training mode"),
        (lambda m: calibrate(lambda x: x, [x()]), TypeError, "^model:"),
        (lambda m: calibrate(nn.ReLU().eval(), [x()]), ValueError, "^model: has no Conv2d or Linear"),
        (lambda m: calibrate(m, ["a"]), TypeError, "^batches:"),
        (lambda m: calibrate(m, [(x(),)]), ValueError, "^batches:"),
        (lambda m: calibrate(m, [(x(), float("nan"))]), ValueError, "^batches: the timestep"),
        (lambda m: calibrate(m, [(x(), "soon")]), ValueError, "^batches: the timestep"),
        (lambda m: calibrate(m, [(x() * torch.nan, 1)]), ValueError, "layer 'first' holds NaN"),
        (lambda m: calibrate(m, [(x(), 1)], layers="mid"), ValueError, "^layers: 'mid' matches no"),
        (lambda m: calibrate(m, [(x(), 1)], layers=[3]), TypeError, "^layers:"),
        (lambda m: calibrate(m, [(x(), 1)], layers=[]), ValueError, "^layers:"),
        (lambda m: calibrate(m, [(x(), 1)], layers="spare"), ValueError, "^batches: no layer"),
        (lambda m: calibrate(m, [(x(), 1)], scheme="int8"), ValueError, "^scheme:"),
        (lambda m: calibrate(m, [(x(), 1)], timestep_argument="sigma"), ValueError, "^timestep_argument: .*'sigma'"),
        (lambda m: calibrate(m, [(x(), 1)], timestep_argument=9), ValueError, "^timestep_argument: .*below 3"),
        (lambda m: calibrate(m, [(x(), 1)], timestep_argument=1.5), TypeError, "^timestep_argument:"),
        (lambda m: calibrate(plain(), [x()], buckets=4), ValueError, "^buckets:"),
        (lambda m: calibrate(plain(), [x()], scheme="per_timestep"), ValueError, "^scheme: per_timestep needs"),
        (lambda m: calibrate(m, [(x(), 1)], scheme="per_timestep", buckets=3), ValueError, "^buckets:"),
    ],
)
def test_refusals(model, make, error, message):
    with pytest.raises(error, match=message):
        make(model)


def test_nan_inside_names_the_layer_that_meets_it(model):
    with torch.no_grad():
        model.first.bias[0] = torch.nan
    with pytest.raises(ValueError, match="layer 'middle' holds NaN"):
        calibrate(model, [(x(), 1)])


# -------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def saved(model, tmp_path):
    c = calibrate(model, [(x(), 100), (x(), 900)], scheme=Scheme("per_timestep", buckets=5))
    c.save(tmp_path / "c.safetensors")
    return c, tmp_path / "c.safetensors"


def test_files_hold_everything(model, saved):
    c, path = saved
    loaded = Calibration.load(path, model)
    assert str(loaded) == str(c) and loaded.summary() == c.summary()
    assert (loaded.scheme, loaded.timesteps, loaded.uncalled) == (c.scheme, c.timesteps, c.uncalled)
    for name, item in c.layers.items():
        other = loaded.layers[name]
        assert torch.equal(other.channel_low, item.channel_low) and torch.equal(other.counts, item.counts)
        for bucket in range(5):
            pairs = zip(other.samples(bucket), item.samples(bucket), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_merging_counts_both(model, saved):
    c, path = saved
    merged = Calibration.load(path).merge(c)
    assert merged.batches == 4 and merged.layers["first"].counts.sum() == 8
    assert torch.equal(merged.layers["last"].channel_high, c.layers["last"].channel_high)
    with pytest.raises(ValueError, match="^other: has other timestep buckets"):
        c.merge(calibrate(model, [(x(), 1)], buckets=2))
    with pytest.raises(ValueError, match="^other: is of another model"):
        c.merge(calibrate(Denoiser(), [(x(), 1)], buckets=5))
    with pytest.raises(ValueError, match="^other: is of other layers"):
        c.merge(calibrate(model, [(x(), 1)], buckets=5, layers="first"))


def test_another_model_is_refused(model, saved):
    c, path = saved
    with pytest.raises(ValueError, match="another model .*no layer 'first'"):
        Calibration.load(path, plain())
    model.middle = nn.Conv2d(8, 8, 3, padding=1, stride=2)
    with pytest.raises(ValueError, match="another model .*stride of layer 'middle'"):
        c.check(model)


def test_other_weights_are_refused_a_cast_is_not(model, saved):
    c, _ = saved
    c.check(model.to(torch.bfloat16))
    with torch.no_grad():
        model.last.weight.mul_(1.1)
    with pytest.raises(ValueError, match="other weights: those of layer 'last'"):
        c.check(model)


def rewritten(path, **changes):
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        metadata = {**file.metadata(), **changes}
    save_file(load_file(str(path)), str(path), metadata)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "something"}, "not a calibration"),
        ({"format_version": "99"}, "version 99; this pydenoise reads version 1"),
        ({"calibration": "{"}, "damaged"),
        ({"calibration": json.dumps({"model": "M"})}, "damaged"),
    ],
)
def test_other_files_are_refused(saved, changes, message):
    with pytest.raises(ValueError, match=message):
        Calibration.load(rewritten(saved[1], **changes))


def test_broken_and_missing_files(saved, tmp_path):
    path = saved[1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged"):
        Calibration.load(path)
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "none")
