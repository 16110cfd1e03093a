"""The diffusion U-Net and the terrain network: blocks, preconditioning, sampling, and the published weights."""

import dataclasses
import math

import pytest
import torch
from torch import fx

from pydenoise.models import DiffusionUNet, TerrainDenoiser, WeightsError, terrain
from pydenoise.models.onnx_weights import read_onnx
from pydenoise.models.terrain import consistency_sample, to_heights
from pydenoise.models.unet import Attention, ResBlock
from pydenoise.models.weights import find_terrain


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return DiffusionUNet(2, 32, (1, 2), blocks=1, attention_levels=(1,)).double().eval()


@pytest.fixture(scope="module")
def file():
    try:
        return find_terrain()
    except WeightsError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def published(file):
    return TerrainDenoiser.from_onnx(file)


# ------------------------------------------------------------------------------------------------------------ blocks


def test_concat_is_a_concatenation():
    block = ResBlock(96, 32, 16).eval()
    x, more, embedding = torch.randn(2, 64, 5, 6), torch.randn(2, 32, 5, 6), torch.randn(2, 16)
    expected = block(torch.cat((x, more), dim=1), embedding)
    assert torch.equal(block(x, embedding, more), expected)


def test_the_embedding_scales_and_shifts_the_second_norm():
    """A scale of -1 leaves the shift alone: the result forgets the input, apart from the skip connection."""
    block = ResBlock(32, 32, 4).eval()
    with torch.no_grad():
        block.film.weight.zero_()
        block.film.bias.copy_(torch.cat((torch.full((32,), -1.0), torch.full((32,), 0.7))))
    x = torch.randn(1, 32, 6, 6)
    constant = torch.nn.functional.silu(torch.full((1, 32, 6, 6), 0.7))
    torch.testing.assert_close(block(x, torch.zeros(1, 4)) - x, block.conv2(constant))


@pytest.mark.parametrize(("resample", "factor"), [(torch.nn.AvgPool2d(2), 0.5), (torch.nn.Upsample(scale_factor=2), 2)])
def test_blocks_change_the_resolution(resample, factor):
    block = ResBlock(32, 64, 4, resample)
    assert block(torch.randn(1, 32, 4, 6), torch.randn(1, 4)).shape == (1, 64, 4 * factor, 6 * factor)


def test_attention_by_its_definition():
    attention = Attention(64).double()
    x = torch.randn(2, 64, 3, 5, dtype=torch.float64)
    q, k, v = attention.qkv(attention.norm(x)).reshape(2, 3, 2, 32, 15).unbind(1)
    weights = torch.einsum("nhct,nhcs->nhts", q, k).div(math.sqrt(32)).softmax(-1)
    mixed = torch.einsum("nhts,nhcs->nhct", weights, v).reshape(2, 64, 3, 5)
    torch.testing.assert_close(attention(x), x + attention.proj(mixed))


def test_every_input_matters_and_images_of_a_batch_do_not_mix(unet):
    x, times = torch.randn(2, 2, 4, 6, dtype=torch.float64), torch.tensor([3.0, 500.0], dtype=torch.float64)
    condition = torch.tensor([0.1, 0.9], dtype=torch.float64)
    both = unet(x, times, condition)
    assert both.shape == x.shape
    torch.testing.assert_close(unet(x[1:], times[1:], condition[1:]), both[1:])
    for changed in ((x, times + 1, condition), (x, times, condition + 0.1), (x + 0.1 * x.square(), times, condition)):
        assert (unet(*changed) - both).abs().amax((1, 2, 3)).min() > 1e-6


def test_tracing(unet):
    args = torch.randn(1, 2, 4, 4), torch.tensor([7.0]), torch.tensor([0.5])
    args = tuple(value.double() for value in args)
    assert torch.equal(fx.symbolic_trace(unet)(*args), unet(*args))


def test_constructor_argument():
    with pytest.raises(ValueError, match="base: expected a multiple of 32, got 48"):
        DiffusionUNet(base=48)


# ---------------------------------------------------------------------------------------------------------- sampling


def test_sampling_is_the_algorithm_of_the_paper():
    calls = []

    def model(x, sigma, condition):
        calls.append((x, sigma, condition))
        return torch.full_like(x, len(calls))

    noise = torch.randn(3, 2, 1, 4, 4)
    condition = torch.tensor([0.0, 1.0])
    result = consistency_sample(model, (80, 2, 0.1), noise=noise, condition=condition)
    assert result.unique().tolist() == [3]
    assert [sigma.tolist() for _, sigma, _ in calls] == [[80, 80], [2, 2], pytest.approx([0.1, 0.1])]
    assert all(passed is condition for _, _, passed in calls)
    torch.testing.assert_close(calls[0][0], 80 * noise[0])
    torch.testing.assert_close(calls[1][0], 1 + math.sqrt(2**2 - 0.002**2) * noise[1])
    torch.testing.assert_close(calls[2][0], 2 + math.sqrt(0.1**2 - 0.002**2) * noise[2])


@pytest.mark.parametrize("sigmas", [(), (10, 10), (1, 2), (81,), (1, 0.002), (math.nan,)])
def test_bad_sigmas(sigmas):
    with pytest.raises(ValueError, match="sigmas: expected falling levels"):
        consistency_sample(None, sigmas, noise=torch.zeros(len(sigmas), 1, 1, 4, 4), condition=torch.zeros(1))


@pytest.mark.parametrize("shape", [(2, 1, 1, 4, 4), (1, 1, 4, 4)])
def test_bad_noise(shape):
    with pytest.raises(ValueError, match=r"noise: expected \[1, N, 1, H, W\]"):
        consistency_sample(None, (80,), noise=torch.zeros(shape), condition=torch.zeros(1))


def test_heights():
    heights = to_heights(torch.tensor([-1.5, -1.0, 0.0, 1.0], dtype=torch.float64))
    expected = [0, 0, 0.1 * math.sinh(math.asinh(221.6864013671875) / 2), 22.16864013671875]
    torch.testing.assert_close(heights, torch.tensor(expected, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------- published weights


def test_published_network_gives_what_onnxruntime_gave(published):
    """Every 32nd value of the picture that onnxruntime 1.31.1 made of the same file, rounded to six digits."""
    expected = [
        [-0.014443, -0.061338, -0.137075, -0.265688],
        [-0.010541, 0.028715, -0.144427, -0.184909],
        [0.021797, -0.049057, -0.109462, -0.192439],
        [0.101465, 0.012979, -0.108968, -0.167479],
    ]
    noisy = 10 * torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        result = published(noisy, torch.tensor([10.0]), torch.tensor([0.5]))
    torch.testing.assert_close(result[0, 0, 16::32, 16::32], torch.tensor(expected), rtol=0, atol=2e-5)


def test_published_network_is_the_one_that_onnxruntime_runs(file, published):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for level, difficulty in ((80.0, 0.2), (0.05, 0.9)):
        noisy = level * torch.randn(1, 1, 128, 128, generator=generator)
        sigma, condition = torch.tensor([level]), torch.tensor([difficulty])
        feeds = {"noisy": noisy.numpy(), "sigma": sigma.numpy(), "difficulty": condition.numpy()}
        theirs = torch.from_numpy(session.run(["denoised"], feeds)[0])
        with torch.inference_mode():
            ours = published(noisy, sigma, condition)
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_published_network_makes_a_landscape(published):
    """Smooth (neighbours differ far less than the picture does), not flat, and the same for the same noise."""
    noise = torch.randn(2, 1, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    first, again = (consistency_sample(published, (80, 1), noise=noise, condition=torch.ones(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.abs().max() <= 1
    assert first.std() > 0.1
    assert (first[..., 1:] - first[..., :-1]).std() < 0.3 * first.std()


def test_at_the_least_noise_the_input_comes_back(published):
    x = torch.rand(1, 1, 32, 48) * 2 - 1
    with torch.inference_mode():
        assert torch.equal(published(x, torch.tensor([0.002]), torch.zeros(1)), x)


def test_published_sizes(published):
    assert sum(parameter.numel() for parameter in published.parameters()) == 10_456_545
    assert sum(isinstance(module, Attention) for module in published.modules()) == 28
    assert not published.training


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"noisy": torch.zeros(1, 32, 32)}, ValueError, r"noisy: expected \[N, 1, H, W\]"),
        ({"noisy": torch.zeros(1, 2, 32, 32)}, ValueError, r"noisy: expected \[N, 1, H, W\]"),
        ({"noisy": torch.zeros(1, 1, 32, 40)}, ValueError, "multiples of 16"),
        ({"sigma": 0.5}, TypeError, "sigma: expected a tensor"),
        ({"sigma": torch.ones(())}, ValueError, r"sigma: expected the shape \[1\]"),
        ({"condition": torch.ones(2)}, ValueError, r"condition: expected the shape \[1\]"),
    ],
)
def test_bad_arguments(change, error, message):
    args = {"noisy": torch.zeros(1, 1, 32, 32), "sigma": torch.ones(1), "condition": torch.ones(1)} | change
    with pytest.raises(error, match=message), torch.device("meta"):
        TerrainDenoiser()(**args)


def _without(weights, name):
    return {"initializers": {key: value for key, value in weights.initializers.items() if key != name}}


def _with(weights, name, value):
    return {"initializers": weights.initializers | {name: value}}


CONV = "model.input_blocks.3.0.in_layers.2.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: _without(w, CONV),
            rf"the initialiser {CONV} is missing \(it belongs to encoder.2.block.conv1.weight\)",
        ),
        (lambda w: {"nodes": w.nodes[:-20]}, "the initialiser model.out.0.weight is missing"),
        (lambda w: _with(w, CONV, w.initializers[CONV][:, :4]), rf"{CONV} has the shape \[32, 4, 3, 3\]"),
        (lambda w: _with(w, CONV, w.initializers[CONV] * math.inf), f"{CONV} holds values that are not finite"),
        (lambda w: {"metadata": w.metadata | {"training": "endpoint-distillation"}}, "0.4.2 holds other weights"),
        (lambda w: {"metadata": {}}, "training=None"),
    ],
)
def test_other_files_are_refused(file, monkeypatch, change, message):
    weights = read_onnx(file)
    changed = dataclasses.replace(weights, **change(weights))
    monkeypatch.setattr(terrain, "read_onnx", lambda path: changed)
    with pytest.raises(WeightsError, match=message):
        TerrainDenoiser.from_onnx("some.onnx")


def test_weights_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("PYDENOISE_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="pydenoise weights terrain"):
        find_terrain()
