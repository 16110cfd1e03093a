"""``accelerate(..., precision="int8")``: networks against their float selves, reports, copies, pipelines, refusals."""

import copy
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pydenoise as pdn
from pydenoise import recording
from pydenoise.models import CUNet, DiffusionUNet, DnCNN, FFDNet, TerrainDenoiser, WeightsError, load_ffdnet, weights
from pydenoise.nn import FusedConv2d, Int8Conv2d, Int8Linear, Int8ResnetBlock
from pydenoise.quantization import Calibration, Scheme, TimestepBuckets, calibrate, snr_db
from pydenoise.surgery.int8_graph import Int8GraphModule
from pydenoise.surgery.up_blocks import ConcatFreeUpBlock

RECORDS = recording.unavailable() is None


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # tiny tensors


# ---------------------------------------------------------------------------------------------------- networks


def diffusers_unet(**options):
    diffusers = pytest.importorskip("diffusers")
    settings = dict(
        sample_size=16, in_channels=3, out_channels=3, norm_num_groups=8, block_out_channels=(32, 48),
        layers_per_block=1, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**{**settings, **options}).eval()


def conditional_unet(**options):
    diffusers = pytest.importorskip("diffusers")
    settings = dict(
        sample_size=8, in_channels=4, out_channels=4, norm_num_groups=8, block_out_channels=(32, 48),
        layers_per_block=1, attention_head_dim=4, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**{**settings, **options}).eval()


def autoencoder(**options):
    diffusers = pytest.importorskip("diffusers")
    settings = dict(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 48), layers_per_block=1, norm_num_groups=8, latent_channels=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**{**settings, **options}).eval()


class TimeUNet(nn.Module):
    """A U-Net written by hand, of the residual blocks that OpenAI's code made common."""

    class ResBlock(nn.Module):
        def __init__(self, inputs, outputs, embedding=16):
            super().__init__()
            self.in_layers = nn.Sequential(nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
            self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs))
            self.out_layers = nn.Sequential(
                nn.GroupNorm(8, outputs), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(outputs, outputs, 3, padding=1)
            )
            self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
            self.updown, self.use_scale_shift_norm = False, False

        def forward(self, x, emb):
            h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
            return self.skip_connection(x) + self.out_layers(h)

    def __init__(self, width=24):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.down, self.halve = self.ResBlock(width, width), nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.middle, self.up = self.ResBlock(width, 2 * width), self.ResBlock(3 * width, width)

    def forward(self, x, t):
        angles = t[:, None] / 1000 * torch.arange(1, 9, device=t.device)
        emb = self.embed(angles.sin())
        a = self.down(self.first(x), emb)
        b = self.middle(self.halve(a), emb)
        return self.last(self.up(torch.cat([F.interpolate(b, scale_factor=2.0), a], 1), emb))


class Shared(nn.Module):
    """One convolution called twice, with a residual."""

    def __init__(self, width=16):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.body, self.other = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        h = F.relu(self.first(x))
        for _ in range(2):
            h = F.relu(self.body(h))
        return self.last(h + self.other(h))


class Timed(nn.Module):
    """A plain network whose activations grow with the timestep."""

    def __init__(self, width=16):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 3, padding=1),
        )  # fmt: skip

    def forward(self, x, timestep):
        return self.layers(x * (1 + timestep / 100)[:, None, None, None])


class Branching(Shared):
    """Cannot be traced."""

    def forward(self, x):
        return x if x.mean() > 100 else super().forward(x)


def residual_net(width=16):
    body = [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()] * 1
    net = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *body, nn.Conv2d(width, width, 3, groups=4), nn.SiLU(),
                        nn.Conv2d(width, 3, 3))  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
    return net.eval()


# ------------------------------------------------------------------------------------------------------- helpers


def accelerate(model, example, **options):
    options.setdefault("measure", False)
    return pdn.accelerate(model, example, precision="int8", **options)


@torch.no_grad()
def output(model, *args, **kwargs):
    result = model(*args, **kwargs)
    return result if isinstance(result, torch.Tensor) else result.sample


def assert_close(int8, model, *args, least=25.0, **kwargs):
    """At least ``least`` dB of the float output, in its shape and dtype."""
    expected, actual = output(model, *args, **kwargs), output(int8, *args, **kwargs)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    found = snr_db(expected, actual)
    assert found > least, f"{found:.1f} dB"


def int8_layers(model):
    return [m for m in model.modules() if isinstance(m, (Int8Conv2d, Int8Linear))]


def assert_stands_copying(int8, *args, **kwargs):
    expected = output(int8, *args, **kwargs)
    for twin in (copy.deepcopy(int8), pickle.loads(pickle.dumps(int8))):
        assert twin is not int8 and isinstance(twin, Int8GraphModule) == isinstance(int8, Int8GraphModule)
        assert torch.equal(output(twin, *args, **kwargs), expected)
        assert ("forward" in twin.__dict__) == ("forward" in int8.__dict__), "a copy is recorded as well"
        assert "forward" not in twin.__dict__ or twin.forward.model is twin


# ----------------------------------------------------------------------------------------------- diffusers' U-Nets


UNETS = {
    "attention": dict(),
    "scale_shift": dict(resnet_time_scale_shift="scale_shift", layers_per_block=2),
    "blocks that resample": dict(
        down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"), resnet_time_scale_shift="scale_shift",
    ),
    "attention blocks that resample": dict(downsample_type="resnet", upsample_type="resnet"),
    "odd": dict(block_out_channels=(24, 40), act_fn="gelu", downsample_padding=0, mid_block_scale_factor=1.5,
                center_input_sample=True, flip_sin_to_cos=False, freq_shift=1),
    "FIR filters": dict(down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
                        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"), block_out_channels=(32, 64)),
    "no attention": dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                         add_attention=False, dropout=0.1),
}  # fmt: skip


@pytest.mark.parametrize("options", UNETS.values(), ids=UNETS)
def test_unet2d(options):
    model = diffusers_unet(**options)
    before = copy.deepcopy(model.state_dict())
    int8, report = accelerate(model, {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor(500)})
    assert report.mode == "blocks" and report.snr_db > 25 and not report.fallbacks
    assert type(int8) is type(model) and int8 is not model and len(int8_layers(int8)) == len(report.layers)
    for shape in ((1, 3, 16, 16), (3, 3, 24, 8)):
        for timestep in (0, 200, torch.tensor(900)):
            assert_close(int8, model, torch.randn(shape), timestep)
    assert_close(int8, model, torch.randn(2, 3, 8, 8), torch.tensor([3, 800]))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert ("forward" in int8.__dict__) == RECORDS, report.notes


def test_batch_timesteps_and_results_of_other_kinds():
    model = diffusers_unet(num_class_embeds=4)
    example = (torch.randn(2, 3, 16, 16), torch.tensor([1, 999]))
    int8, _ = accelerate(model, (*example, torch.tensor([0, 3])))
    assert_close(int8, model, torch.randn(3, 3, 16, 16), torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3]))
    tuples = [m(*example, torch.tensor([1, 2]), return_dict=False) for m in (int8, model)]
    assert all(isinstance(result, tuple) for result in tuples) and snr_db(tuples[1][0], tuples[0][0]) > 25
    numbers = [output(int8, example[0], t, torch.tensor([1, 2])) for t in (7, torch.tensor(7), torch.tensor([7, 7]))]
    assert torch.equal(numbers[0], numbers[1]) and torch.equal(numbers[0], numbers[2])


def test_numbers_that_a_model_reads_in_its_own_way():
    """diffusers cuts numbers to integers, but not tensors: a recording must not mix them up."""
    model = diffusers_unet()
    x = torch.randn(1, 3, 16, 16)
    int8, _ = accelerate(model, (x, torch.tensor(500)))
    assert torch.equal(output(int8, x, 7.75), output(int8, x, 7))
    assert not torch.equal(output(int8, x, torch.tensor(7.75)), output(int8, x, torch.tensor(7)))


CONDITIONAL = {
    "sd1": (dict(), {}),
    "sd2": (dict(use_linear_projection=True, attention_head_dim=(4, 8), upcast_attention=True), {}),
    "sdxl": (
        dict(use_linear_projection=True, transformer_layers_per_block=(1, 3), attention_head_dim=(2, 4),
             down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
             up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
             addition_time_embed_dim=8, projection_class_embeddings_input_dim=64),
        dict(added_cond_kwargs={"text_embeds": torch.linspace(-1, 1, 32).reshape(2, 16), "time_ids": torch.ones(2, 6)}),
    ),
    "mask": (dict(), dict(encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]))),
    "only cross": (dict(only_cross_attention=True), {}),
    "scale_shift": (dict(resnet_time_scale_shift="scale_shift", class_embed_type="timestep"),
                    dict(class_labels=torch.tensor([3.0, 4.0]))),
    "attention with added keys": (
        dict(down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
             up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
             mid_block_type="UNetMidBlock2DSimpleCrossAttn"), {}),
}  # fmt: skip


@pytest.mark.parametrize(("options", "extra"), CONDITIONAL.values(), ids=CONDITIONAL)
def test_conditional_unet(options, extra):
    model = conditional_unet(**options)
    states = torch.randn(2, 5, 24)
    int8, report = accelerate(
        model, {"sample": torch.randn(2, 4, 8, 8), "timestep": 500, "encoder_hidden_states": states, **extra}
    )
    assert report.mode == "blocks" and report.snr_db > 25 and not report.fallbacks
    assert {"Int8ResnetBlock"} <= {swap.replacement for swap in report.swapped}
    if "SimpleCrossAttnDownBlock2D" not in options.get("down_block_types", ()):
        assert "Int8Transformer2D" in {swap.replacement for swap in report.swapped}
    for size, timestep in (((8, 8), 10), ((16, 12), torch.tensor(700))):
        assert_close(int8, model, torch.randn(2, 4, *size), timestep, torch.randn(2, 5, 24), **extra)
    assert ("forward" in int8.__dict__) == RECORDS, report.notes


def test_a_mask_hides_tokens():
    model = conditional_unet()
    x, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    int8, _ = accelerate(model, dict(sample=x, timestep=9, encoder_hidden_states=states, encoder_attention_mask=mask))
    changed = states.clone()
    changed[:, 3:] = 7
    call = [output(int8, x, 9, s, encoder_attention_mask=mask) for s in (states, changed)]
    assert torch.allclose(*call, atol=1e-5)
    assert not torch.allclose(call[0], output(int8, x, 9, states), atol=1e-3)


def test_autoencoder():
    model = autoencoder()
    int8, report = accelerate(model, torch.randn(1, 3, 32, 32))
    assert report.snr_db > 25 and not report.fallbacks
    reasons = {kept.name: kept.reason for kept in report.kept}
    assert "fewer than 16 channels" in reasons["post_quant_conv"] and "the last" in reasons["decoder.conv_out"]
    assert_close(int8, model, torch.randn(2, 3, 24, 40))
    with torch.no_grad():
        z = torch.randn(1, 4, 6, 8)
        assert snr_db(model.decode(z).sample, int8.decode(z).sample) > 25
        x = torch.randn(1, 3, 16, 16)
        assert snr_db(model.encode(x).latent_dist.mean, int8.encode(x).latent_dist.mean) > 25


def test_decoder_alone():
    model = autoencoder()
    decoder, report = accelerate(model.decoder, torch.randn(1, 4, 8, 8))
    blocks = {swap.replacement for swap in report.swapped}
    assert {"Int8ResnetBlock", "Int8AttentionBlock", "Int8Upsample2D"} <= blocks and report.snr_db > 25
    assert_close(decoder, model.decoder, torch.randn(2, 4, 12, 6))
    whole = copy.deepcopy(model)
    whole.decoder = decoder
    assert snr_db(*(m.decode(torch.ones(1, 4, 8, 8)).sample for m in (model, whole))) > 25


def test_freeu_runs_the_blocks_own_forward():
    model = conditional_unet()
    int8, _ = accelerate(model, (torch.randn(1, 4, 8, 8), 9, torch.randn(1, 5, 24)))
    assert any(isinstance(m, ConcatFreeUpBlock) for m in int8.modules())
    args = (torch.randn(1, 4, 8, 8), 9, torch.randn(1, 5, 24))
    without = output(int8, *args)
    for unet in (model, int8):
        unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert_close(int8, model, *args)
    assert not torch.equal(output(int8, *args), without)
    int8.disable_freeu()
    assert torch.equal(output(int8, *args), without)


# ----------------------------------------------------------------------------------------------------- our networks


def test_openai_blocks_written_by_hand():
    model = TimeUNet().eval()
    int8, report = accelerate(model, (torch.randn(2, 3, 16, 16), torch.tensor([10.0, 900.0])))
    assert report.mode == "blocks" and sum(isinstance(m, Int8ResnetBlock) for m in int8.modules()) == 3
    assert isinstance(int8.halve, Int8Conv2d), "a convolution between blocks"
    assert_close(int8, model, torch.randn(3, 3, 8, 24), torch.tensor([1.0, 2.0, 3.0]))


def test_diffusion_unet():
    model = DiffusionUNet(base=32, multipliers=(1, 2), blocks=1, attention_levels=(1,)).eval()
    example = (torch.randn(1, 1, 16, 16), torch.tensor([100.0]), torch.tensor([0.3]))
    int8, report = accelerate(model, example)
    assert not [k for k in report.kept if "has no int8 form" in k.reason]
    assert any(name.name.endswith("conv_shortcut_skip") for name in report.swapped) or report.layers
    assert_close(int8, model, torch.randn(2, 1, 8, 24), torch.tensor([5.0, 6.0]), torch.tensor([0.0, 1.0]))


def pretrained(load):
    try:
        return load().eval()
    except WeightsError:
        return None


def test_terrain():
    model = pretrained(lambda: TerrainDenoiser.from_onnx(weights.find_terrain()))
    least = 20.0
    model = model or TerrainDenoiser().eval()
    x = torch.randn(1, 1, 64, 64)
    int8, report = accelerate(model, (80 * x, torch.tensor([80.0]), torch.tensor([0.5])))
    assert report.mode == "blocks" and len(report.layers) > 150
    assert_close(int8, model, 2 * torch.randn(1, 1, 64, 64), torch.tensor([2.0]), torch.tensor([0.2]), least=least)


@pytest.mark.parametrize("calibrated", [False, True])
def test_ffdnet(calibrated):
    model = pretrained(lambda: load_ffdnet(weights.find_ffdnet())) or FFDNet().eval()
    pictures = [torch.rand(1, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3) for _ in range(3)]
    sigma = torch.full((1, 1, 1, 1), 25 / 255)
    batches = [(p + sigma * torch.randn(p.shape), sigma) for p in pictures]
    int8, report = accelerate(model, batches[0], calibration=batches if calibrated else None)
    assert report.mode == "graph" and len(report.layers) == 10 and report.snr_db > 25
    assert_close(int8, model, *batches[1])
    assert_close(int8, model, torch.rand(2, 3, 30, 50), sigma)


def test_cunet():
    model = pretrained(lambda: CUNet.from_ncnn(*weights.find_cunet())) or CUNet().eval()
    int8, report = accelerate(model, torch.rand(1, 3, 80, 80))
    assert len(report.layers) > 20 and report.snr_db > 25
    assert_close(int8, model, torch.rand(1, 3, 88, 80))


@pytest.mark.parametrize("scheme", ["auto", "per_tensor", "per_pixel", "dynamic"])
@pytest.mark.parametrize("make", [lambda: DnCNN().eval(), residual_net, lambda: Shared().eval()],
                         ids=["dncnn", "sequential", "shared"])  # fmt: skip
def test_plain_networks(make, scheme):
    model = make()
    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    batches = [torch.randn(1, channels, 20, 20) for _ in range(3)]
    options = {} if scheme == "dynamic" else dict(calibration=batches, scheme=scheme)
    int8, report = accelerate(model, batches[0], **options)
    assert isinstance(int8, Int8GraphModule) and report.snr_db > 20 and not report.fallbacks
    assert {k.reason for k in report.kept if k.kind == "FusedConv2d"} == {
        "the first or the last convolution, which stays in float"
    }
    for shape in ((2, channels, 12, 30), (1, channels, 20, 20), (0, channels, 9, 9)):
        x = torch.randn(shape)
        if shape[0]:
            assert_close(int8, model, x, least=20)
        else:
            assert output(int8, x).shape == output(model, x).shape
    assert_stands_copying(int8, batches[0])


def test_neighbours_hand_codes_on():
    model = DnCNN().eval()
    int8, _ = accelerate(model, torch.randn(1, 1, 20, 20), calibration=[torch.randn(1, 1, 20, 20)], scheme="per_tensor")
    handed = [n for n in int8.graph.nodes if n.kwargs.get("out_dtype") is torch.int8]
    assert len(handed) >= 13


def test_a_layer_called_twice_keeps_its_weights():
    """Factors that smooth the next layer must not be folded into a layer that others read as well."""
    model = Shared().eval()
    with torch.no_grad():
        model.body.weight[3] *= 30  # a channel that smoothing works on
    batches = [torch.randn(1, 3, 16, 16) for _ in range(3)]
    int8, _ = accelerate(model, batches[0], calibration=batches, scheme=Scheme("per_tensor", smooth=0.5))
    assert_close(int8, model, batches[1], least=20)


def test_untraceable_networks_keep_their_class():
    model = Branching().eval()
    int8, report = accelerate(model, torch.randn(1, 3, 16, 16))
    assert report.mode == "modules" and isinstance(int8, Branching) and isinstance(int8.body, Int8Conv2d)
    assert type(int8.first) is nn.Conv2d and any("rewritten as a graph" in note for note in report.notes)
    assert_close(int8, model, torch.randn(2, 3, 9, 11))
    x = torch.full((1, 3, 8, 8), 200.0)
    assert torch.equal(output(int8, x), x), "its way depends on values: it is not recorded"
    assert "forward" not in int8.__dict__ and any("not recorded" in note for note in report.notes)


def test_a_single_convolution():
    model = nn.Conv2d(3, 16, 3).eval()
    int8, report = accelerate(model, torch.randn(1, 3, 8, 8))
    assert len(report.layers) == 1 and report.snr_db > 30
    assert_close(int8, model, torch.randn(2, 3, 9, 5))


# ---------------------------------------------------------------------------------------- calibrations and schemes


def timed_batches(timesteps=(50, 350, 650, 950)):
    return [(torch.randn(1, 3, 12, 12), torch.tensor([float(t)])) for t in timesteps]


def test_scales_follow_the_timestep():
    model, batches = Timed().eval(), timed_batches()
    scheme = Scheme("per_timestep", buckets=4)
    static, _ = accelerate(model, batches[0], calibration=batches, scheme=Scheme("per_tensor"))
    int8, report = accelerate(model, batches[0], calibration=batches, scheme=scheme)
    assert [len(layer.per_bucket) for layer in report.layers] == [4] * len(report.layers)
    assert len(int8.timestep_scales.timesteps) == 4
    for x, t in batches:
        assert_close(int8, model, x, t)
    x, t = batches[0]
    coarse, fine = (snr_db(output(model, x, t), output(m, x, t)) for m in (static, int8))
    assert fine > coarse + 6, "one scale for all is too wide for small timesteps"
    layer = int8_layers(int8)[0]
    used = []
    for t in (50.0, 950.0):
        output(int8, x, torch.tensor([t]))
        used.append(layer.input_parameters[0].item())
        assert used[-1] == layer.input_scale[int(t // 250)].item()
    assert used[0] < used[1]
    assert torch.equal(output(int8, x, batches[0][1]), output(int8, timestep=batches[0][1], x=x))
    assert_stands_copying(int8, *batches[2])
    expected = [output(int8, *args) for args in batches]
    int8.to(torch.float32)  # moves nothing, and must not leave a recording with scales that nobody switches
    assert all(torch.equal(output(int8, *args), value) for args, value in zip(batches, expected, strict=True))
    for call in ((x,), (x, None)):
        with pytest.raises(TypeError, match="timestep"):
            int8(*call)


def test_schemes_of_a_unet():
    model = diffusers_unet(block_out_channels=(16, 32))
    batches = [(torch.randn(1, 3, 16, 16), torch.tensor(t)) for t in (100, 600, 900)]
    outputs = {}
    for scheme in ("per_tensor", "per_timestep", "per_pixel", "auto"):
        int8, report = accelerate(model, batches[0], calibration=batches, scheme=scheme)
        assert report.snr_db > 20, scheme
        kinds = {layer.scheme.split()[0].partition("(")[0] for layer in report.layers}
        expected = {"per_pixel": {"per_pixel", "per_token"}}.get(scheme, {scheme})
        assert scheme == "auto" or kinds == expected
        assert all(layer.snr_db is not None and layer.reason for layer in report.layers)
        outputs[scheme] = output(int8, *batches[1])
    assert len({tuple(value.flatten().tolist()) for value in outputs.values()}) == 4
    assert int8.config.sample_size == 16


def test_a_calibration_serves_several_times(tmp_path):
    model, batches = Timed().eval(), timed_batches()
    calibration = calibrate(model, batches, buckets=4)
    direct, _ = accelerate(model, batches[0], calibration=calibration, scheme="per_tensor")
    calibration.save(tmp_path / "calibration.safetensors")
    loaded = Calibration.load(tmp_path / "calibration.safetensors")
    again, _ = accelerate(model, batches[0], calibration=loaded, scheme="per_tensor")
    assert torch.equal(output(direct, *batches[1]), output(again, *batches[1]))
    own = calibrate(model, batches, scheme=Scheme("per_tensor", symmetric=True))
    _, report = accelerate(model, batches[0], calibration=own)
    assert {layer.scheme for layer in report.layers} == {"per_tensor symmetric"}, "what the calibration was made for"


def test_a_target_decides():
    model, batches = Timed().eval(), timed_batches()
    calibration = calibrate(model, batches, buckets=4)
    _, easy = accelerate(model, batches[0], calibration=calibration, target_db=1.0)
    _, hard = accelerate(model, batches[0], calibration=calibration, target_db=80.0)
    assert all("reaches 1 dB" in layer.reason for layer in easy.layers)
    assert all("below 80 dB" in layer.reason for layer in hard.layers)
    with pytest.warns(UserWarning, match="no layer of this model was quantized"):
        _, none = accelerate(model, batches[0], calibration=calibration, float_below=80.0)
    assert not none.layers and any("the best int8 scheme reaches" in kept.reason for kept in none.kept)


# --------------------------------------------------------------------------------------------------------- options


def test_keep():
    model = diffusers_unet()
    example = (torch.randn(1, 3, 16, 16), torch.tensor(9))
    patterns = ["down_blocks.0.resnets.0.conv1", "up_blocks.0.resnets.0", "mid_block.attentions.0.to_k", "*.1.norm1"]
    int8, report = accelerate(model, example, keep=patterns)
    assert isinstance(int8.down_blocks[0].resnets[0].conv1, FusedConv2d)
    assert type(int8.up_blocks[0].resnets[0]) is type(model.up_blocks[0].resnets[0])
    assert type(int8.mid_block.attentions[0].to_qkv) is nn.Linear
    reasons = {kept.name: kept.reason for kept in report.kept}
    assert reasons["up_blocks.0.resnets.0"] == "named in keep"
    assert reasons["up_blocks.0.resnets.1"] == "has no int8 form: norm1 inside it is named in keep"
    assert_close(int8, model, torch.randn(2, 3, 8, 24), 30)
    _, whole = accelerate(model, example, keep="up_blocks.*")
    assert not [layer.name for layer in whole.layers if layer.name.startswith("up_blocks")]
    plain, report = accelerate(DnCNN().eval(), torch.randn(1, 1, 16, 16), keep="layers.3")
    assert len(report.layers) == 14 or "layers.3" not in [layer.name for layer in report.layers]


def test_what_hooks_hold_stays():
    model = diffusers_unet()
    calls = []
    model.mid_block.resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    nn.utils.parametrizations.weight_norm(model.down_blocks[0].resnets[0].conv2)
    model.eval()
    int8, report = accelerate(model, (torch.randn(1, 3, 16, 16), torch.tensor(9)), record=False)
    reasons = {kept.name: kept.reason for kept in report.kept}
    assert "conv1 has hooks" in reasons["mid_block.resnets.0"]
    assert "conv2 has parametrizations" in reasons["down_blocks.0.resnets.0"]
    calls.clear()
    assert_close(int8, copy.deepcopy(model), torch.randn(1, 3, 16, 16), 9)
    assert len(calls) == 2


@pytest.mark.parametrize("make", [diffusers_unet, lambda: Timed().eval()], ids=["blocks", "modules"])
def test_inplace(make):
    model = make()
    twin = copy.deepcopy(model)
    args = (torch.randn(1, 3, 16, 16), torch.tensor([9.0]))
    int8, report = accelerate(model, args, inplace=True, measure=True)
    assert int8 is model and report.layers and report.mode in ("blocks", "modules") and report.speedup > 0
    assert_close(model, twin, *args)


def test_inplace_is_all_or_nothing(monkeypatch):
    model = Timed().eval()
    twin, args = copy.deepcopy(model), (torch.randn(1, 3, 16, 16), torch.tensor([9.0]))
    monkeypatch.setattr("pydenoise.surgery.int8.compare", lambda *_: "broken")
    with pytest.raises(RuntimeError, match="the int8 model gives another result: broken"):
        accelerate(model, args, inplace=True)
    assert torch.equal(output(model, *args), output(twin, *args)) and not int8_layers(model)


def test_a_dynamic_scheme_needs_no_calibration():
    model, x = Shared().eval(), torch.randn(1, 3, 12, 12)
    _, report = accelerate(model, x, scheme=Scheme("per_pixel", symmetric=True))
    assert {layer.scheme for layer in report.layers} == {"per_pixel symmetric"}


@pytest.mark.skipif(not RECORDS, reason="no recordings here")
def test_recorded_and_not_are_the_same():
    model = conditional_unet()
    args = (torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 5, 24))
    recorded, _ = accelerate(model, args)
    plain, _ = accelerate(model, args, record=False)
    assert "forward" in recorded.__dict__ and "forward" not in plain.__dict__
    for shape, t in (((2, 4, 8, 8), 500), ((1, 4, 16, 8), 3), ((2, 4, 8, 8), torch.tensor(7)), ((2, 4, 8, 8), 500)):
        x, states = torch.randn(shape), torch.randn(shape[0], 5, 24)
        assert torch.equal(output(recorded, x, t, states), output(plain, x, t, states))
    assert recorded.forward.recordings() and not recorded.forward.refusals


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model = diffusers_unet().to(dtype)
    x = torch.randn(1, 3, 16, 16)
    int8, report = accelerate(model, (x.to(dtype), torch.tensor(9)))
    assert report.snr_db > 20 and output(int8, x.to(dtype), 9).dtype == dtype
    cast = accelerate(diffusers_unet(), (x, torch.tensor(9)))[0].to(dtype)
    assert all(layer.weight_scale.dtype == torch.float32 for layer in int8_layers(cast))
    expected = output(diffusers_unet(), x, 9)
    for unet in (int8, cast):
        assert snr_db(expected, output(unet, x.to(dtype), 9).float()) > 20


def test_half_precision_inputs_of_a_float_model_are_refused_as_by_the_model():
    model = diffusers_unet()
    int8, _ = accelerate(model, (torch.randn(1, 3, 16, 16), torch.tensor(9)))
    for unet, context in ((model, pytest.raises(RuntimeError)), (int8, pytest.raises((TypeError, RuntimeError)))):
        with context as info:
            output(unet, torch.randn(1, 3, 16, 16).half(), 9)
    assert "dtype" in str(info.value) or "float16" in str(info.value)


def test_copies():
    model = diffusers_unet()
    args = (torch.randn(1, 3, 16, 16), torch.tensor(9))
    int8, _ = accelerate(model, args)
    assert_stands_copying(int8, *args)


def test_training_mode_is_refused():
    int8, _ = accelerate(diffusers_unet(), (torch.randn(1, 3, 16, 16), torch.tensor(9)))
    output(int8, torch.randn(1, 3, 16, 16), 9)
    int8.train()
    with pytest.raises(RuntimeError, match="evaluation mode"):
        output(int8, torch.randn(1, 3, 16, 16), 9)
    with pytest.raises(ValueError, match="model: expected a model in eval mode"):
        accelerate(int8, torch.randn(1, 3, 16, 16))


# ---------------------------------------------------------------------------------------------------------- report


def test_report(tmp_path):
    model, batches = Timed().eval(), timed_batches()
    calibration = calibrate(model, batches, buckets=4)
    _, report = accelerate(model, batches[0], calibration=calibration, scheme=Scheme("per_timestep", buckets=4),
                           measure=True)  # fmt: skip
    text, data = str(report), json.loads(report.to_json())
    assert "per_timestep(4) affine" in text and "signal over noise of the output" in text and "dB" in text
    assert {swap["backend"] for swap in data["swapped"]} == {"cpu"}, "what the example called is said to be called"
    assert all(swap["shape"] for swap in data["swapped"])
    assert all(math.isfinite(layer["snr_db"]) and len(layer["per_bucket"]) == 4 for layer in data["layers"])
    assert data["precision"] == "int8" and data["speedup"] > 0 and data["snr_db"] > 20
    pytest.importorskip("matplotlib")
    figure = report.plot(tmp_path / "snr.png")
    assert (tmp_path / "snr.png").stat().st_size > 5000 and len(figure.axes) >= 2
    _, plain = accelerate(model, batches[0])
    plain.plot(str(tmp_path / "plain.svg"))
    assert (tmp_path / "plain.svg").read_text().startswith("<?xml")
    _, fp32 = pdn.accelerate(model, batches[0], measure=False)
    with pytest.raises(ValueError, match="has no int8 layer"):
        fp32.plot()


def test_report_says_what_stays_and_why():
    _, report = accelerate(conditional_unet(), (torch.randn(1, 4, 8, 8), 9, torch.randn(1, 5, 24)))
    reasons = {kept.name: kept.reason for kept in report.kept}
    assert reasons["conv_in"] == reasons["conv_out"] == "the first or the last convolution, which stays in float"
    assert "embedding" in reasons["time_embedding.linear_1"]
    _, report = accelerate(diffusers_unet(**UNETS["FIR filters"]), (torch.randn(1, 3, 16, 16), torch.tensor(9)))
    reasons = {kept.name: kept.reason for kept in report.kept}
    assert "has no int8 form: downsample: expected the mean" in reasons["down_blocks.0.resnet_down"]
    assert "down_blocks.0.resnet_down.conv1" in {layer.name for layer in report.layers}, "its convolutions are int8"


# ------------------------------------------------------------------------------------------------------- pipelines


def test_unconditional_pipelines():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers_unet()
    int8, _ = accelerate(model, (torch.randn(1, 3, 16, 16), torch.tensor(500)))
    assert int8.config == model.config and int8.dtype == model.dtype and int8.device == model.device
    for pipeline, scheduler in (
        (diffusers.DDPMPipeline, diffusers.DDPMScheduler), (diffusers.DDIMPipeline, diffusers.DDIMScheduler),
    ):  # fmt: skip
        pictures = []
        for unet in (model, int8):
            pipe = pipeline(unet=unet, scheduler=scheduler())
            pipe.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(0)
            pictures.append(torch.as_tensor(pipe(2, generator, num_inference_steps=4, output_type="np").images))
        assert pictures[0].shape == (2, 16, 16, 3) and psnr(*pictures) > 25


def psnr(expected, actual):
    return -10 * (expected - actual).double().square().mean().log10().item()


def test_stable_diffusion_pipeline():
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    unet, vae = conditional_unet(), autoencoder()
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    states = torch.randn(1, 5, 24)
    int8, _ = accelerate(unet, (torch.randn(2, 4, 8, 8), torch.tensor(500), torch.cat([states, 0 * states])))
    decoder, _ = accelerate(vae, torch.randn(1, 3, 16, 16))
    pictures = []
    for parts in ({"unet": unet, "vae": vae}, {"unet": int8, "vae": decoder}):
        pipe = diffusers.StableDiffusionPipeline(
            **parts, text_encoder=None, tokenizer=None, scheduler=scheduler, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        result = pipe(
            prompt_embeds=states, negative_prompt_embeds=0 * states, num_inference_steps=3, output_type="np",
            height=16, width=16, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        pictures.append(torch.as_tensor(result.images))
    assert pictures[0].shape == (1, 16, 16, 3) and psnr(*pictures) > 25


# ------------------------------------------------------------------------------------------------------- bad input


def small():
    return Shared().eval(), torch.randn(1, 3, 12, 12)


def test_bad_calibrations():
    model, x = small()
    for given in (x, {"x": x}, "file", 3):
        with pytest.raises(TypeError, match="calibration: expected a Calibration, or an iterable of batches"):
            accelerate(model, x, calibration=given)
    with pytest.raises(ValueError, match="batches: expected at least one batch, got none"):
        accelerate(model, x, calibration=[])
    for value, word in ((math.nan, "NaN"), (math.inf, "infinity")):
        bad = x.clone()
        bad[0, 0, 0, 0] = value
        with pytest.raises(ValueError, match=f"input of layer 'first' holds {word}"):
            accelerate(model, x, calibration=[x, bad])
    with pytest.raises(TypeError, match="batches"):
        accelerate(model, x, calibration=[3])
    other = calibrate(Shared(24).eval(), [x])
    with pytest.raises(ValueError, match="calibration: is of another model"):
        accelerate(model, x, calibration=other)
    with pytest.raises(ValueError, match="calibration: is of other weights: those of layer 'first'"):
        accelerate(Shared().eval().requires_grad_(False).apply(doubled), x, calibration=calibrate(model, [x]))
    with pytest.raises(ValueError, match="calibration: belongs to precision 'int8'"):
        pdn.accelerate(model, x, calibration=[x])
    with pytest.raises(ValueError, match="calibration: scheme per_tensor .* needs calibration batches"):
        accelerate(model, x, scheme="per_tensor")


def doubled(module):
    if isinstance(module, nn.Conv2d):
        module.weight.mul_(2)


def test_constant_activations():
    """They have a scale all the same, and the report says so."""
    model, x = nn.Sequential(*[nn.Conv2d(3, 3, 3) for _ in range(3)]).eval(), torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(0.5)
    int8, report = accelerate(model, x, calibration=[x], scheme="per_tensor")
    assert [layer.reason.endswith("(its input is constant)") for layer in report.layers] == [True]
    assert_close(int8, model, x)


def test_bad_arguments():
    model, x = small()
    with pytest.raises(ValueError, match="scheme: expected a Scheme or one of"):
        accelerate(model, x, scheme="int4")
    with pytest.raises(TypeError, match="scheme: expected a Scheme or a name"):
        accelerate(model, x, scheme=8)
    with pytest.raises(ValueError, match="scheme: 'float'"):
        accelerate(model, x, scheme="float")
    with pytest.raises(ValueError, match="scheme: per_timestep needs a model with timesteps"):
        accelerate(model, x, calibration=[x], scheme="per_timestep")
    with pytest.raises(ValueError, match="keep: 'nothing' matches no module"):
        accelerate(model, x, keep="nothing")
    with pytest.raises(ValueError, match="example_inputs: the model cannot run"):
        accelerate(model, torch.randn(1, 4, 12, 12))
    with pytest.raises(ValueError, match="eval"):
        accelerate(Shared(), x)
    int8, _ = accelerate(model, x)
    with pytest.raises(ValueError, match="model: is an int8 model already"):
        accelerate(int8, x)
    with pytest.raises((TypeError, ValueError)), torch.no_grad():
        int8(torch.randn(1, 5, 12, 12))


def test_weights_that_are_not_finite_name_a_layer():
    model, x = small()
    with torch.no_grad():
        model.other.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="example_inputs: the input of layer 'last' holds NaN"):
        accelerate(model, x)


def test_a_model_without_supported_layers():
    for model in (nn.Sequential(nn.ReLU()), nn.Identity()):
        with pytest.warns(UserWarning, match="no Conv2d or Linear layer"):
            same, report = accelerate(model.eval(), torch.randn(1, 3))
        assert same is not model and report.mode == "unchanged" and not report.layers and report.to_json()
    mlp = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with pytest.warns(UserWarning, match="no layer of this model was quantized"):
        same, report = accelerate(mlp, torch.randn(2, 3))
    assert {kept.name for kept in report.kept} == {"0", "1", "2"} and str(report)
    assert_close(same, mlp, torch.randn(2, 3))


def test_buckets_that_do_not_fit():
    model, batches = Timed().eval(), timed_batches()
    calibration = calibrate(model, batches, buckets=TimestepBuckets((500.0,)))
    with pytest.raises(ValueError, match="scheme: has 5 buckets of timesteps, the calibration 2"):
        accelerate(model, batches[0], calibration=calibration, scheme=Scheme("per_timestep", buckets=5))
    _, report = accelerate(model, batches[0], calibration=calibration, scheme="per_timestep")
    assert all(layer.scheme.startswith("per_timestep(2)") for layer in report.layers), "a preset takes what there is"
    timeless = calibrate(model, batches, timestep_argument=None)
    with pytest.raises(ValueError, match="calibration: has no timesteps"):
        accelerate(model, batches[0], calibration=timeless, scheme="per_timestep")


def test_no_warning_in_the_ordinary_case(recwarn):
    accelerate(Shared().eval(), torch.randn(1, 3, 12, 12))
    assert not recwarn.list


def test_inference_mode():
    model, x = small()
    with torch.inference_mode():
        int8, _ = accelerate(model, x)
        expected = int8(x)
    assert torch.equal(output(int8, x), expected)
    assert not int8(x).requires_grad
