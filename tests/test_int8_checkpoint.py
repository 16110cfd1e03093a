"""``save_quantized`` and ``load_quantized``: the same outputs bit for bit, and checkpoints that do not fit."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import pydenoise as pdn
from pydenoise.models import DiffusionUNet, DnCNN, FFDNet
from pydenoise.quantization import Scheme
from pydenoise.surgery.int8_graph import Int8GraphModule


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # tiny tensors


def unet(width=32, **options):
    diffusers = pytest.importorskip("diffusers")
    settings = dict(
        sample_size=16, in_channels=3, out_channels=3, norm_num_groups=8, block_out_channels=(width, 48),
        layers_per_block=1, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return diffusers.UNet2DModel(**{**settings, **options})


def conditional():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(
        sample_size=8, norm_num_groups=8, block_out_channels=(32, 48), layers_per_block=1, attention_head_dim=4,
        cross_attention_dim=24, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), use_linear_projection=True,
    )  # fmt: skip


def autoencoder():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 48), layers_per_block=1, norm_num_groups=8,
    )  # fmt: skip


class Plain(nn.Module):
    """Batch norms, a residual, a convolution that is called twice, a buffer that is not saved, and a timestep."""

    def __init__(self, width=16):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU())
        self.twice = nn.Conv2d(width, width, 3, padding=1)
        self.register_buffer("gain", torch.linspace(0.5, 1.5, width).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, x, timestep):
        h = self.first(x * (1 + timestep / 500)[:, None, None, None])
        h = torch.relu(self.twice(torch.relu(self.twice(self.body(h))))) * self.gain + h
        return self.last(h)


def batches(shape=(1, 3, 12, 12), timesteps=(50, 350, 650, 950)):
    return [(torch.randn(shape), torch.tensor([float(t)])) for t in timesteps]


PER_TIMESTEP = Scheme("per_timestep", buckets=4, smooth=0.5)
UNET_ARGS = (torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16), torch.tensor([500]))
FFDNET_ARGS = (torch.linspace(0, 1, 768).reshape(1, 3, 16, 16), torch.full((1, 1, 1, 1), 0.1))
CASES = {
    "unet": (unet, UNET_ARGS, {}),
    "unet per timestep": (unet, UNET_ARGS, dict(calibration=batches((1, 3, 16, 16)), scheme=PER_TIMESTEP)),
    "unet with kept parts": (
        unet, UNET_ARGS, dict(calibration=batches((1, 3, 16, 16)), keep=["up_blocks.0", "*.resnets.0.conv1"])),
    "unet inplace": (unet, UNET_ARGS, dict(inplace=True)),
    "conditional": (conditional, (torch.randn(2, 4, 8, 8), torch.tensor(9), torch.randn(2, 5, 24)), {}),
    "autoencoder": (autoencoder, (torch.randn(1, 3, 16, 16),), {}),
    "ours": (lambda: DiffusionUNet(base=32, multipliers=(1, 2), blocks=1, attention_levels=(1,)),
             (torch.randn(1, 1, 16, 16), torch.tensor([9.0]), torch.tensor([0.5])), {}),
    "dncnn": (DnCNN, (torch.randn(1, 1, 16, 16),), {}),
    "dncnn smoothed": (DnCNN, (torch.randn(1, 1, 16, 16),),
                       dict(calibration=[torch.randn(1, 1, 16, 16)], scheme="per_tensor")),
    "ffdnet": (FFDNet, FFDNET_ARGS, dict(calibration=[FFDNET_ARGS])),
    "ffdnet by modules": (FFDNet, FFDNET_ARGS, dict(calibration=[FFDNET_ARGS], inplace=True)),
    "plain": (Plain, batches()[0], {}),
    "plain per timestep": (Plain, batches()[0], dict(calibration=batches(), scheme=PER_TIMESTEP)),
    "a convolution": (lambda: nn.Conv2d(3, 16, 3), (torch.randn(1, 3, 8, 8),), {}),
}  # fmt: skip


@torch.no_grad()
def output(model, args):
    result = model(*args)
    return result if isinstance(result, torch.Tensor) else result.sample


def accelerated(make, args, **options):
    torch.manual_seed(0)
    return pdn.accelerate(make().eval(), args, precision="int8", measure=False, **options)[0]


@pytest.mark.parametrize(("make", "args", "options"), CASES.values(), ids=CASES)
def test_round_trip(make, args, options, tmp_path):
    int8, path = accelerated(make, args, **options), tmp_path / "model.safetensors"
    pdn.save_quantized(int8, path)
    expected = output(int8, args)
    with torch.device("meta"):
        empty = make()
    for architecture in (make(), empty):
        before = [(name, value.clone()) for name, value in architecture.state_dict().items()]
        loaded = pdn.load_quantized(architecture, path)
        assert torch.equal(output(loaded, args), expected)
        assert type(loaded).__name__ == type(int8).__name__ and not loaded.training
        assert ("forward" in loaded.__dict__) == ("forward" in int8.__dict__)
        assert all(value.is_meta or torch.equal(value, architecture.state_dict()[name]) for name, value in before)
    assert torch.equal(output(pdn.load_quantized(make(), path, record=False), args), expected)
    other = tuple(torch.cat([arg, arg]) if arg.dim() else arg for arg in args)
    assert torch.equal(output(loaded, other), output(int8, other)), "another batch"
    pdn.save_quantized(loaded, tmp_path / "again.safetensors")
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(path).keys()
    assert torch.equal(output(pdn.load_quantized(make(), tmp_path / "again.safetensors"), args), expected)


def test_timesteps_switch_scales_after_loading(tmp_path):
    int8 = accelerated(Plain, batches()[0], calibration=batches(), scheme=PER_TIMESTEP)
    pdn.save_quantized(int8, tmp_path / "m.safetensors")
    loaded = pdn.load_quantized(Plain(), tmp_path / "m.safetensors")
    for args in batches():
        assert torch.equal(output(loaded, args), output(int8, args))
    assert len({output(loaded, (batches()[0][0] * 0 + 1, t)).sum().item() for _, t in batches()}) == 4
    assert len(loaded.timestep_scales.timesteps) == 4


def test_the_file_is_small_and_says_what_it_is(tmp_path):
    model = DnCNN()
    path = tmp_path / "m.safetensors"
    pdn.save_quantized(accelerated(DnCNN, (torch.randn(1, 1, 16, 16),)), path)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert path.stat().st_size < 1.3 * size
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
        recipe = json.loads(about["recipe"])
    assert about["format"] == "pydenoise.int8" and about["pydenoise"] == pdn.__version__
    assert recipe["model"] == "DnCNN" and recipe["mode"] == "graph" and len(recipe["schemes"]) == 15


def test_half_precision_and_copies(tmp_path):
    args = (UNET_ARGS[0].bfloat16(), UNET_ARGS[1])
    int8 = accelerated(lambda: unet().bfloat16(), args)
    pdn.save_quantized(copy.deepcopy(int8), tmp_path / "m.safetensors")
    loaded = pdn.load_quantized(unet(), tmp_path / "m.safetensors")  # an architecture in float32
    assert loaded.dtype == torch.bfloat16 and torch.equal(output(loaded, args), output(int8, args))
    graph = accelerated(DnCNN, (torch.randn(1, 1, 16, 16),))
    pdn.save_quantized(copy.deepcopy(graph), tmp_path / "g.safetensors")
    loaded = pdn.load_quantized(DnCNN(), tmp_path / "g.safetensors")
    assert isinstance(loaded, Int8GraphModule)
    x = (torch.randn(1, 1, 9, 9),)
    assert torch.equal(output(loaded, x), output(graph, x))


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "m.safetensors"
    pdn.save_quantized(accelerated(Plain, batches()[0]), path)
    return path


def rewritten(path, change=lambda tensors, metadata: None):
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        pdn.save_quantized({}, tmp_path / "m")
    fp32, _ = pdn.accelerate(DnCNN().eval(), torch.randn(1, 1, 8, 8), measure=False)
    for model in (DnCNN(), fp32):
        with pytest.raises(ValueError, match='model: expected what pydenoise.accelerate.*precision="int8"'):
            pdn.save_quantized(model, tmp_path / "m")


def test_files_that_are_no_checkpoint(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        pdn.load_quantized(Plain(), tmp_path / "nothing.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        pdn.load_quantized(Plain(), tmp_path / "text")
    save_file(Plain().state_dict(), tmp_path / "float.safetensors")
    with pytest.raises(ValueError, match="not an int8 model of pydenoise"):
        pdn.load_quantized(Plain(), tmp_path / "float.safetensors")
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        pdn.load_quantized(Plain(), saved)


def test_another_version(saved):
    rewritten(saved, lambda tensors, metadata: metadata.update(format_version="7", pydenoise="9.1"))
    with pytest.raises(ValueError, match="of format version 7, written by pydenoise 9.1; this .* reads version 1"):
        pdn.load_quantized(Plain(), saved)


def test_another_model(saved, tmp_path):
    with pytest.raises(TypeError, match="architecture: expected a torch.nn.Module"):
        pdn.load_quantized({}, saved)
    with pytest.raises(ValueError, match=r"is of another model \(Plain\): this one is a DnCNN"):
        pdn.load_quantized(DnCNN(), saved)
    with pytest.raises(ValueError, match=r"is of another model \(Plain\)"):
        pdn.load_quantized(Plain(24), saved)
    with pytest.raises(ValueError, match="architecture: is an int8 model already"):
        pdn.load_quantized(pdn.load_quantized(Plain(), saved), saved)
    pdn.save_quantized(accelerated(unet, UNET_ARGS), tmp_path / "u.safetensors")
    for options, named in ((dict(width=40), "conv_shortcut"), (dict(layers_per_block=2), "resnets.1"), (
        dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2), "attentions",
    )):  # fmt: skip
        with pytest.raises(ValueError, match=rf"is of another model \(UNet2DModel\).*{named}"):
            pdn.load_quantized(unet(**options), tmp_path / "u.safetensors")


def test_damaged_numbers_and_names(saved, tmp_path):
    original = saved.read_bytes()

    def wrong_scale(tensors, metadata):
        tensors["body.0.weight_scale"][0] = -1

    def lacks(tensors, metadata):
        del tensors["twice.weight"]

    def lacks_buffer(tensors, metadata):
        del tensors["gain"]

    def more(tensors, metadata):
        tensors["extra"] = torch.zeros(1)

    def recipe(tensors, metadata):
        metadata["recipe"] = "{}"

    for change, message in ((wrong_scale, "body.0.weight_scale"), (lacks, "twice.weight"), (lacks_buffer, "gain"),
                            (more, "extra"), (recipe, "damaged")):  # fmt: skip
        saved.write_bytes(original)
        rewritten(saved, change)
        with pytest.raises(ValueError, match=message):
            pdn.load_quantized(Plain(), saved)


def test_tensors_that_a_file_cannot_fill(saved):
    with torch.device("meta"):
        architecture = Plain()
        architecture.constant = torch.ones(3)
    with pytest.raises(ValueError, match="architecture: constant is a tensor on the meta device"):
        pdn.load_quantized(architecture, saved)
