"""The denoiser of digits: what it is told, checkpoints, how samples are judged, and the one that is shipped."""

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pydenoise.models import DigitsUNet, WeightsError, load_digits
from pydenoise.models.digits import SHIPPED, read_notes, save_digits
from pydenoise.models.digits_quality import class_agreement, nearest_class, real_digits, rms_distance


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DigitsUNet(multipliers=(1,), attention_levels=()).eval()
    for weight in model.parameters():  # as they are at first, no block does anything
        torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.2)
    return model


# -------------------------------------------------------------------------------------------------------------- model


def test_time_and_class_count_and_images_do_not_mix(model):
    x, times, labels = torch.randn(3, 1, 8, 8), torch.tensor([5, 500, 999]), torch.tensor([0, 9, 10])
    out = model(x, times, labels)
    assert out.shape == x.shape
    torch.testing.assert_close(model(x[1:2], times[1:2], labels[1:2]), out[1:2], atol=1e-5, rtol=1e-4)
    assert (model(x, times, labels.roll(1)) - out).abs().amax((1, 2, 3)).min() > 1e-2
    assert (model(x, times.roll(1), labels) - out).abs().amax((1, 2, 3)).min() > 1e-2


def test_no_labels_are_the_null_class(model):
    x, times = torch.randn(2, 1, 8, 8), torch.tensor([7, 70])
    assert torch.equal(model(x, times), model(x, times, torch.full((2,), model.null_class)))


def test_one_time_for_all_whole_or_not(model):
    x = torch.randn(2, 1, 8, 8)
    expected = model(x, torch.tensor([40.0, 40.0]))
    for times in (torch.tensor(40), torch.tensor([40.0]), torch.tensor([40, 40], dtype=torch.float64)):
        assert torch.equal(model(x, times), expected)
    assert not torch.equal(model(x, torch.tensor(40.5)), expected)


def test_dtypes_and_sizes(model):
    assert model.double()(torch.randn(1, 1, 12, 8).double(), torch.tensor([3])).dtype == torch.float64
    assert model.bfloat16()(torch.randn(1, 1, 8, 8).bfloat16(), torch.tensor([3])).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 8, 8)}, r"x: expected \[N, 1, H, W\]"),
        ({"x": torch.zeros(2, 1, 8, 7)}, "multiples of 2"),
        ({"timesteps": torch.zeros(3)}, r"timesteps: expected a tensor \[2\]"),
        ({"timesteps": 3}, "timesteps: .* got int"),
        ({"labels": torch.zeros(2)}, r"labels: expected a tensor of integers \[2\], got torch.float32"),
        ({"labels": torch.zeros(1, dtype=torch.int64)}, "labels: "),
        ({"labels": [1, 2]}, "labels: .* got list"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"x": torch.zeros(2, 1, 8, 8), "timesteps": torch.zeros(2), "labels": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match=message):
        DigitsUNet()(**(arguments | change))


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_saving_and_loading(model, tmp_path):
    path = tmp_path / "m.safetensors"
    save_digits(model, path, notes={"minutes": 3})
    loaded = load_digits(path)
    x, times = torch.randn(1, 1, 8, 8), torch.tensor([9])
    assert torch.equal(loaded(x, times), model(x, times)) and not loaded.training
    assert loaded.config == model.config and read_notes(path) == {"minutes": 3}
    save_digits(model, path, dtype=torch.float16)
    assert load_file(path)["conv_in.weight"].dtype == torch.float16
    assert next(load_digits(path).parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, meta: state.pop("conv_in.weight"), "do not fit .* Missing key"),
        (lambda state, meta: state["conv_in.weight"].fill_(math.inf), "not finite"),
        (lambda state, meta: meta.update(format="another"), "do not say that it is a pydenoise digits"),
        (lambda state, meta: meta.update(config='{"base": 33}'), "do not fit .* multiple of 32"),
        (lambda state, meta: meta.pop("config"), "do not fit .*config"),
    ],
)
def test_other_files_are_refused(model, tmp_path, change, message):
    path = tmp_path / "m.safetensors"
    save_digits(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    change(state, metadata)
    save_file(state, path, metadata)
    with pytest.raises(WeightsError, match=message):
        load_digits(path)


# ------------------------------------------------------------------------------------------------------------ quality


def test_nearest_class_by_its_definition():
    real = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])[:, None]
    labels = torch.tensor([3, 3, 5, 5, 5])
    images = torch.tensor([0.4, 5.0, 11.0])[:, None]
    assert nearest_class(images, real, labels, 1).tolist() == [3, 3, 5]
    assert nearest_class(images, real, labels, 3).tolist() == [3, 3, 5]
    assert nearest_class(images, real, labels, 5).tolist() == [5, 5, 5]  # the majority, wherever it is
    assert nearest_class(torch.tensor([[5.9], [5.1]]), real, labels, 4).tolist() == [
        5,
        3,
    ]  # two against two: the nearer
    assert class_agreement(images, torch.tensor([5, 3, 5]), real, labels) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="neighbours: expected 1 to 5, got 6"):
        nearest_class(images, real, labels, 6)
    with pytest.raises(ValueError, match=r"images: expected images of the shape \[1\]"):
        nearest_class(images[:, :, None], real, labels)


def test_rms_distance():
    assert rms_distance(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0])) == pytest.approx(2**0.5)


def test_real_digits_know_their_class():
    pytest.importorskip("sklearn")
    images, labels = real_digits()
    assert images.shape == (1797, 1, 8, 8) and images.min() == -1 and images.max() == 1
    tested = torch.arange(len(images)) % 8 == 0
    assert class_agreement(images[tested], labels[tested], images[~tested], labels[~tested]) > 0.97
    noise = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert class_agreement(noise, labels[:200], images, labels) < 0.3


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install pydenoise\[demo\]"):
        real_digits()


# -------------------------------------------------------------------------------------------------------- the shipped


def test_the_shipped_model_sees_noise_and_classes():
    """Its error grows when it is told another class, and without a class lies between."""
    pytest.importorskip("sklearn")
    model, (images, labels) = load_digits(), real_digits()
    assert SHIPPED.stat().st_size < 5e6 and sum(weight.numel() for weight in model.parameters()) < 1.08e6
    images, labels = images[::9], labels[::9]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    kept = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0).float()
    with torch.inference_mode():
        for time, bound in ((100, 0.25), (500, 0.05)):
            noisy = kept[time].sqrt() * images + (1 - kept[time]).sqrt() * noise
            own, other, none = (
                (model(noisy, torch.tensor(time), told) - noise).square().mean().item()
                for told in (labels, (labels + 1) % 10, None)
            )
            assert own < bound and own < none < other


def test_the_shipped_model_says_how_it_was_made():
    notes = read_notes()
    assert notes["command"].startswith("python examples/train_digits.py")
    assert {"arguments", "minutes", "loss", "data", "schedule", "versions"} <= set(notes)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("int8", 0.02)])
def test_the_shipped_model_accelerated_samples_the_same(precision, bound):
    import pydenoise as pdn

    model, labels = load_digits(), torch.arange(10)
    example = (torch.randn(10, 1, 8, 8), torch.full((10,), 500), labels)
    network, report = pdn.accelerate(model, example, precision, measure=False)
    assert "conv_in" in str(report)
    schedule, solver = pdn.samplers.NoiseSchedule.linear(), pdn.samplers.DPMSolverPP(2)
    floats, others = (
        pdn.samplers.Sampler(denoiser, schedule, solver, 10).sample(
            shape=(10, 1, 8, 8), seed=0, conditioning={"labels": labels}
        )
        for denoiser in (model, network)
    )
    assert rms_distance(floats, others) < bound
