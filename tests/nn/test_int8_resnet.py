"""Int8ResnetBlock: against diffusers', OpenAI's and our own float blocks."""

import pytest
import torch
from torch import nn

from pydenoise.models.unet import ResBlock
from pydenoise.nn import FusedConv2d, Int8Conv2d, Int8ResnetBlock, ResnetSpec
from pydenoise.quantization import LayerStatistics, Scheme, snr_db
from pydenoise.quantization.plan import plan_layer

resnet = pytest.importorskip("diffusers.models.resnet")

CASES = {
    "default": dict(),
    "shortcut": dict(out_channels=40),
    "scale_shift": dict(time_embedding_norm="scale_shift", out_channels=40),
    "rescaled": dict(output_scale_factor=2**0.5, out_channels=40),
    "rescaled, no shortcut": dict(output_scale_factor=2.0),
    "no embedding": dict(temb_channels=None),
    "embedding as it is": dict(skip_time_act=True),
    "gelu": dict(non_linearity="gelu"),
    "up": dict(up=True, out_channels=40),
    "up, no shortcut": dict(up=True, kernel="sde_vp"),
    "down": dict(down=True, out_channels=40),
    "down, no shortcut": dict(down=True, kernel="sde_vp"),
    "3x3 shortcut channels": dict(conv_2d_out_channels=24),
}


def randomized(block):
    """Norms and biases other than ones and zeros."""
    for parameter in block.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    return block.eval().requires_grad_(False)


def make(seed=0, **options):
    torch.manual_seed(seed)
    return randomized(resnet.ResnetBlock2D(in_channels=32, groups=8, **{"temb_channels": 20, **options}))


def inputs(batch=2, size=(6, 10), seed=1):
    torch.manual_seed(seed)
    return torch.randn(batch, 32, *size), torch.randn(batch, 20)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@torch.no_grad()
def test_against_diffusers(options):
    block = make(**options)
    int8 = Int8ResnetBlock.from_float(block)
    whole = Int8ResnetBlock.from_float(block, shortcut="plans")
    for batch, size in ((2, (6, 10)), (1, (7, 5)), (0, (4, 4)), (2, (6, 10))):
        x, temb = inputs(batch, size)
        temb = temb if block.time_emb_proj is not None else None
        y = int8(x, temb)
        assert y.is_contiguous(memory_format=torch.channels_last)
        expected = block(x, temb) if batch else y
        assert y.shape == expected.shape
        if batch:
            assert snr_db(expected, y) > 36 and snr_db(expected, whole(x, temb)) > 36
            half = int8(x.bfloat16(), temb)
            assert half.dtype == torch.bfloat16 and snr_db(expected, half) > 30


@pytest.mark.parametrize("shortcut", ["float", "plans"])
@pytest.mark.parametrize("options", [CASES["scale_shift"], CASES["default"], CASES["up"], CASES["down"]])
@torch.no_grad()
def test_skip_connection(options, shortcut):
    """A skip connection read where it lies gives what the concatenated input gives; a group of the norm spans both."""
    block = make(**options)
    int8 = Int8ResnetBlock.from_float(block, skip_channels=13, shortcut=shortcut)
    x, temb = inputs()
    y = int8(x[:, :19].contiguous(), temb, x[:, 19:].contiguous(memory_format=torch.channels_last))
    assert snr_db(block(x, temb), y) > 36
    assert torch.equal(y, int8(x, temb))


@torch.no_grad()
def test_shortcut_dtype_and_float_layers():
    block, (x, temb) = make(out_channels=40), inputs()
    int8 = Int8ResnetBlock.from_float(block, shortcut_dtype=torch.bfloat16)
    assert int8.conv_shortcut.weight.dtype == torch.bfloat16
    assert snr_db(block(x, temb), int8(x, temb)) > 36
    mixed = Int8ResnetBlock.from_float(block, {"conv1": "float", "conv2": "per_pixel"})
    assert isinstance(mixed.conv1, FusedConv2d) and isinstance(mixed.conv2, Int8Conv2d)
    assert snr_db(block(x, temb), mixed(x, temb)) > 40
    all_float = Int8ResnetBlock.from_float(make(**CASES["scale_shift"], output_scale_factor=2.0), "float")
    exact = make(**CASES["scale_shift"], output_scale_factor=2.0)
    assert snr_db(exact(x, temb), all_float(x, temb)) > 100


@torch.no_grad()
def test_calibrated_plans():
    block, (x, temb) = make(out_channels=40), inputs()
    seen = {}
    for name in ("conv1", "conv2", "conv_shortcut"):
        getattr(block, name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    expected = block(x, temb)

    def plan(request):
        statistics = LayerStatistics.of("layer", getattr(block, request.names[0]), 1, 1 << 16, 0)
        statistics.observe(seen[request.names[0]], torch.zeros(1, dtype=torch.int64))
        if request.channels is not None:
            statistics = statistics.slice_channels(*request.channels)
        return plan_layer(request.layer, statistics, Scheme("per_tensor", smooth=0.5, bias_correction=True))

    int8 = Int8ResnetBlock.from_float(block, plan, shortcut="plans", skip_channels=13)
    assert int8.conv_shortcut.input_scale != int8.conv_shortcut_skip.input_scale
    assert snr_db(expected, int8(x, temb)) > 30


@torch.no_grad()
def test_projected_embedding():
    int8, (x, temb) = Int8ResnetBlock.from_float(make()), inputs()
    assert torch.equal(int8(x, temb), int8(x, embedding=int8.project(temb)))


@pytest.mark.parametrize("resample", [None, nn.AvgPool2d(2), nn.Upsample(scale_factor=2)], ids=["none", "down", "up"])
@torch.no_grad()
def test_own_block(resample):
    block = randomized(ResBlock(64, 32, 20, resample))
    x, embedding = torch.randn(2, 64, 6, 4), torch.randn(2, 20)
    int8 = Int8ResnetBlock.from_float(block, skip_channels=24)
    y = int8(x[:, :40], embedding, x[:, 40:])
    assert snr_db(block(x, embedding), y) > 36


class OpenAIBlock(nn.Module):
    """The structure of guided-diffusion's ResBlock."""

    def __init__(self, film):
        super().__init__()
        self.updown, self.use_scale_shift_norm = False, film
        self.in_layers = nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 40, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(20, 80 if film else 40))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(8, 40), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(40, 40, 3, padding=1)
        )
        self.skip_connection = nn.Conv2d(32, 40, 1)

    def forward(self, x, emb):
        h, emb = self.in_layers(x), self.emb_layers(emb)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


@pytest.mark.parametrize("film", [False, True])
@torch.no_grad()
def test_openai_block(film):
    block, (x, emb) = randomized(OpenAIBlock(film)), inputs()
    int8 = Int8ResnetBlock.from_float(block, {"in_layers.2": "per_pixel", "out_layers.3": "per_pixel"})
    assert snr_db(block(x, emb), int8(x, emb)) > 36


@torch.no_grad()
def test_edm_style_by_spec():
    """EDM: FiLM, no activation of the embedding, the sum times sqrt(1/2)."""
    parts = randomized(
        nn.ModuleDict(
            dict(
                norm1=nn.GroupNorm(8, 32), conv1=nn.Conv2d(32, 40, 3, padding=1), norm2=nn.GroupNorm(8, 40),
                conv2=nn.Conv2d(40, 40, 3, padding=1), embedding=nn.Linear(20, 80), shortcut=nn.Conv2d(32, 40, 1),
            )
        )
    )  # fmt: skip
    spec = ResnetSpec(**parts, embedding_activation="none", film=True, gain=0.5**0.5)
    x, emb = inputs()
    scale, shift = parts["embedding"](emb)[:, :, None, None].chunk(2, 1)
    h = parts["conv1"](nn.functional.silu(parts["norm1"](x)))
    h = parts["conv2"](nn.functional.silu(parts["norm2"](h) * (1 + scale) + shift))
    expected = (parts["shortcut"](x) + h) * 0.5**0.5
    assert snr_db(expected, Int8ResnetBlock.from_float(spec)(x, emb)) > 36


@pytest.mark.parametrize("options", [CASES["scale_shift"], CASES["up"]])
def test_copies_and_checkpoints(stands, on_meta, options):
    block, (x, temb) = make(**options), inputs()
    int8 = Int8ResnetBlock.from_float(block, skip_channels=13, shortcut="plans")
    stands(
        int8, lambda: Int8ResnetBlock.from_float(on_meta(block), skip_channels=13, shortcut="plans"),
        x[:, :19], temb, x[:, 19:],
    )  # fmt: skip


def test_errors():
    x, temb = inputs()
    int8 = Int8ResnetBlock.from_float(make(), skip_channels=13)
    for args, word in (
        ((x[:, :7], temb), "hidden_states"),
        ((x[0], temb), "hidden_states"),
        ((x[:, :19], temb, x[:, :5]), "skip"),
        ((x[:, :19], temb, x[:, 19:, 1:]), "skip"),
        ((x,), "temb"),
        ((x, temb[:, :3]), r"temb: expected \[2, 20\]"),
        ((x, temb[:1]), r"temb: expected \[2, 20\]"),
    ):
        with pytest.raises(ValueError, match=word):
            int8(*args)
    with pytest.raises(TypeError, match="hidden_states: expected float32"):
        int8(x.double(), temb)
    with pytest.raises(ValueError, match=r"embedding: expected \[2, 32\]"):
        int8(x, embedding=temb)
    with pytest.raises(ValueError, match="without skip_channels"):
        Int8ResnetBlock.from_float(make())(x, temb, x)
    with pytest.raises(TypeError, match="block: expected diffusers"):
        Int8ResnetBlock.from_float(nn.ReLU())
    with pytest.raises(ValueError, match="skip_channels"):
        Int8ResnetBlock.from_float(make(), skip_channels=32)
    with pytest.raises(ValueError, match="no entry for layer 'conv2'"):
        Int8ResnetBlock.from_float(make(), {"conv1": "per_pixel"})
    with pytest.raises(ValueError, match="conv1: norms compute affine codes"):
        Int8ResnetBlock.from_float(make(), Scheme("per_pixel", symmetric=True))
    with pytest.raises(ValueError, match="upsample"):
        Int8ResnetBlock.from_float(make(up=True, kernel="fir"))
    with pytest.raises(ValueError, match="nonlinearity"):
        Int8ResnetBlock.from_float(make(non_linearity="mish"))


@torch.no_grad()
def test_compile_and_export():
    int8, (x, temb) = Int8ResnetBlock.from_float(make(**CASES["scale_shift"]), skip_channels=13), inputs()
    args = (x[:, :19].contiguous(), temb, x[:, 19:].contiguous())
    assert torch.equal(torch.compile(int8, backend="eager", fullgraph=True)(*args), int8(*args))
    assert torch.equal(torch.export.export(int8, args).module()(*args), int8(*args))
