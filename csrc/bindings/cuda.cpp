// pydenoise._cuda: torch ops of the CUDA kernels. A plain shared library without a Python module, which compiles
// against the headers of a CPU-only torch and loads where there is no GPU. Outputs are allocated in Python. This file
// holds weighted convolution, cuda_int8.cpp the int8 ops.
#include "../weighted_conv/cuda.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "cuda_tensors.h"

namespace pdn {
namespace bindings {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using weighted_conv::Activation;
using weighted_conv::Axis;
using namespace weighted_conv::cuda;

Storage storage_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return Storage::float32;
        case ScalarType::BFloat16:
            return Storage::bfloat16;
        case ScalarType::Half:
            return Storage::float16;
        default:
            STD_TORCH_CHECK(false, "cuda kernels take float32, float16 and bfloat16");
    }
}

int64_t element_bytes(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float ? 4 : 2; }

void check_like(const char* name, const Tensor& tensor, const Tensor& like) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                    ": not on input's device");
    STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, ": not of input's dtype");
}

void check_dense(const char* name, const MaybeTensor& tensor, const Tensor& like, int64_t numel) {
    if (!tensor) return;
    check_like(name, *tensor, like);
    STD_TORCH_CHECK(tensor->is_contiguous() && tensor->numel() == numel, name, ": expected ", numel,
                    " contiguous elements");
}

void check_adjacent_channels(const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.stride(1) == 1 || tensor.size(1) == 1, name, ": expected adjacent channels");
}

// `geometry` is stride (d ints), padding (2d: low and high per axis), dilation (d) and kernel (d). `input` and `output`
// are the tensors of the forward pass.
struct Geometry {
    int64_t dims, taps = 1;
    int64_t padding[3] = {0, 0, 0};  // low
    Axis axis[3];

    Geometry(const Ints& flat, const Tensor& input, const Tensor& output)
        : dims(static_cast<int64_t>(flat.size()) / 5) {
        STD_TORCH_CHECK(flat.size() % 5 == 0 && dims >= 1 && dims <= 3,
                        "geometry: expected 5 ints per axis, 1 to 3 axes");
        STD_TORCH_CHECK(input.dim() == dims + 2 && output.dim() == dims + 2,
                        "input, output: wrong number of dimensions");
        STD_TORCH_CHECK(input.size(0) == output.size(0), "output: wrong batch");
        for (int64_t a = 0; a < 3; ++a) {
            axis[a] = Axis{1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 0, 1};
            const int64_t i = a - (3 - dims);
            if (i < 0) continue;
            const int64_t stride = flat[i], low = flat[dims + 2 * i], high = flat[dims + 2 * i + 1];
            const int64_t dilation = flat[3 * dims + i], kernel = flat[4 * dims + i], size = input.size(2 + i);
            STD_TORCH_CHECK(stride > 0 && dilation > 0 && kernel > 0 && low >= 0 && high >= 0,
                            "geometry: out of range");
            const int64_t span = size + low + high - dilation * (kernel - 1) - 1;
            STD_TORCH_CHECK(span >= 0 && output.size(2 + i) == span / stride + 1, "output: wrong size");
            axis[a] = Axis{size,
                           output.size(2 + i),
                           input.stride(2 + i),
                           output.stride(2 + i),
                           0,
                           stride,
                           -low,
                           dilation,
                           kernel,
                           kernel,
                           0,
                           1};
            padding[a] = low;
            taps *= kernel;
        }
    }
};

void check_launch(const char* why) { STD_TORCH_CHECK(why == nullptr, "weighted_conv on CUDA: ", why); }

enum Kind : int64_t { kSkinnyIn = 0, kSkinnyOut = 1, kDepthwise = 2 };

void forward(const Tensor& input, const Tensor& weight, const MaybeTensor& density, const MaybeTensor& bias,
             const MaybeTensor& residual, Tensor output, Ints geometry, int64_t kind, int64_t activation) {
    const Geometry g(geometry, input, output);
    Problem p{};
    p.storage = storage_of(input);
    p.activation = static_cast<Activation>(activation);
    p.batch = input.size(0), p.in_channels = input.size(1), p.out_channels = output.size(1);
    const int64_t per_group = kind == kDepthwise ? 1 : p.in_channels;
    check_like("output", output, input);
    check_dense("weight", weight, input, p.out_channels * per_group * g.taps);
    check_dense("density", density, input, g.taps);
    check_dense("bias", bias, input, p.out_channels);
    check_adjacent_channels("input", input);
    check_adjacent_channels("output", output);
    for (int a = 0; a < 3; ++a) p.axis[a] = g.axis[a];
    p.in_batch_stride = input.stride(0), p.out_batch_stride = output.stride(0);
    if (residual) {
        check_like("residual", *residual, input);
        check_adjacent_channels("residual", *residual);
        STD_TORCH_CHECK(residual->dim() == output.dim(), "residual: wrong number of dimensions");
        for (int64_t i = 0; i < output.dim(); ++i)
            STD_TORCH_CHECK(residual->size(i) == output.size(i), "residual: wrong shape");
        p.residual_batch_stride = residual->stride(0);
        for (int64_t i = 0; i < g.dims; ++i) p.axis[3 - g.dims + i].residual_stride = residual->stride(2 + i);
    }
    p.input = input.data_ptr(), p.weight = weight.data_ptr(), p.output = output.data_ptr();
    p.density = pointer(density), p.bias = pointer(bias), p.residual = pointer(residual);
    const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
    void* stream = current_stream(input.get_device_index());
    STD_TORCH_CHECK(kind >= kSkinnyIn && kind <= kDepthwise,
                    "kind: expected 0 (skinny in), 1 (skinny out) or 2 (depthwise)");
    check_launch(kind == kSkinnyIn    ? skinny_in(p, stream)
                 : kind == kSkinnyOut ? skinny_out(p, stream)
                                      : depthwise(p, stream));
}

void depthwise_grad_input(const Tensor& grad, const Tensor& weight, const MaybeTensor& density, Tensor output,
                          Ints geometry) {
    const Geometry g(geometry, output, grad);
    Problem p{};
    p.storage = storage_of(grad);
    p.batch = grad.size(0), p.in_channels = grad.size(1), p.out_channels = output.size(1);
    STD_TORCH_CHECK(p.in_channels == p.out_channels, "grad: expected as many channels as the input");
    check_like("output", output, grad);
    check_dense("weight", weight, grad, p.out_channels * g.taps);
    check_dense("density", density, grad, g.taps);
    check_adjacent_channels("grad", grad);
    check_adjacent_channels("output", output);
    p.in_batch_stride = grad.stride(0), p.out_batch_stride = output.stride(0);
    p.input = grad.data_ptr(), p.weight = weight.data_ptr(), p.density = pointer(density);
    const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
    void* stream = current_stream(grad.get_device_index());
    const Axis* f = g.axis;
    for (int64_t z = 0; z < f[0].step; ++z)
        for (int64_t y = 0; y < f[1].step; ++y)
            for (int64_t x = 0; x < f[2].step; ++x) {
                if (z >= f[0].in_size || y >= f[1].in_size || x >= f[2].in_size) continue;
                p.axis[0] = grad_input_axis(f[0], g.padding[0], z);
                p.axis[1] = grad_input_axis(f[1], g.padding[1], y);
                p.axis[2] = grad_input_axis(f[2], g.padding[2], x);
                const int64_t offset = z * f[0].in_stride + y * f[1].in_stride + x * f[2].in_stride;
                p.output = static_cast<char*>(output.data_ptr()) + offset * element_bytes(output);
                check_launch(depthwise(p, stream));
            }
}

void depthwise_grad_weight(const Tensor& grad, const Tensor& input, const Tensor& weight, const MaybeTensor& density,
                           MaybeTensor dweight, MaybeTensor ddensity, Ints geometry) {
    const Geometry g(geometry, input, grad);
    GradProblem p{};
    p.storage = storage_of(input);
    p.batch = input.size(0), p.channels = input.size(1);
    STD_TORCH_CHECK(grad.size(1) == p.channels, "grad: expected as many channels as the input");
    check_like("grad", grad, input);
    check_dense("weight", weight, input, p.channels * g.taps);
    check_dense("density", density, input, g.taps);
    check_dense("dweight", dweight, input, p.channels * g.taps);
    check_dense("ddensity", ddensity, input, g.taps);
    check_adjacent_channels("input", input);
    check_adjacent_channels("grad", grad);
    for (int a = 0; a < 3; ++a) p.axis[a] = g.axis[a];
    p.in_batch_stride = input.stride(0), p.grad_batch_stride = grad.stride(0);
    p.input = input.data_ptr(), p.grad = grad.data_ptr(), p.weight = weight.data_ptr(), p.density = pointer(density);
    p.weight_grad = dweight ? dweight->data_ptr() : nullptr;
    p.density_grad = ddensity ? ddensity->data_ptr() : nullptr;
    const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
    const Ints floats = {depthwise_grad_workspace(p)};
    const Tensor workspace = torch::stable::new_empty(input, floats, ScalarType::Float);
    p.workspace = static_cast<float*>(workspace.data_ptr());
    check_launch(depthwise_grad(p, current_stream(input.get_device_index())));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def(
        "weighted_conv_cuda(Tensor input, Tensor weight, Tensor? density, Tensor? bias, Tensor? residual, Tensor(a!) "
        "output, "
        "int[] geometry, int kind, int activation) -> ()");
    m.def(
        "weighted_conv_cuda_depthwise_grad_input(Tensor grad, Tensor weight, Tensor? density, Tensor(a!) output, "
        "int[] geometry) -> ()");
    m.def(
        "weighted_conv_cuda_depthwise_grad_weight(Tensor grad, Tensor input, Tensor weight, Tensor? density, "
        "Tensor(a!)? dweight, Tensor(b!)? ddensity, int[] geometry) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CUDA, m) {
    m.impl("weighted_conv_cuda", TORCH_BOX(&forward));
    m.impl("weighted_conv_cuda_depthwise_grad_input", TORCH_BOX(&depthwise_grad_input));
    m.impl("weighted_conv_cuda_depthwise_grad_weight", TORCH_BOX(&depthwise_grad_weight));
}

}  // namespace bindings
}  // namespace pdn
