"""Ensemble: N networks as one give what they give one by one; aggregators stand where the paper has them, and train."""

import pytest
import torch

from pydenoise.models.digits import DigitsUNet
from pydenoise.models.unet import DiffusionUNet
from pydenoise.nn import Ensemble, FeatureAggregator

SMALL = {"hidden": 16, "heads": 2}


def randomised(make, count: int) -> list[torch.nn.Module]:
    """Networks of one shape, no weight of which is zero."""
    models = []
    for number in range(count):
        torch.manual_seed(number)
        model = make()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.08)
        models.append(model.eval())
    return models


def digits(count: int = 2) -> list[torch.nn.Module]:
    return randomised(DigitsUNet, count)


def image_unet(**options) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    settings = {
        "sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8, "attention_head_dim": 8,
    }  # fmt: skip
    return diffusers.UNet2DModel(**{**settings, **options})


def text_unet(**options) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    settings = {
        "sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "norm_num_groups": 8, "attention_head_dim": 8,
        "cross_attention_dim": 12,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**settings, **options})


def separately(models, *args, **kwargs) -> torch.Tensor:
    """[B, N, C, H, W] by N calls."""
    with torch.no_grad():
        outputs = [model(*args, **kwargs) for model in models]
    return torch.stack([getattr(output, "sample", output) for output in outputs], 1)


@pytest.mark.parametrize("method", ["stacked", "sequence"])
@pytest.mark.parametrize("batch", [1, 3])
def test_networks_apart(method, batch):
    models = digits(3)
    x, t, labels = torch.randn(batch, 1, 8, 8), torch.randint(0, 1000, (batch,)), torch.arange(batch)
    expected = separately(models, x, t, labels)
    ensemble = Ensemble(models, aggregate="none", method=method)
    assert not list(ensemble.aggregators.parameters())
    with torch.no_grad():
        torch.testing.assert_close(ensemble(x, t, labels), expected, rtol=1e-4, atol=1e-4)
        untrained = Ensemble(models, aggregate="output", method=method, **SMALL)(x, t, labels)
    torch.testing.assert_close(untrained, expected.mean(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["stacked", "sequence"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resnet_time_scale_shift": "scale_shift"},
        {"downsample_type": "resnet", "upsample_type": "resnet"},
        {"num_class_embeds": 5},
        {"downsample_padding": 0, "center_input_sample": True},
        {"add_attention": False, "mid_block_scale_factor": 2.0},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_diffusers_networks_apart(method, options):
    models = randomised(lambda: image_unet(**options), 2)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([7, 900])
    labels = torch.tensor([1, 4]) if "num_class_embeds" in options else None
    expected = separately(models, x, t, labels)
    ensemble = Ensemble(models, aggregate="none", method=method)
    with torch.no_grad():
        torch.testing.assert_close(ensemble(x, t, labels), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["stacked", "sequence"])
def test_texts(method):
    models = randomised(text_unet, 2)
    x, t, texts = torch.randn(2, 4, 16, 16), 17, torch.randn(2, 2, 5, 12)
    expected = torch.cat([separately(models[n : n + 1], x, t, texts[n]) for n in range(2)], 1)
    ensemble = Ensemble(models, aggregate="none", method=method)
    with torch.no_grad():
        torch.testing.assert_close(ensemble(x, t, encoder_hidden_states=texts), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ensemble(x, t, encoder_hidden_states=list(texts)), expected, rtol=1e-4, atol=1e-4)
        shared = ensemble(x, t, encoder_hidden_states=texts[0])
        torch.testing.assert_close(shared, separately(models, x, t, texts[0]), rtol=1e-4, atol=1e-4)  # one text for all
    with torch.no_grad():
        joined = Ensemble(models, method=method, **SMALL)(x, t, encoder_hidden_states=texts)
    assert joined.shape == x.shape and joined.isfinite().all()


def test_known_blocks_are_stacked():
    """No module of the networks is left to run in turns, but for transformers."""
    from pydenoise.nn._stacked import Separate

    for models, left in ((digits(), 0), (randomised(image_unet, 2), 0), (randomised(text_unet, 2), 4)):
        ensemble = Ensemble(models, aggregate="none", method="stacked")
        assert sum(isinstance(module, Separate) for module in ensemble.modules()) == left
        assert all(
            isinstance(m, Separate) for m in Ensemble(models, aggregate="none", method="sequence").units[1].parts
        )


def test_aggregators_stand_where_the_paper_has_them():
    models = randomised(image_unet, 2)
    ensemble = Ensemble(models, **SMALL)
    assert list(ensemble.aggregators) == [
        "conv_in", "down_0_0", "down_0_downsample", "down_1_0", "middle", "up_0_0", "up_0_1", "up_1_0", "conv_out",
    ]  # fmt: skip
    channels = {name: module.channels for name, module in ensemble.aggregators.items()}
    assert channels["down_0_downsample"] == 16 and channels["up_0_1"] == 32 and channels["conv_out"] == 3
    assert all(isinstance(module, FeatureAggregator) and module.maps == 2 for module in ensemble.aggregators.values())


def test_joined_maps_by_hand():
    """Of untrained aggregators: every layer reads the mean of the layers before."""
    models = digits(2)
    ensemble = Ensemble(models, **SMALL)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.tensor([1, 10])

    def mean(*maps):
        return torch.stack(maps).mean(0)

    with torch.no_grad():
        told = [model.embed(x, t, labels) for model in models]
        h = mean(*(model.conv_in(x) for model in models))
        skips = [h]
        for index in range(len(models[0].encoder)):
            h = mean(*(model.encoder[index](h, e) for model, e in zip(models, told, strict=True)))
            skips.append(h)
        h = mean(*(model.middle(h, e) for model, e in zip(models, told, strict=True)))
        for index in range(len(models[0].decoder)):
            skip = skips.pop()
            apart = [model.decoder[index](h, e, skip) for model, e in zip(models, told, strict=True)]
            h = mean(*apart)
        heads = [m.conv_out(torch.nn.functional.silu(m.norm_out(a))) for m, a in zip(models, apart, strict=True)]
        torch.testing.assert_close(ensemble(x, t, labels), mean(*heads), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["stacked", "sequence"])
def test_only_aggregators_train(method):
    models = digits(2)
    before = [p.clone() for model in models for p in model.parameters()]
    ensemble = Ensemble(models, method=method, **SMALL).train()
    assert not any(p.requires_grad for model in models for p in model.parameters())
    assert not models[0].training and ensemble.aggregators.training
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(ensemble.aggregators.parameters(), lr=3e-3)
    assert {id(p) for p in ensemble.parameters() if p.requires_grad} == {
        id(p) for p in ensemble.aggregators.parameters()
    }
    x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 300)
    target, losses = separately(models, x, t)[:, 1], []  # the second network knows best
    for _ in range(25):
        loss = (ensemble(x, t) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, (p for m in models for p in m.parameters()), strict=True))
    again = Ensemble(models, method=method, **SMALL)
    again.aggregators.load_state_dict(ensemble.aggregators.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(x, t), ensemble(x, t))


def test_methods_agree():
    models = digits(2)
    ensembles = [Ensemble(models, method=method, **SMALL) for method in ("stacked", "sequence")]
    torch.nn.init.normal_(ensembles[0].aggregators["middle"].logits.weight)
    ensembles[1].aggregators.load_state_dict(ensembles[0].aggregators.state_dict())
    x = torch.randn(2, 1, 16, 8)
    with torch.no_grad():
        torch.testing.assert_close(ensembles[0](x, 5), ensembles[1](x, 5), rtol=1e-4, atol=1e-4)


def test_other_numbers():
    """A U-Net with numbers as condition, in bfloat16 and channels_last; a sampler's call."""
    models = [m.bfloat16() for m in randomised(lambda: DiffusionUNet(2, 32, (1, 2), 1, ()), 2)]
    x = torch.randn(2, 2, 8, 8).bfloat16().to(memory_format=torch.channels_last)
    condition = torch.tensor([0.5, 1.0]).bfloat16()
    with torch.no_grad():
        out = Ensemble(models, method="stacked", aggregate="none")(x, torch.tensor([3.0, 4.0]), condition)
        times = torch.tensor([3.0, 4.0]).bfloat16()
        expected = separately(models, x, times, condition)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.1, atol=0.1)


BAD = {
    "models: expected two or more, got 1": lambda: Ensemble(digits(1)),
    "models: expected torch.nn.Module": lambda: Ensemble([1, 2]),
    "models: expected one class": lambda: Ensemble([DigitsUNet(), DiffusionUNet()]),
    "models: number 1 is not shaped as the first": lambda: Ensemble([DigitsUNet(), DigitsUNet(base=64)]),
    "models: the same network": lambda: Ensemble([m := DigitsUNet(), m]),
    "models: expected U-Nets": lambda: Ensemble([torch.nn.Conv2d(1, 1, 1), torch.nn.Conv2d(1, 1, 1)]),
    "models: expected one dtype": lambda: Ensemble([DigitsUNet(), DigitsUNet().half()]),
    "aggregate: expected one of": lambda: Ensemble(digits(), aggregate="all"),
    "method: expected one of": lambda: Ensemble(digits(), method="vmap"),
    "hidden: expected a multiple": lambda: Ensemble(digits(), hidden=12, heads=8),
    r"sample: expected \[B, 1, H, W\]": lambda: Ensemble(digits(), **SMALL)(torch.zeros(1, 1, 7, 8), 1),
    "sample: expected a torch.Tensor": lambda: Ensemble(digits(), **SMALL)([1.0], 1),
    "timestep: expected a number or": lambda: Ensemble(digits(), **SMALL)(torch.zeros(1, 1, 8, 8), torch.zeros(2)),
    "encoder_hidden_states: expected None": lambda: Ensemble(digits(), **SMALL)(
        torch.zeros(1, 1, 8, 8), 1, encoder_hidden_states=torch.zeros(1, 2, 3)
    ),
    "encoder_hidden_states: expected tokens of width 12": lambda: Ensemble(randomised(text_unet, 2), **SMALL)(
        torch.zeros(1, 4, 16, 16), 1
    ),
    r"encoder_hidden_states: expected \[1, L, 12\]": lambda: Ensemble(randomised(text_unet, 2), **SMALL)(
        torch.zeros(1, 4, 16, 16), 1, encoder_hidden_states=torch.zeros(1, 3, 9)
    ),
    "condition: expected class labels": lambda: Ensemble(
        randomised(lambda: image_unet(num_class_embeds=3), 2), **SMALL
    )(torch.zeros(1, 3, 16, 16), 1),
    "condition: the models know no classes": lambda: Ensemble(randomised(image_unet, 2), **SMALL)(
        torch.zeros(1, 3, 16, 16), 1, torch.zeros(1)
    ),
    "models: time_embedding_type": lambda: Ensemble([image_unet(time_embedding_type="fourier") for _ in range(2)]),
    "models: expected blocks with resnets": lambda: Ensemble(
        [image_unet(down_block_types=("SkipDownBlock2D", "DownBlock2D"), block_out_channels=(32, 32)) for _ in range(2)]
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()
