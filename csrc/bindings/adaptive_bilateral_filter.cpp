// Torch ops of the CPU kernels of adaptive_bilateral_filter. Arguments were checked in Python; what is checked again
// here is what would make a kernel touch memory that is not its own.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../adaptive_bilateral_filter/dispatch.h"
#include "tape.h"
#include "tensors.h"

namespace pdn {
namespace bindings {
namespace {

using adaptive_bilateral_filter::DType;
using adaptive_bilateral_filter::Image;
using adaptive_bilateral_filter::Params;

DType kernel_dtype(ScalarType dtype) { return float_dtype<DType>("adaptive_bilateral_filter", dtype); }

Image image_of(const Tensor& tensor) {
    return {tensor.data_ptr(), {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)}};
}

void check_like(const char* name, const Tensor& tensor, const Tensor& input) {
    STD_TORCH_CHECK(shape_of(tensor) == shape_of(input) && tensor.scalar_type() == input.scalar_type(), name,
                    ": shape or dtype does not fit input");
}

Params params_of(const Tensor& input, const Tensor& sigma, int64_t radius) {
    STD_TORCH_CHECK(input.dim() == 4 && sigma.dim() == 4, "input, sigma: expected 4 dims");
    STD_TORCH_CHECK(
        radius >= adaptive_bilateral_filter::kPerImage && radius <= adaptive_bilateral_filter::kLargestRadius,
        "radius: out of range");
    Params p{};
    p.dtype = kernel_dtype(input.scalar_type());
    p.batch = input.size(0), p.channels = input.size(1), p.height = input.size(2), p.width = input.size(3);
    p.radius = radius;
    p.input = image_of(input);
    STD_TORCH_CHECK(sigma.scalar_type() == ScalarType::Float && sigma.is_contiguous() && sigma.size(0) == p.batch &&
                        sigma.size(3) == 3,
                    "sigma: expected contiguous float32 [B, rows, columns, 3]");
    if (input.numel() == 0) return p;
    STD_TORCH_CHECK(sigma.numel() > 0 && p.height % sigma.size(1) == 0 && p.width % sigma.size(2) == 0,
                    "sigma: its tiles do not divide the image");
    p.tile_height = p.height / sigma.size(1), p.tile_width = p.width / sigma.size(2);
    p.sigma = static_cast<const float*>(sigma.data_ptr());
    return p;
}

constexpr const char* kNoMemory = "out of memory for the scratch buffers of adaptive_bilateral_filter";

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& sigma, int64_t radius, bool save_norm) {
    Params p = params_of(input, sigma, radius);
    Tensor output = empty_row_major(shape_of(input), input.scalar_type());
    std::vector<int64_t> shape = {0};
    if (save_norm) shape = {p.batch, p.height, p.width};
    Tensor norm = empty_row_major(shape, ScalarType::Float);
    if (input.numel() == 0) return {output, norm};
    p.output = image_of(output);
    p.norm = save_norm ? static_cast<float*>(norm.data_ptr()) : nullptr;
    run_and_record([p] { STD_TORCH_CHECK(adaptive_bilateral_filter::forward(active_isa(), p), kNoMemory); }, input,
                   sigma, output, norm);
    return {output, norm};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& input, const Tensor& sigma, int64_t radius,
                                    const Tensor& output, const Tensor& norm, bool need_input, bool need_sigma) {
    Params p = params_of(input, sigma, radius);
    check_like("grad", grad, input);
    check_like("output", output, input);
    STD_TORCH_CHECK(
        norm.scalar_type() == ScalarType::Float && norm.is_contiguous() && norm.numel() == p.batch * p.height * p.width,
        "norm: expected contiguous float32 [B, H, W]");
    const std::vector<int64_t> nothing = {0};
    Tensor dinput = empty_row_major(need_input ? shape_of(input) : nothing, input.scalar_type());
    Tensor dsigma = empty_row_major(need_sigma ? shape_of(sigma) : nothing, ScalarType::Float);
    if (input.numel() == 0) return {dinput, dsigma};
    p.grad = image_of(grad), p.output = image_of(output);
    p.norm = static_cast<float*>(norm.data_ptr());
    if (need_input) p.dinput = image_of(dinput);
    if (need_sigma) p.dsigma = static_cast<float*>(dsigma.data_ptr());
    run_and_record([p] { STD_TORCH_CHECK(adaptive_bilateral_filter::backward(active_isa(), p), kNoMemory); }, grad,
                   input, sigma, output, norm, dinput, dsigma);
    return {dinput, dsigma};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def("adaptive_bilateral_filter_cpu(Tensor input, Tensor sigma, int radius, bool save_norm) -> (Tensor, Tensor)");
    m.def(
        "adaptive_bilateral_filter_backward_cpu(Tensor grad, Tensor input, Tensor sigma, int radius, Tensor output, "
        "Tensor norm, bool need_input, bool need_sigma) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CPU, m) {
    m.impl("adaptive_bilateral_filter_cpu", TORCH_BOX(&forward));
    m.impl("adaptive_bilateral_filter_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace bindings
}  // namespace pdn
