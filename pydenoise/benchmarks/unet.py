"""Providers of the ``unet`` suite: whole networks in float and in int8, and their float64 reference.

Every rival runs in the best setting that was found for it: see ``bench/NOTES.md``.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from pydenoise.benchmarks import conversions
from pydenoise.benchmarks.convolution import Expected
from pydenoise.benchmarks.engines import onnxruntime_call, openvino_call
from pydenoise.benchmarks.providers import RESULT_BOUNDS, Contender, Provider, Setting, cpu_only, images
from pydenoise.benchmarks.unet_cases import UnetBench
from pydenoise.benchmarks.workloads import Workload, build_workload, first_tensor

CL, NCHW = torch.channels_last, torch.contiguous_format
BOUNDS = RESULT_BOUNDS | {"bf16": 0.1}  # rounding adds up over the layers of a U-Net


def _workload(case: UnetBench) -> Workload:
    return build_workload(case.workload, case.batch)


def _contender(call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Contender:
    def run() -> Tensor:
        with torch.inference_mode():
            return call(*inputs)

    return Contender(run, lambda: {"output": images(run())})


# ------------------------------------------------------------------------------------------------------------ ours


def _ours(precision: str):
    """The network itself, as a user has it, through ``pydenoise.accelerate``."""

    def prepare(case: UnetBench, setting: Setting) -> Contender:
        from pydenoise import accelerate

        workload = _workload(case)
        inputs = tuple(tensor.to(setting.device) for tensor in workload.inputs)
        options = {"measure": False}
        if precision == "int8":
            batches = [tuple(tensor.to(setting.device) for tensor in batch) for batch in workload.calibration]
            options["calibration"] = batches
        model, report = accelerate(workload.network.to(setting.device), inputs, precision=precision, **options)
        if precision == "int8" and not any(swap.kernel == "int8" for swap in report.swapped):
            raise RuntimeError(f"no layer runs in int8: {'; '.join(report.notes) or report}")
        contender = _contender(lambda *tensors: first_tensor(model(*tensors)), inputs)
        contender.note = str(report)
        return contender

    return prepare


# ----------------------------------------------------------------------------------------------------------- torch


def _module(workload: Workload, setting: Setting, dtype: torch.dtype, memory_format: torch.memory_format):
    module = workload.module.to(device=setting.device, dtype=dtype, memory_format=memory_format)
    inputs = tuple(tensor.to(setting.device, dtype) for tensor in workload.inputs)
    return module, inputs if memory_format == NCHW else tuple(map(conversions.channels_last, inputs))


def _eager(memory_format: torch.memory_format, dtype: torch.dtype = torch.float32):
    def prepare(case: UnetBench, setting: Setting) -> Contender:
        return _contender(*_module(_workload(case), setting, dtype, memory_format))

    return prepare


def _inductor(precision: str):
    def prepare(case: UnetBench, setting: Setting) -> Contender:
        cpu_only(setting)
        workload = _workload(case)
        package = conversions.inductor_package(workload, precision, setting.threads)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        inputs = tuple(conversions.channels_last(tensor.to(dtype)) for tensor in workload.inputs)
        return _contender(torch._inductor.aoti_load_package(str(package)), inputs)

    return prepare


# --------------------------------------------------------------------------------------------------------- engines


def _engine_contender(call: Callable[[], object]) -> Contender:
    return Contender(call, lambda: {"output": images(call.result())})


def _onnxruntime(convert: Callable):
    def prepare(case: UnetBench, setting: Setting) -> Contender:
        cpu_only(setting)
        workload = _workload(case)
        return _engine_contender(onnxruntime_call(convert(workload), workload.inputs, setting))

    return prepare


def _openvino(convert: Callable, precision: str):
    def prepare(case: UnetBench, setting: Setting) -> Contender:
        cpu_only(setting)
        workload = _workload(case)
        call = openvino_call(convert(workload), workload.inputs, setting, precision=precision)
        return _engine_contender(call)

    return prepare


PROVIDERS = (
    Provider("ours-int8", "ours int8", _ours("int8"), "int8", ours=True),
    Provider("ours-bf16", "ours bf16", _ours("bf16"), "bf16", ours=True, default=False),
    Provider("ours-fp32", "ours fp32", _ours("fp32"), ours=True),
    Provider("torch", "torch", _eager(NCHW)),
    Provider("torch-channels-last", "torch CL", _eager(CL)),
    Provider("inductor", "inductor", _inductor("fp32")),
    Provider("inductor-bf16", "inductor bf16", _inductor("bf16"), "bf16"),
    Provider("inductor-int8", "inductor int8", _inductor("int8"), "int8"),
    Provider("onnxruntime", "ORT", _onnxruntime(conversions.onnx_file)),
    Provider("onnxruntime-int8", "ORT int8", _onnxruntime(conversions.onnxruntime_int8), "int8"),
    Provider("openvino", "OpenVINO", _openvino(conversions.onnx_file, "f32")),
    Provider("openvino-bf16", "OpenVINO bf16", _openvino(conversions.onnx_file, "bf16"), "bf16"),
    Provider("openvino-int8", "OpenVINO int8", _openvino(conversions.openvino_int8, "bf16"), "int8"),
)


def expected_results(case: UnetBench, setting: Setting) -> Expected:
    """The whole network in float64."""
    workload = _workload(case)
    with torch.inference_mode():
        module = copy.deepcopy(workload.module).double()
        return {"output": [((Ellipsis,), module(*(tensor.double() for tensor in workload.inputs)))]}
