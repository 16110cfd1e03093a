"""onnxruntime and OpenVINO as providers: a torch module, exported to ONNX, run with buffers bound beforehand."""

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from pydenoise.benchmarks.providers import Setting, require

OPSET = 17


def export_onnx(module: nn.Module, inputs: Sequence[Tensor]) -> bytes:
    """``module`` as an ONNX graph for inputs of these shapes.

    torch.export makes the shapes constant, which the argument checks of a module need; then the tracing exporter is
    used, because it takes no package beside torch and onnx.
    """
    require("onnx")
    buffer = io.BytesIO()
    options = {
        "input_names": [f"input{i}" for i in range(len(inputs))],
        "output_names": ["output"],
        "opset_version": OPSET,
        "training": torch.onnx.TrainingMode.PRESERVE,  # an exported program has no train() and eval()
        "dynamo": False,
    }
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecation of the tracing exporter, constants in traced shapes
        fixed = torch.export.export(module, tuple(inputs)).module(check_guards=False)
        torch.onnx.export(fixed, tuple(inputs), buffer, **options)
    return buffer.getvalue()


def onnxruntime_call(graph: bytes | Path, inputs: Sequence[Tensor], setting: Setting) -> Callable[[], Tensor]:
    """A call that runs ``graph`` (or the file) in onnxruntime, input and output bound to fixed memory."""
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # after a run, its threads would spin on and slow down the contender that comes next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(
        graph if isinstance(graph, bytes) else str(graph), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    arrays = [numpy.ascontiguousarray(tensor.numpy()) for tensor in inputs]
    for meta, array in zip(session.get_inputs(), arrays, strict=True):
        binding.bind_ortvalue_input(meta.name, ort.OrtValue.ortvalue_from_numpy(array))
    output = session.get_outputs()[0]
    binding.bind_ortvalue_output(output.name, ort.OrtValue.ortvalue_from_shape_and_type(output.shape, numpy.float32))

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0]

    call.result = lambda: torch.from_numpy(call().numpy().copy())
    return call


def openvino_call(
    graph: bytes | Path,
    inputs: Sequence[Tensor],
    setting: Setting,
    *,
    precision: str = "f32",
    channels_last: bool = False,
) -> Callable[[], Tensor]:
    """A call that runs ``graph`` (or the file) in OpenVINO, tuned for latency.

    The precision is always stated, because the plugin takes bf16 by itself where the processor has it. With
    ``channels_last`` image and result are NHWC, which was faster in every single layer tried (less reordering).
    """
    ov = require("openvino")
    core = ov.Core()
    model = core.read_model(graph)
    if channels_last:
        model = _nhwc(ov, model)
    properties = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": setting.threads,
    }
    request = core.compile_model(model, "CPU", properties).create_infer_request()
    tensors = []
    for index, tensor in enumerate(inputs):
        array = tensor.permute(0, 2, 3, 1) if channels_last else tensor
        tensors.append(ov.Tensor(numpy.ascontiguousarray(array.numpy()), shared_memory=True))
        request.set_input_tensor(index, tensors[-1])

    def call() -> None:
        request.infer()

    def result() -> Tensor:
        request.infer()
        output = torch.from_numpy(request.get_output_tensor().data.copy())
        return output.permute(0, 3, 1, 2) if channels_last else output

    call.result = result
    call.keep_alive = tensors
    return call


def _nhwc(ov, model):
    steps = ov.preprocess.PrePostProcessor(model)
    for index in range(len(model.inputs)):
        steps.input(index).tensor().set_layout(ov.Layout("NHWC"))
        steps.input(index).model().set_layout(ov.Layout("NCHW"))
    steps.output().tensor().set_layout(ov.Layout("NHWC"))
    steps.output().model().set_layout(ov.Layout("NCHW"))
    return steps.build()


def compile_inductor(module: nn.Module) -> Callable:
    """``module`` through ``torch.compile``, weights frozen in (as one would for inference), max-autotune off."""
    import torch._inductor.config as config

    torch._dynamo.reset()
    frozen = config.patch(freezing=True)
    compiled = torch.compile(module, fullgraph=True)

    def call(*inputs):
        with frozen:
            return compiled(*inputs)

    return call
