// Torch ops of the CPU kernels of wavelet_gate. Arguments were checked in Python; what is checked again here is what
// would make a kernel touch memory that is not its own.
#include <torch/csrc/stable/library.h>

#include "../wavelet_gate/dispatch.h"
#include "tape.h"
#include "tensors.h"

namespace pdn {
namespace bindings {
namespace {

using wavelet_gate::DType;
using wavelet_gate::kBands;
using wavelet_gate::Params;
using wavelet_gate::PoolParams;
using wavelet_gate::View;

using MaybeTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

DType kernel_dtype(const Tensor& tensor) { return float_dtype<DType>("wavelet_gate", tensor.scalar_type()); }

// Whether results for `input` [B, C, H, W] are in channels_last memory: as pydenoise/ops/wavelet_gate.py decides.
bool has_adjacent_channels(const Tensor& input) {
    return input.size(1) > 1 && input.stride(1) == 1 && input.stride(3) != 1;
}

// `tensor` itself if its channels, or its columns, are adjacent, else a copy in which they are.
Tensor arranged(const Tensor& tensor, bool channels_last) {
    if (channels_last) return with_adjacent_channels(tensor);
    return tensor.stride(3) == 1 || tensor.size(3) == 1 ? tensor : dense(tensor);
}

Tensor empty_image(const Sizes& shape, ScalarType dtype, bool channels_last) {
    return channels_last ? empty_channels_last(shape, dtype) : empty_row_major(shape, dtype);
}

View view_of(const Tensor& tensor) {
    return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

const float* floats(const char* name, const Tensor& tensor, int64_t count) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == count,
                    name, ": expected ", count, " contiguous float32");
    return static_cast<const float*>(tensor.data_ptr());
}

// What forward and backward share: the problem's size and its gates.
Params params_of(const Tensor& input, const Tensor& gate, bool up, const Sizes& size) {
    STD_TORCH_CHECK(input.dim() == 4 && size.size() == 2 && size[0] > 0 && size[1] > 0, "input: expected images");
    Params p{};
    p.dtype = kernel_dtype(input);
    p.up = up;
    p.batch = input.size(0), p.channels = up ? input.size(1) / kBands : input.size(1);
    p.height = size[0], p.width = size[1];
    const bool fits =
        up ? input.size(2) == block_rows(p) && input.size(3) == block_columns(p) && input.size(1) == kBands * p.channels
           : input.size(2) == p.height && input.size(3) == p.width;
    STD_TORCH_CHECK(fits, "input: its size does not fit that of the image");
    p.gates = gate.dim() == 3 ? gate.size(2) : 1;
    STD_TORCH_CHECK(p.gates == 1 || p.gates == p.channels, "gate: expected one for all channels, or one for each");
    p.gate = floats("gate", gate, p.batch * kBands * p.gates);
    p.channels_last = has_adjacent_channels(input);
    return p;
}

Sizes result_shape(const Params& p) {
    if (p.up) return {p.batch, p.channels, p.height, p.width};
    return {p.batch, p.channels, block_rows(p), block_columns(p)};
}

Tensor forward(const Tensor& input, const Tensor& gate, bool up, Sizes size) {
    Params p = params_of(input, gate, up, size);
    const Tensor x = arranged(input, p.channels_last);
    const Tensor out = empty_image(result_shape(p), input.scalar_type(), p.channels_last);
    (up ? p.coarse : p.fine) = view_of(x);
    p.out = view_of(out);
    const auto run = [p] {
        STD_TORCH_CHECK(wavelet_gate::forward(active_isa(), p), "out of memory for the factors of wavelet_gate");
    };
    run_and_record(run, x, gate, out);
    return out;
}

// Gradients of input and gate; empty where they are not wanted.
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& input, const Tensor& gate,
                                    const MaybeTensor& pool_grad, bool up, Sizes size, bool of_input, bool of_gate) {
    refuse_recording("gradients are not recorded");
    Params p = params_of(input, gate, up, size);
    const Sizes expected = result_shape(p);
    STD_TORCH_CHECK(grad.dim() == 4 && shape_of(grad) == expected && grad.scalar_type() == input.scalar_type(),
                    "grad: wrong shape or dtype");
    const Tensor g = arranged(grad, p.channels_last);
    const Tensor x = of_gate ? arranged(input, p.channels_last) : input;
    (up ? p.fine : p.coarse) = view_of(g);
    (up ? p.coarse : p.fine) = view_of(x);
    const Tensor dx = of_input ? empty_image(shape_of(input), input.scalar_type(), p.channels_last)
                               : empty_row_major({0}, input.scalar_type());
    if (of_input) p.out = view_of(dx);
    Tensor dgate = empty_row_major(of_gate ? shape_of(gate) : Sizes{0}, ScalarType::Float);
    if (of_gate) p.gate_grad = static_cast<float*>(dgate.data_ptr());
    if (pool_grad) p.offset = floats("pool_grad", *pool_grad, p.batch * input.size(1));
    if (of_input || of_gate)
        STD_TORCH_CHECK(wavelet_gate::backward(active_isa(), p), "out of memory for the sums of wavelet_gate");
    return {dx, dgate};
}

Tensor pool(const Tensor& input) {
    STD_TORCH_CHECK(input.dim() == 4 && input.size(2) > 0 && input.size(3) > 0, "input: expected images");
    PoolParams p{};
    p.dtype = kernel_dtype(input);
    p.channels_last = has_adjacent_channels(input);
    const Tensor x = arranged(input, p.channels_last);
    p.batch = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
    p.input = view_of(x);
    const Tensor mean = empty_row_major({p.batch, p.channels}, ScalarType::Float);
    p.mean = static_cast<float*>(mean.data_ptr());
    const auto run = [p] {
        STD_TORCH_CHECK(wavelet_gate::pool(active_isa(), p), "out of memory for the sums of wavelet_gate");
    };
    run_and_record(run, x, mean);
    return mean;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def("wavelet_gate_cpu(Tensor input, Tensor gate, bool up, int[] size) -> Tensor");
    m.def(
        "wavelet_gate_cpu_backward(Tensor grad, Tensor input, Tensor gate, Tensor? pool_grad, bool up, int[] size, "
        "bool of_input, bool of_gate) -> (Tensor, Tensor)");
    m.def("wavelet_gate_cpu_pool(Tensor input) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CPU, m) {
    m.impl("wavelet_gate_cpu", TORCH_BOX(&forward));
    m.impl("wavelet_gate_cpu_backward", TORCH_BOX(&backward));
    m.impl("wavelet_gate_cpu_pool", TORCH_BOX(&pool));
}

}  // namespace bindings
}  // namespace pdn
