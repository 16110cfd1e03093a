"""Models of other conventions as denoisers."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pydenoise.samplers._level_table import LevelTable
from pydenoise.samplers.adapters import DiffusersModel, KarrasDenoiser, ScheduleDenoiser
from pydenoise.samplers.levels import NoiseSchedule

X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
VARIANCE = 0.7  # of the data in the analytic models below
SCHEDULES = {
    "scaled linear": NoiseSchedule.scaled_linear(),
    "zero terminal SNR": NoiseSchedule.linear().zero_terminal_snr(),
    "flow": NoiseSchedule.flow(),
    "karras": NoiseSchedule.karras(),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_of_tensors(name):
    schedule = SCHEDULES[name]
    last = 80 if schedule.kind == "ve" else schedule.num_timesteps - 1
    times = torch.tensor([0.0, 0.25, 17, last - 0.5, last], dtype=torch.float64)
    expected = torch.tensor([schedule.level(float(t)) for t in times], dtype=torch.float64).unbind(1)
    assert_close(LevelTable(schedule)(times), expected, rtol=1e-14, atol=1e-16)
    if schedule.kind == "vp":
        assert_close(
            LevelTable(schedule)(times[[0, 2, 4]].long()), tuple(e[[0, 2, 4]] for e in expected), rtol=0, atol=0
        )


def clean(x, alpha, sigma):
    """E[x0 | x] for x0 ~ N(0, VARIANCE)."""
    return x * (alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2))


def per_sample(values):
    return torch.as_tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


# ------------------------------------------------------------------------------------------------------- DiffusersModel


class Returns(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap, self.told = wrap, None

    def forward(self, sample, timestep, encoder_hidden_states=None):
        self.told = timestep
        return self.wrap(2 * sample)


@pytest.mark.parametrize(
    "wrap",
    [lambda y: y, lambda y: (y, None), lambda y: [y], lambda y: SimpleNamespace(sample=y)],
    ids=["tensor", "tuple", "list", "sample"],
)
def test_every_kind_of_result(wrap):
    assert_close(DiffusersModel(Returns(wrap))(X, torch.tensor(7)), 2 * X)


@pytest.mark.parametrize("wrap", [lambda y: None, lambda y: {"sample": y}, lambda y: ()])
def test_a_result_without_a_tensor_is_refused(wrap):
    with pytest.raises(TypeError, match="^model: expected a tensor"):
        DiffusersModel(Returns(wrap))(X, 7)


@pytest.mark.parametrize("t", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7, 7])])
def test_times_become_one_for_each_sample(t):
    model = Returns(lambda y: y)
    DiffusersModel(model)(X, t)
    assert model.told.tolist() == [7, 7, 7]


def test_times_are_scaled_and_channels_kept():
    model = Returns(lambda y: y)
    assert_close(DiffusersModel(model, time_scale=0.001, channels=1)(X, torch.tensor(500.0)), 2 * X[:, :1])
    assert_close(model.told, torch.full((3,), 0.5))


def test_text_before_the_time():
    def transformer(hidden_states, encoder_hidden_states=None, timestep=None, pooled_projections=None):
        return (hidden_states + encoder_hidden_states + timestep.view(-1, 1, 1, 1) + pooled_projections,)

    wrapped = DiffusersModel(transformer, pooled_projections=10.0)
    assert_close(wrapped(X, torch.tensor([1, 2, 3]), encoder_hidden_states=X), 2 * X + per_sample([11, 12, 13]))


def test_models_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    options = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
    unet = diffusers.UNet2DConditionModel(
        **options, in_channels=2, out_channels=2, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 8,
    ).double().eval()  # fmt: skip
    x, text = torch.randn(3, 2, 8, 8).double(), torch.randn(3, 5, 8).double()
    added = {"text_embeds": torch.randn(3, 8).double(), "time_ids": torch.rand(3, 6).double()}
    times = torch.tensor([5, 5, 5])
    with torch.no_grad():
        expected = unet(x, 5, text, added_cond_kwargs=added).sample
        assert_close(DiffusersModel(unet)(x, times, encoder_hidden_states=text, added_cond_kwargs=added), expected)
        assert_close(DiffusersModel(unet, return_dict=False)(x, 5, encoder_hidden_states=text, added_cond_kwargs=added),
                     expected)  # fmt: skip
        classes = diffusers.UNet2DModel(
            **options, in_channels=2, out_channels=2, num_class_embeds=4, down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ).double().eval()  # fmt: skip
        labels = torch.tensor([0, 1, 2])
        assert_close(DiffusersModel(classes)(x, times, class_labels=labels), classes(x, 5, labels).sample)


@pytest.mark.parametrize(
    "options, error, message",
    [({"channels": 0}, ValueError, "channels"), ({"time_scale": 0.0}, ValueError, "time_scale")],
)
def test_bad_options_of_diffusers_model(options, error, message):
    with pytest.raises(error, match=f"^{message}: "):
        DiffusersModel(Returns(lambda y: y), **options)
    with pytest.raises(TypeError, match="^model: "):
        DiffusersModel("unet")


# ------------------------------------------------------------------------------------------------------- KarrasDenoiser


def raw_network(preconditioning, data):
    """The raw network whose D is E[x0 | x], from the definitions of table 1."""

    def network(scaled, c_noise):
        sigma = (4 * c_noise).exp() if preconditioning == "edm" else 2 * c_noise.exp()
        sigma = per_sample(sigma)
        into = 1 / (sigma**2 + data**2).sqrt() if preconditioning == "edm" else torch.ones_like(sigma)
        skip = data**2 / (sigma**2 + data**2) if preconditioning == "edm" else torch.ones_like(sigma)
        out = sigma * data / (sigma**2 + data**2).sqrt() if preconditioning == "edm" else sigma
        x = scaled / into
        return (clean(x, 1, sigma) - skip * x) / out

    return network


@pytest.mark.parametrize("preconditioning", ["edm", "ve"])
@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
def test_raw_networks(preconditioning, prediction_type):
    data = 0.5
    denoiser = KarrasDenoiser(
        raw_network(preconditioning, data), preconditioning=preconditioning, sigma_data=data,
        prediction_type=prediction_type,
    )  # fmt: skip
    sigma = torch.tensor([0.01, 1.3, 70.0], dtype=torch.float64)
    x0 = clean(X, 1, per_sample(sigma))
    expected = x0 if prediction_type == "sample" else (X - x0) / per_sample(sigma)
    assert_close(denoiser(X, sigma), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_an_edm_denoiser_on_another_schedule(kind, prediction_type):
    schedule = NoiseSchedule.scaled_linear() if kind == "vp" else NoiseSchedule.flow()
    denoiser = KarrasDenoiser(
        lambda x, sigma: SimpleNamespace(sample=clean(x, 1, sigma.view(-1, 1, 1, 1))), preconditioning="none",
        schedule=schedule, prediction_type=prediction_type,
    )  # fmt: skip
    times = torch.tensor([3.0, 400.5, 990.0], dtype=torch.float64)
    alpha, sigma = (per_sample(v) for v in zip(*(schedule.level(float(t)) for t in times), strict=True))
    x0 = clean(X, alpha, sigma)
    expected = x0 if prediction_type == "sample" else (X - alpha * x0) / sigma
    assert_close(denoiser(X, times), expected, rtol=1e-9, atol=1e-9)
    assert denoiser(X.float(), times.float()).dtype == torch.float32


@pytest.mark.parametrize(
    "options, message",
    [
        ({"preconditioning": "vp"}, "preconditioning: expected one of edm, ve, none"),
        ({"sigma_data": 0.0}, "sigma_data: "),
        ({"prediction_type": "v_prediction"}, "prediction_type: "),
        ({"schedule": NoiseSchedule.linear().zero_terminal_snr()}, "schedule: "),
    ],
)
def test_bad_options_of_karras_denoiser(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        KarrasDenoiser(lambda x, s: x, **options)


# ----------------------------------------------------------------------------------------------------- ScheduleDenoiser


def predicts(kind, x, alpha, sigma):
    x0 = clean(x, alpha, sigma)
    epsilon = (x - alpha * x0) / sigma
    return {"epsilon": epsilon, "sample": x0, "v_prediction": alpha * epsilon - sigma * x0, "flow": epsilon - x0}[kind]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_a_model_of_a_schedule_as_edm_denoiser(prediction_type):
    schedule = NoiseSchedule.flow() if prediction_type == "flow" else NoiseSchedule.scaled_linear()

    def model(x, t):
        levels = [schedule.level(float(v)) for v in t]
        alpha, sigma = (per_sample(v) for v in zip(*levels, strict=True))
        return predicts(prediction_type, x, alpha, sigma)

    denoiser = ScheduleDenoiser(model, schedule, prediction_type=prediction_type)
    sigma = torch.tensor([0.05, 1.0, 12.0], dtype=torch.float64)
    assert_close(denoiser(X, sigma), clean(X, 1, per_sample(sigma)), rtol=1e-9, atol=1e-9)


def test_whole_times():
    told = []
    schedule = NoiseSchedule.scaled_linear()

    def model(x, t):
        told.append(t)
        return torch.zeros_like(x)

    denoiser = ScheduleDenoiser(model, schedule, whole_times=True)
    assert_close(denoiser(X, math.exp(-schedule.log_snr(500.4))), X)
    assert told[0].tolist() == [500, 500, 500] and told[0].dtype == torch.int64


@pytest.mark.parametrize(
    "schedule, options, message",
    [
        (NoiseSchedule.karras(), {}, "schedule: expected a vp or flow schedule"),
        (NoiseSchedule.linear().zero_terminal_snr(), {}, "schedule: alphas_cumprod ends at 0"),
        (NoiseSchedule.linear(), {"prediction_type": "flow"}, "prediction_type: "),
        (NoiseSchedule.flow(), {"prediction_type": "flow", "whole_times": True}, "whole_times: "),
    ],
)
def test_bad_options_of_schedule_denoiser(schedule, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ScheduleDenoiser(lambda x, t: x, schedule, **options)
