// Torch ops of the CPU kernels of quantize. Arguments were checked in Python; what is checked again here is what would
// make a kernel touch memory that is not its own.
#include <torch/csrc/stable/library.h>

#include "../quantize/dispatch.h"
#include "rows.h"

namespace pdn {
namespace bindings {
namespace {

using quantize::Activation;
using quantize::DequantizeParams;
using quantize::DType;
using quantize::QuantizeParams;

using MaybeTensor = std::optional<Tensor>;

DType kernel_dtype(ScalarType dtype) { return float_dtype<DType>("quantize", dtype); }

std::vector<int64_t> codes_shape(const Tensor& input, int64_t activation) {
    STD_TORCH_CHECK(input.dim() > 0, "input: expected at least one dimension");
    STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::geglu), "activation: unknown");
    std::vector<int64_t> shape = shape_of(input);
    if (activation == static_cast<int64_t>(Activation::geglu)) {
        const auto axis = static_cast<size_t>(channel_dim(input));
        STD_TORCH_CHECK(shape[axis] % 2 == 0, "input: geglu needs an even number of channels");
        shape[axis] /= 2;
    }
    return shape;
}

QuantizeParams input_params(const Rows& x, const Tensor& output, int64_t activation, const MaybeTensor& channel_scale) {
    QuantizeParams p{};
    p.dtype = kernel_dtype(x.tensor.scalar_type());
    p.activation = static_cast<Activation>(activation);
    p.rows = x.rows;
    p.channels = output.size(channel_dim(output));
    p.row_stride = x.row_stride;
    p.input = x.tensor.data_ptr();
    check_numel(channel_scale, ScalarType::Float, p.channels, "channel_scale");
    p.channel_scale = pointer<float>(channel_scale);
    p.output = static_cast<int8_t*>(output.data_ptr());
    return p;
}

template <class... Tensors>
void run_checked(const QuantizeParams& p, const Tensors&... tensors) {
    if (p.rows == 0 || p.channels == 0) return;
    run_and_record(
        [p] { STD_TORCH_CHECK(quantize::run(active_isa(), p), "out of memory for the scratch buffers of quantize"); },
        tensors...);
}

Tensor quantize_given(const Tensor& input, const Tensor& scale, const MaybeTensor& zero_point, int64_t activation,
                      const MaybeTensor& channel_scale) {
    Tensor output = empty_rows(codes_shape(input, activation), ScalarType::Char);
    const Rows x = rows_of(input);
    const Tensor s = dense(scale);
    const MaybeTensor z = dense(zero_point), factors = dense(channel_scale);
    QuantizeParams p = input_params(x, output, activation, factors);
    p.scale_step = s.dim() == 0 ? 0 : 1;
    const int64_t scales = s.dim() == 0 ? 1 : p.rows;
    check_numel(s, ScalarType::Float, scales, "scale");
    check_numel(z, ScalarType::Int, scales, "zero_point");
    p.scale = static_cast<const float*>(s.data_ptr());
    p.zero_point = pointer<int32_t>(z);
    run_checked(p, x.tensor, s, z, factors, output);
    return output;
}

std::tuple<Tensor, Tensor, Tensor> quantize_dynamic(const Tensor& input, int64_t activation,
                                                    const MaybeTensor& channel_scale, bool symmetric) {
    std::vector<int64_t> shape = codes_shape(input, activation);
    Tensor output = empty_rows(shape, ScalarType::Char);
    shape[static_cast<size_t>(channel_dim(input))] = 1;
    Tensor scale = empty_row_major(shape, ScalarType::Float);
    Tensor zero_point = empty_row_major(shape, ScalarType::Int);
    const Rows x = rows_of(input);
    const MaybeTensor factors = dense(channel_scale);
    QuantizeParams p = input_params(x, output, activation, factors);
    STD_TORCH_CHECK(p.channels > 0 || scale.numel() == 0, "input: expected at least one channel");
    p.symmetric = symmetric;
    p.out_scale = static_cast<float*>(scale.data_ptr());
    p.out_zero_point = static_cast<int32_t*>(zero_point.data_ptr());
    run_checked(p, x.tensor, factors, output, scale, zero_point);
    return {output, scale, zero_point};
}

Tensor dequantize(const Tensor& input, const Tensor& scale, const MaybeTensor& zero_point, ScalarType dtype) {
    STD_TORCH_CHECK(input.scalar_type() == ScalarType::Char && input.dim() > 0, "input: expected int8");
    Tensor output = empty_rows(shape_of(input), dtype);
    const Rows x = rows_of(input);
    const Tensor s = dense(scale);
    const MaybeTensor z = dense(zero_point);
    DequantizeParams p{};
    p.dtype = kernel_dtype(dtype);
    p.rows = x.rows;
    p.channels = x.channels;
    p.row_stride = x.row_stride;
    p.input = static_cast<const int8_t*>(x.tensor.data_ptr());
    p.scale_step = s.dim() == 0 ? 0 : 1;
    const int64_t scales = s.dim() == 0 ? 1 : p.rows;
    check_numel(s, ScalarType::Float, scales, "scale");
    check_numel(z, ScalarType::Int, scales, "zero_point");
    p.scale = static_cast<const float*>(s.data_ptr());
    p.zero_point = pointer<int32_t>(z);
    p.output = output.data_ptr();
    if (p.rows > 0 && p.channels > 0) run_and_record([p] { quantize::run(active_isa(), p); }, x.tensor, s, z, output);
    return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def(
        "quantize_cpu(Tensor input, Tensor scale, Tensor? zero_point, int activation, Tensor? channel_scale) -> "
        "Tensor");
    m.def(
        "quantize_dynamic_cpu(Tensor input, int activation, Tensor? channel_scale, bool symmetric) -> (Tensor, Tensor, "
        "Tensor)");
    m.def("dequantize_cpu(Tensor input, Tensor scale, Tensor? zero_point, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CPU, m) {
    m.impl("quantize_cpu", TORCH_BOX(&quantize_given));
    m.impl("quantize_dynamic_cpu", TORCH_BOX(&quantize_dynamic));
    m.impl("dequantize_cpu", TORCH_BOX(&dequantize));
}

}  // namespace bindings
}  // namespace pdn
