"""Schedulers of diffusers whose results are ours as well, and the loop that a pipeline runs around one."""

import torch

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
V = {"prediction_type": "v_prediction"}
SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

# (class, options, largest difference relative to the largest value)
DETERMINISTIC = [
    ("DDIM", {}, 1e-5),
    ("DDIM", {**SD, "clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}, 1e-5),
    ("DDIM", {"timestep_spacing": "trailing", "prediction_type": "sample", "clip_sample_range": 0.4}, 1e-5),
    ("DDIM", {"timestep_spacing": "linspace", "thresholding": True, "sample_max_value": 1.5}, 1e-5),
    ("DDIM", SNR, 1e-5),
    ("PNDM", {**SD, "skip_prk_steps": True, "steps_offset": 1}, 1e-5),
    ("PNDM", {"set_alpha_to_one": True}, 1e-5),
    ("PNDM", {**V, "skip_prk_steps": True}, 1e-5),
    ("DPMSolverMultistep", {}, 1e-5),
    ("DPMSolverMultistep", {"solver_order": 1, **V}, 1e-5),
    ("DPMSolverMultistep", {"solver_order": 3, "solver_type": "heun", "timestep_spacing": "leading"}, 1e-5),
    (
        "DPMSolverMultistep",
        {"final_sigmas_type": "sigma_min", "thresholding": True, "timestep_spacing": "trailing"},
        1e-4,
    ),
    ("DPMSolverMultistep", {"euler_at_final": True, "lower_order_final": False}, 1e-5),
    ("DPMSolverMultistep", SNR, 1e-5),
    # Levels between timesteps: log(sigma / alpha) is interpolated here and there, but in float32 there.
    ("DPMSolverMultistep", {"use_karras_sigmas": True, "solver_order": 3}, 1e-4),
    ("DPMSolverMultistep", {"use_lu_lambdas": True}, 1e-4),
    ("DPMSolverMultistep", {"use_exponential_sigmas": True}, 1e-4),
    ("DPMSolverMultistep", FLOW, 1e-5),
    ("UniPCMultistep", {}, 1e-5),
    ("UniPCMultistep", {"solver_order": 3, "use_karras_sigmas": True}, 1e-4),
    ("UniPCMultistep", {"solver_type": "bh1", "final_sigmas_type": "sigma_min", "lower_order_final": False}, 1e-5),
    ("UniPCMultistep", FLOW, 1e-5),
    ("EulerDiscrete", {}, 1e-4),
    ("EulerDiscrete", {**SD, "timestep_spacing": "leading", "steps_offset": 1}, 1e-5),
    ("EulerDiscrete", {**V, "timestep_spacing": "leading", "use_karras_sigmas": True}, 1e-4),
    ("EulerDiscrete", {"timestep_spacing": "trailing", "use_exponential_sigmas": True}, 1e-4),
    # It ends at x0 + sigma / alpha z, ours at alpha x0 + sigma z, with alpha = 0.99995.
    ("EulerDiscrete", {"timestep_spacing": "leading", "steps_offset": 1, "final_sigmas_type": "sigma_min"}, 1e-4),
    ("HeunDiscrete", {}, 1e-4),
    ("HeunDiscrete", {"use_karras_sigmas": True, "clip_sample": True, "clip_sample_range": 0.3}, 1e-4),
    ("FlowMatchEulerDiscrete", {}, 1e-5),
    ("FlowMatchEulerDiscrete", {"shift": 3.0, "shift_terminal": 0.1}, 1e-5),
    ("FlowMatchEulerDiscrete", {"shift": 3.0, "use_karras_sigmas": True}, 1e-5),
    ("FlowMatchEulerDiscrete", {"use_exponential_sigmas": True}, 1e-5),
]
STOCHASTIC = [
    ("DDPM", {}, 1e-5),
    ("DDPM", {"variance_type": "fixed_large", "beta_schedule": "squaredcos_cap_v2", "thresholding": True}, 1e-4),
    ("DDPM", {"variance_type": "fixed_small_log", "beta_schedule": "sigmoid", "clip_sample": False, **V}, 1e-5),
    ("DDPM", {"variance_type": "learned_range"}, 1e-5),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, 1e-5),
    ("EulerAncestralDiscrete", {"timestep_spacing": "leading"}, 1e-5),
    ("EulerAncestralDiscrete", V, 1e-4),
]


def name_of(case):
    return f"{case[0]} {' '.join(map(str, case[1].values()))}"


def model(x, t):
    """A nonlinear denoiser with every sample's time in it."""
    t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1, 1)
    return 0.5 * torch.tanh(0.9 * x) + 0.1 * torch.sin(3 * x + 0.001 * t)


def learned(x, t):
    """The same with a variance beside it."""
    return torch.cat([model(x, t), torch.sin(x)], 1)


def pipeline(scheduler, steps, x, predict=model, **options):
    """What a pipeline does with a scheduler; x is standard normal noise."""
    scheduler.set_timesteps(steps)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(predict(scaled, t), t, x, **options).prev_sample
    return x
