// pydenoise._cuda: torch ops of the int8 CUDA kernels. Outputs are allocated in Python, dense and in memory order: the
// last dim of what comes in and goes out here is the channels.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../int8_conv2d/cuda.h"
#include "../norm_quantize/cuda.h"
#include "../quantize/cuda.h"
#include "cuda_tensors.h"

namespace pdn {
namespace bindings {
namespace {

using cuda::Element;

Element element_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return Element::float32;
        case ScalarType::BFloat16:
            return Element::bfloat16;
        case ScalarType::Half:
            return Element::float16;
        case ScalarType::Char:
            return Element::int8;
        case ScalarType::Int:
            return Element::int32;
        default:
            STD_TORCH_CHECK(false, "int8 CUDA kernels: unexpected dtype");
    }
}

// `tensor` lies on `like`'s device, contiguous, with `numel` elements of `type`.
void check(const char* name, const Tensor& tensor, const Tensor& like, ScalarType type, int64_t numel) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                    ": not on input's device");
    STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": unexpected dtype");
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == numel, name, ": expected ", numel,
                    " contiguous elements");
}

void check(const char* name, const MaybeTensor& tensor, const Tensor& like, ScalarType type, int64_t numel) {
    if (tensor) check(name, *tensor, like, type, numel);
}

const float* floats(const char* name, const MaybeTensor& tensor, const Tensor& like, int64_t numel) {
    check(name, tensor, like, ScalarType::Float, numel);
    return static_cast<const float*>(pointer(tensor));
}

const int32_t* ints(const char* name, const MaybeTensor& tensor, const Tensor& like, int64_t numel) {
    check(name, tensor, like, ScalarType::Int, numel);
    return static_cast<const int32_t*>(pointer(tensor));
}

void check_launch(const char* op, const char* why) { STD_TORCH_CHECK(why == nullptr, op, " on CUDA: ", why); }

int32_t narrow(const char* name, int64_t value) {
    STD_TORCH_CHECK(value >= 0 && value < int64_t{1} << 30, name, ": ", value, " is out of range");
    return static_cast<int32_t>(value);
}

// ------------------------------------------------------------------------------------------------------- convolution

using ConvProblem = int8_conv2d::cuda::Problem;

// Everything but the geometry. `pixels` is the number of scales where there is one for every pixel.
void set_tensors(ConvProblem& p, const Tensor& input, const Tensor& weight, const Tensor& input_scale,
                 const Tensor& weight_scale, const MaybeTensor& zero_point, const MaybeTensor& bias,
                 const MaybeTensor& channel_bias, const MaybeTensor& film, const MaybeTensor& residual,
                 const MaybeTensor& out_scale, const MaybeTensor& out_zero_point, const Tensor& output,
                 int64_t pixels) {
    const int64_t channels = p.out_channels, batch = p.batch;
    STD_TORCH_CHECK(input.scalar_type() == ScalarType::Char, "input: expected int8");
    check("weight", weight, input, ScalarType::Char, channels * p.kernel_h * p.kernel_w * (p.in_channels / p.groups));
    p.per_pixel = input_scale.dim() > 0;
    const int64_t scales = p.per_pixel ? pixels : 1;
    p.input = static_cast<const int8_t*>(input.data_ptr()), p.weight = static_cast<const int8_t*>(weight.data_ptr());
    p.input_scale = floats("input_scale", input_scale, input, scales);
    p.zero_point = ints("input_zero_point", zero_point, input, scales);
    p.weight_scale = floats("weight_scale", weight_scale, input, channels);
    p.bias = floats("bias", bias, input, channels);
    p.channel_bias = floats("channel_bias", channel_bias, input, batch * channels);
    p.film = floats("film", film, input, 2 * batch * channels);
    p.out_scale = floats("out_scale", out_scale, input, 1);
    p.out_zero_point = ints("out_zero_point", out_zero_point, input, 1);
    p.out_type = element_of(output);
    STD_TORCH_CHECK(p.out_type != Element::int8 || p.out_scale, "out_scale: expected for int8 outputs");
    check("output", output, input, output.scalar_type(), batch * p.out_h * p.out_w * channels);
    if (residual) {
        p.residual_type = element_of(*residual);
        check("residual", residual, input, residual->scalar_type(), output.numel());
    }
    p.residual = pointer(residual), p.output = output.data_ptr();
}

void launch_conv(ConvProblem& p, const Tensor& input) {
    const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
    const auto device = int8_conv2d::cuda::current_device();
    const int64_t bytes = int8_conv2d::cuda::workspace_bytes(p, device);
    MaybeTensor workspace;
    if (bytes > 0) {
        workspace = torch::stable::new_empty(input, Ints{bytes / 4}, ScalarType::Float);
        p.workspace = workspace->data_ptr();
    }
    check_launch("int8_conv2d", int8_conv2d::cuda::run(p, device, current_stream(input.get_device_index())));
}

// `input` [N, H, W, C] with adjacent channels, `weight` [C_out, K_h, K_w, C_in / groups], `output` [N, H, W, C_out];
// `geometry` is stride (2), padding (top, bottom, left, right), dilation (2), groups, upsample.
void conv2d(const Tensor& input, const Tensor& weight, const Tensor& input_scale, const Tensor& weight_scale,
            const MaybeTensor& zero_point, const MaybeTensor& bias, const MaybeTensor& channel_bias,
            const MaybeTensor& film, const MaybeTensor& residual, const MaybeTensor& out_scale,
            const MaybeTensor& out_zero_point, Tensor output, Ints geometry, int64_t activation) {
    STD_TORCH_CHECK(geometry.size() == 10, "geometry: expected 10 ints");
    STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4 && output.dim() == 4, "expected four dims");
    STD_TORCH_CHECK(input.stride(3) == 1 || input.size(3) == 1, "input: expected adjacent channels");
    ConvProblem p{};
    p.batch = narrow("input", input.size(0)), p.in_h = narrow("input", input.size(1));
    p.in_w = narrow("input", input.size(2)), p.in_channels = narrow("input", input.size(3));
    p.out_h = narrow("output", output.size(1)), p.out_w = narrow("output", output.size(2));
    p.out_channels = narrow("weight", weight.size(0));
    p.kernel_h = narrow("weight", weight.size(1)), p.kernel_w = narrow("weight", weight.size(2));
    p.stride_h = narrow("stride", geometry[0]), p.stride_w = narrow("stride", geometry[1]);
    p.top = narrow("padding", geometry[2]), p.left = narrow("padding", geometry[4]);
    p.dilation_h = narrow("dilation", geometry[6]), p.dilation_w = narrow("dilation", geometry[7]);
    p.groups = narrow("groups", geometry[8]), p.upsample_shift = geometry[9] == 2 ? 1 : 0;
    p.activation = static_cast<int>(activation);
    STD_TORCH_CHECK(p.groups > 0 && p.in_channels % p.groups == 0 && p.out_channels % p.groups == 0,
                    "groups: not a divisor of the channels");
    STD_TORCH_CHECK(weight.size(3) * p.groups == p.in_channels, "weight: wrong number of channels");
    const auto stride = [&input](int64_t axis) { return input.size(axis) > 1 ? input.stride(axis) : 0; };
    p.in_stride_n = stride(0), p.in_stride_h = stride(1), p.in_stride_w = stride(2);
    set_tensors(p, input, weight, input_scale, weight_scale, zero_point, bias, channel_bias, film, residual, out_scale,
                out_zero_point, output, input.size(0) * input.size(1) * input.size(2));
    launch_conv(p, input);
}

// `input` [T, K], `weight` [O, K], `output` [T, O].
void linear(const Tensor& input, const Tensor& weight, const Tensor& input_scale, const Tensor& weight_scale,
            const MaybeTensor& zero_point, const MaybeTensor& bias, const MaybeTensor& residual,
            const MaybeTensor& out_scale, const MaybeTensor& out_zero_point, Tensor output, int64_t activation) {
    STD_TORCH_CHECK(input.dim() == 2 && weight.dim() == 2 && output.dim() == 2, "expected two dims");
    STD_TORCH_CHECK(input.stride(1) == 1 || input.size(1) == 1, "input: expected adjacent channels");
    ConvProblem p{};
    p.batch = p.in_h = p.out_h = p.kernel_h = p.kernel_w = p.groups = 1;
    p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
    p.in_w = p.out_w = narrow("input", input.size(0));
    p.in_channels = narrow("input", input.size(1)), p.out_channels = narrow("weight", weight.size(0));
    p.activation = static_cast<int>(activation);
    p.in_stride_w = input.size(0) > 1 ? input.stride(0) : 0;
    set_tensors(p, input, weight, input_scale, weight_scale, zero_point, bias, {}, {}, residual, out_scale,
                out_zero_point, output, input.size(0));
    launch_conv(p, input);
}

// ----------------------------------------------------------------------------------------------------- quantization

using QuantizeProblem = quantize::cuda::Problem;

// `codes` are dense [..., C], `values` their floating-point side.
QuantizeProblem quantize_problem(const Tensor& values, const Tensor& codes, const MaybeTensor& channel_scale,
                                 int64_t activation) {
    QuantizeProblem p{};
    p.type = element_of(values), p.activation = static_cast<int>(activation);
    p.channels = codes.size(codes.dim() - 1), p.rows = p.channels == 0 ? 0 : codes.numel() / p.channels;
    check("codes", codes, values, ScalarType::Char, codes.numel());
    check("values", values, codes, values.scalar_type(),
          codes.numel() * (p.activation == quantize::cuda::kGeglu ? 2 : 1));
    p.channel_scale = floats("channel_scale", channel_scale, values, p.channels);
    return p;
}

void set_scale(QuantizeProblem& p, const Tensor& scale, const MaybeTensor& zero_point, const Tensor& like) {
    p.per_row = scale.dim() > 0;
    p.scale = floats("scale", scale, like, p.per_row ? p.rows : 1);
    p.zero_point = ints("zero_point", zero_point, like, p.per_row ? p.rows : 1);
}

void quantize_static(const Tensor& input, const Tensor& scale, const MaybeTensor& zero_point,
                     const MaybeTensor& channel_scale, Tensor output, int64_t activation) {
    QuantizeProblem p = quantize_problem(input, output, channel_scale, activation);
    set_scale(p, scale, zero_point, input);
    p.input = input.data_ptr(), p.output = output.data_ptr();
    const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
    check_launch("quantize", quantize::cuda::run_static(p, current_stream(input.get_device_index())));
}

void quantize_dynamic(const Tensor& input, const MaybeTensor& channel_scale, Tensor output, Tensor scale,
                      Tensor zero_point, int64_t activation, bool symmetric) {
    QuantizeProblem p = quantize_problem(input, output, channel_scale, activation);
    check("scale", scale, input, ScalarType::Float, p.rows);
    check("zero_point", zero_point, input, ScalarType::Int, p.rows);
    p.input = input.data_ptr(), p.output = output.data_ptr(), p.symmetric = symmetric;
    p.row_scale = static_cast<float*>(scale.data_ptr()),
    p.row_zero_point = static_cast<int32_t*>(zero_point.data_ptr());
    const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
    check_launch("quantize_dynamic", quantize::cuda::run_dynamic(p, current_stream(input.get_device_index())));
}

void dequantize(const Tensor& input, const Tensor& scale, const MaybeTensor& zero_point, Tensor output) {
    QuantizeProblem p = quantize_problem(output, input, {}, 0);
    set_scale(p, scale, zero_point, input);
    p.input = input.data_ptr(), p.output = output.data_ptr();
    const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
    check_launch("dequantize", quantize::cuda::run_dequantize(p, current_stream(input.get_device_index())));
}

// ------------------------------------------------------------------------------------------------------------- norms

using NormProblem = norm_quantize::cuda::Problem;

// `output` is dense [N, pixels, C]; either `scale` or the two results per row are given.
NormProblem norm_problem(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, double eps,
                         const MaybeTensor& film, const MaybeTensor& channel_scale, const MaybeTensor& scale,
                         const MaybeTensor& zero_point, const Tensor& output, const MaybeTensor& row_scale,
                         const MaybeTensor& row_zero_point) {
    STD_TORCH_CHECK(input.dim() == 3 && output.dim() == 3, "expected [N, pixels, C]");
    NormProblem p{};
    p.type = element_of(input), p.eps = static_cast<float>(eps);
    p.batch = narrow("input", input.size(0)), p.pixels = narrow("input", input.size(1));
    p.first_channels = narrow("input", input.size(2)), p.channels = narrow("output", output.size(2));
    check("input", input, output, input.scalar_type(), static_cast<int64_t>(p.batch) * p.pixels * p.first_channels);
    check("output", output, input, ScalarType::Char, static_cast<int64_t>(p.batch) * p.pixels * p.channels);
    p.weight = floats("weight", weight, input, p.channels), p.bias = floats("bias", bias, input, p.channels);
    p.film = floats("film", film, input, static_cast<int64_t>(p.batch) * 2 * p.channels);
    p.channel_scale = floats("channel_scale", channel_scale, input, p.channels);
    p.scale = floats("scale", scale, input, 1), p.zero_point = ints("zero_point", zero_point, input, 1);
    const int64_t rows = static_cast<int64_t>(p.batch) * p.pixels;
    STD_TORCH_CHECK(scale || (row_scale && row_zero_point), "scale: neither given nor asked for");
    p.row_scale = const_cast<float*>(floats("row_scale", row_scale, input, rows));
    p.row_zero_point = const_cast<int32_t*>(ints("row_zero_point", row_zero_point, input, rows));
    p.input = input.data_ptr(), p.output = static_cast<int8_t*>(output.data_ptr());
    return p;
}

void group_norm(const Tensor& input, const MaybeTensor& skip, int64_t groups, const MaybeTensor& weight,
                const MaybeTensor& bias, double eps, const MaybeTensor& film, int64_t activation,
                const MaybeTensor& channel_scale, const MaybeTensor& scale, const MaybeTensor& zero_point,
                Tensor output, MaybeTensor row_scale, MaybeTensor row_zero_point) {
    NormProblem p = norm_problem(input, weight, bias, eps, film, channel_scale, scale, zero_point, output, row_scale,
                                 row_zero_point);
    p.groups = narrow("groups", groups), p.activation = static_cast<int>(activation);
    STD_TORCH_CHECK(p.groups > 0 && p.channels % p.groups == 0, "groups: not a divisor of the channels");
    check("skip", skip, input, input.scalar_type(),
          static_cast<int64_t>(p.batch) * p.pixels * (p.channels - p.first_channels));
    STD_TORCH_CHECK(skip || p.channels == p.first_channels, "output: wrong number of channels");
    p.skip = pointer(skip);
    const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
    const int multiprocessors = norm_quantize::cuda::current_multiprocessors();
    const int64_t size = norm_quantize::cuda::workspace_floats(p, multiprocessors);
    const Tensor workspace = torch::stable::new_empty(input, Ints{size}, ScalarType::Float);
    p.workspace = static_cast<float*>(workspace.data_ptr());
    check_launch("group_norm_quantize",
                 norm_quantize::cuda::group_norm(p, multiprocessors, current_stream(input.get_device_index())));
}

void layer_norm(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, double eps,
                const MaybeTensor& film, const MaybeTensor& channel_scale, const MaybeTensor& scale,
                const MaybeTensor& zero_point, Tensor output, MaybeTensor row_scale, MaybeTensor row_zero_point) {
    const NormProblem p = norm_problem(input, weight, bias, eps, film, channel_scale, scale, zero_point, output,
                                       row_scale, row_zero_point);
    STD_TORCH_CHECK(p.channels == p.first_channels, "output: wrong number of channels");
    const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
    check_launch("layer_norm_quantize", norm_quantize::cuda::layer_norm(p, current_stream(input.get_device_index())));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def(
        "int8_conv2d_cuda(Tensor input, Tensor weight, Tensor input_scale, Tensor weight_scale, Tensor? zero_point, "
        "Tensor? bias, Tensor? channel_bias, Tensor? film, Tensor? residual, Tensor? out_scale, Tensor? "
        "out_zero_point, Tensor(a!) output, int[] geometry, int activation) -> ()");
    m.def(
        "int8_linear_cuda(Tensor input, Tensor weight, Tensor input_scale, Tensor weight_scale, Tensor? zero_point, "
        "Tensor? bias, Tensor? residual, Tensor? out_scale, Tensor? out_zero_point, Tensor(a!) output, int activation) "
        "-> ()");
    m.def(
        "quantize_cuda(Tensor input, Tensor scale, Tensor? zero_point, Tensor? channel_scale, Tensor(a!) output, "
        "int activation) -> ()");
    m.def(
        "quantize_dynamic_cuda(Tensor input, Tensor? channel_scale, Tensor(a!) output, Tensor(b!) scale, "
        "Tensor(c!) zero_point, int activation, bool symmetric) -> ()");
    m.def("dequantize_cuda(Tensor input, Tensor scale, Tensor? zero_point, Tensor(a!) output) -> ()");
    m.def(
        "group_norm_quantize_cuda(Tensor input, Tensor? skip, int groups, Tensor? weight, Tensor? bias, float eps, "
        "Tensor? film, int activation, Tensor? channel_scale, Tensor? scale, Tensor? zero_point, Tensor(a!) output, "
        "Tensor(b!)? row_scale, Tensor(c!)? row_zero_point) -> ()");
    m.def(
        "layer_norm_quantize_cuda(Tensor input, Tensor? weight, Tensor? bias, float eps, Tensor? film, "
        "Tensor? channel_scale, Tensor? scale, Tensor? zero_point, Tensor(a!) output, Tensor(b!)? row_scale, "
        "Tensor(c!)? row_zero_point) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CUDA, m) {
    m.impl("int8_conv2d_cuda", TORCH_BOX(&conv2d));
    m.impl("int8_linear_cuda", TORCH_BOX(&linear));
    m.impl("quantize_cuda", TORCH_BOX(&quantize_static));
    m.impl("quantize_dynamic_cuda", TORCH_BOX(&quantize_dynamic));
    m.impl("dequantize_cuda", TORCH_BOX(&dequantize));
    m.impl("group_norm_quantize_cuda", TORCH_BOX(&group_norm));
    m.impl("layer_norm_quantize_cuda", TORCH_BOX(&layer_norm));
}

}  // namespace bindings
}  // namespace pdn
