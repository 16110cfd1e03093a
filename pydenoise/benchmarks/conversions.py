"""Exports and int8 conversions for the other engines, kept on disk because they take minutes.

They lie in ``$PYDENOISE_CACHE/bench`` (or ``~/.cache/pydenoise/bench``), one folder each; the folder's name holds a
digest of the weights, the inputs and the versions of every package involved. Deleting them is safe.
"""

import copy
import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from pydenoise.benchmarks.engines import OPSET, export_onnx
from pydenoise.benchmarks.machine import cpu_model, version
from pydenoise.benchmarks.providers import require
from pydenoise.benchmarks.workloads import Workload
from pydenoise.models.weights import cache_directory

REVISION = 1  # raised when a conversion below changes
# onnxruntime in networks with attention: quantizing MatMul, Add, Sigmoid and Softmax too took 1.5 times as long.
ORT_WITH_ATTENTION = ("Conv", "Gemm")


def cached(workload: Workload, stem: str, packages: tuple[str, ...], make: Callable[[Path], None]) -> Path:
    """The folder that ``make`` filled, now or in an earlier run with the same workload and the same ``packages``."""
    digest = hashlib.sha256(f"{REVISION} {stem} {OPSET}".encode())
    for package in ("torch", "diffusers", *packages):
        digest.update(f" {package} {version(package)}".encode())
    for part in _contents(workload):
        digest.update(part)
    folder = cache_directory() / "bench" / f"{stem}-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        make(work)
        os.replace(work, folder)
    except OSError:
        if not folder.is_dir():  # another process may have been first
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _contents(workload: Workload) -> Iterator[bytes]:
    yield repr(workload.network).encode()
    tensors = [*workload.network.state_dict().values(), *workload.inputs, *(t for b in workload.calibration for t in b)]
    for tensor in tensors:
        yield f"{tensor.dtype}{tuple(tensor.shape)}".encode()
        yield tensor.detach().contiguous().numpy().tobytes()


def has_attention(network: nn.Module) -> bool:
    return any("attention" in type(module).__name__.lower() for module in network.modules())


# ------------------------------------------------------------------------------------------------------------- ONNX


def onnx_file(workload: Workload) -> Path:
    """``workload`` in float32 as ONNX."""
    require("onnx")

    def make(folder: Path) -> None:
        (folder / "model.onnx").write_bytes(export_onnx(workload.module, workload.inputs))

    return cached(workload, "onnx", ("onnx",), make) / "model.onnx"


def onnxruntime_int8(workload: Workload) -> Path:
    """Static QDQ quantization as onnxruntime's documentation has it for x86 with VNNI: u8 activations, s8 weights per
    channel, after its own shape inference and graph optimisation."""
    require("onnxruntime")
    require("onnx")
    source = onnx_file(workload)
    quantized_ops = list(ORT_WITH_ATTENTION) if has_attention(workload.network) else None  # None: all it knows

    def make(folder: Path) -> None:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            def __init__(self):
                self.batches = iter(workload.calibration)

            def get_next(self):
                batch = next(self.batches, None)
                return None if batch is None else {f"input{i}": tensor.numpy() for i, tensor in enumerate(batch)}

        quant_pre_process(source, folder / "prepared.onnx")
        quantize_static(
            folder / "prepared.onnx",
            folder / "model.onnx",
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=quantized_ops,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        (folder / "prepared.onnx").unlink()

    return cached(workload, "onnxruntime-int8", ("onnx", "onnxruntime"), make) / "model.onnx"


def openvino_int8(workload: Workload) -> Path:
    """NNCF post-training quantization; with attention, as a transformer (scores kept out, SmoothQuant); otherwise with
    the "mixed" preset, which NNCF advises for activations other than ReLU and which was as fast as the other."""
    ov = require("openvino")
    require("nncf")
    source = onnx_file(workload)

    def make(folder: Path) -> None:
        import nncf

        batches = [tuple(tensor.numpy() for tensor in batch) for batch in workload.calibration]
        kind = {"preset": nncf.QuantizationPreset.MIXED}
        if has_attention(workload.network):
            kind["model_type"] = nncf.ModelType.TRANSFORMER
        model = ov.Core().read_model(source)
        quantized = nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches), **kind)
        ov.save_model(quantized, folder / "model.xml", compress_to_fp16=False)

    return cached(workload, "openvino-int8", ("onnx", "openvino", "nncf"), make) / "model.xml"


# --------------------------------------------------------------------------------------------------------- inductor


def inductor_package(workload: Workload, precision: str, threads: int) -> Path:
    """``workload`` compiled by inductor ahead of time, weights frozen, channels_last: "fp32", "bf16" or "int8".

    The same kernels as ``torch.compile`` makes, without the Python around them (guards, wrapper): faster for networks
    of many small layers. "int8" is PT2E quantization with torchao's x86 quantizer and the rest in bfloat16 by autocast.
    The code is made for this processor and number of threads.
    """
    packages = ()
    if precision == "int8":
        require("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", "torchao")
        packages = ("torchao",)
    stem = f"inductor-{precision}-{threads}-{hashlib.sha256(cpu_model().encode()).hexdigest()[:8]}"

    def make(folder: Path) -> None:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        inputs = tuple(channels_last(tensor.to(dtype)) for tensor in workload.inputs)
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")
            module = copy.deepcopy(workload.module).to(dtype=dtype, memory_format=torch.channels_last)
            if precision == "int8":
                module = _pt2e(module, inputs, workload.calibration)
            # an exported program holds no autocast: the compiler must see it too
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "int8"):
                program = torch.export.export(module, inputs)
                _without_dtype_checks(program.graph_module)
                path, options = str(folder / "model.pt2"), {"freezing": True}
                torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)

    return cached(workload, stem, packages, make) / "model.pt2"


def channels_last(tensor: Tensor) -> Tensor:
    """Images in channels_last memory; everything else as it is."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _pt2e(module: nn.Module, inputs: tuple[Tensor, ...], batches: list[tuple[Tensor, ...]]) -> nn.Module:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(module, inputs).module(check_guards=False), quantizer)
    for batch in batches:
        prepared(*batch)
    return _without_dtype_checks(convert_pt2e(prepared))


def _without_dtype_checks(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """``module`` without the dtype assertions of torch.export, which autocast to bfloat16 would trip over."""
    for node in list(module.graph.nodes):
        if node.op == "call_function" and "_assert_tensor_metadata" in str(node.target):
            module.graph.erase_node(node)
    module.recompile()
    return module
