"""Providers of the ``networks`` suite: whole image denoisers, and their float64 reference."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pydenoise.benchmarks.cases import NetworkBench
from pydenoise.benchmarks.convolution import Expected
from pydenoise.benchmarks.engines import compile_inductor, export_onnx, onnxruntime_call, openvino_call
from pydenoise.benchmarks.providers import Contender, Provider, Setting, cpu_only, images


def build_network(case: NetworkBench) -> nn.Module:
    """The network of ``case`` in eval mode, with the same random weights every time."""
    import pydenoise.models as models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = getattr(models, case.model)(**dict(case.arguments)).eval().requires_grad_(False)
        for module in network.modules():  # torch's default start lets the signal fade over many layers
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    if isinstance(network, models.DnCNN):
        network.randomize_statistics()
    return network


def network_inputs(case: NetworkBench) -> tuple[Tensor, ...]:
    """A noisy picture of random values in [0, 1], and the noise level where the network takes one."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, case.channels, case.size, case.size, generator=generator)
    return (image,) if case.sigma is None else (image, torch.full((1, 1, 1, 1), case.sigma))


class _Bound(nn.Module):
    """The network with its noise level bound as a constant, so that every engine gets a picture and nothing else."""

    def __init__(self, network: nn.Module, rest: tuple[Tensor, ...]):
        super().__init__()
        self.network = network
        for index, tensor in enumerate(rest):
            self.register_buffer(f"rest{index}", tensor)
        self.count = len(rest)

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image, *(getattr(self, f"rest{i}") for i in range(self.count)))


def _bound(case: NetworkBench, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    image, *rest = network_inputs(case)
    return _Bound(build_network(case), tuple(rest)).to(dtype).eval(), image.to(dtype)


def _contender(call: Callable[[Tensor], Tensor], image: Tensor) -> Contender:
    def run() -> Tensor:
        with torch.inference_mode():
            return call(image)

    return Contender(run, lambda: {"output": images(run())})


def _ours(precision: str):
    def prepare(case: NetworkBench, setting: Setting) -> Contender:
        from pydenoise import accelerate

        network, inputs = build_network(case), tuple(t.to(setting.device) for t in network_inputs(case))
        model, _ = accelerate(network.to(setting.device), inputs, precision=precision)
        image, *rest = inputs
        return _contender(lambda x: model(x, *rest), image.contiguous(memory_format=torch.channels_last))

    return prepare


def _eager(memory_format: torch.memory_format, dtype: torch.dtype = torch.float32):
    def prepare(case: NetworkBench, setting: Setting) -> Contender:
        network, image = _bound(case, dtype)
        network = network.to(device=setting.device, memory_format=memory_format)
        return _contender(network, image.to(setting.device).contiguous(memory_format=memory_format))

    return prepare


def _inductor(case: NetworkBench, setting: Setting) -> Contender:
    network, image = _bound(case)
    network = network.to(device=setting.device, memory_format=torch.channels_last)
    image = image.to(setting.device).contiguous(memory_format=torch.channels_last)
    return _contender(compile_inductor(network), image)


def _onnxruntime(case: NetworkBench, setting: Setting) -> Contender:
    cpu_only(setting)
    network, image = _bound(case)
    call = onnxruntime_call(export_onnx(network, (image,)), (image,), setting)
    return Contender(call, lambda: {"output": images(call.result())})


def _openvino(precision: str):
    def prepare(case: NetworkBench, setting: Setting) -> Contender:
        cpu_only(setting)
        network, image = _bound(case)
        call = openvino_call(export_onnx(network, (image,)), (image,), setting, precision=precision)
        return Contender(call, lambda: {"output": images(call.result())})

    return prepare


CL, NCHW = torch.channels_last, torch.contiguous_format

PROVIDERS = (
    Provider("ours-fp32", "ours fp32", _ours("fp32"), ours=True),
    Provider("ours-bf16", "ours bf16", _ours("bf16"), "bf16", ours=True),
    Provider("torch", "torch", _eager(NCHW)),
    Provider("torch-channels-last", "torch CL", _eager(CL)),
    Provider("torch-bf16", "torch bf16 CL", _eager(CL, torch.bfloat16), "bf16"),
    Provider("inductor", "inductor", _inductor),
    Provider("onnxruntime", "ORT", _onnxruntime),
    Provider("openvino", "OpenVINO", _openvino("f32")),
    Provider("openvino-bf16", "OpenVINO bf16", _openvino("bf16"), "bf16"),
)


def expected_results(case: NetworkBench, setting: Setting) -> Expected:
    """The whole network in float64."""
    network, image = _bound(case, torch.float64)
    with torch.inference_mode():
        return {"output": [((Ellipsis,), copy.deepcopy(network)(image))]}
