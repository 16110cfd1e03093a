// Torch ops of the CPU kernels of routed_norm. Arguments were checked in Python; what is checked again here is what
// would make a kernel touch memory that is not its own.
#include <torch/csrc/stable/library.h>

#include "../routed_norm/dispatch.h"
#include "tape.h"
#include "tensors.h"

namespace pdn {
namespace bindings {
namespace {

using routed_norm::Coefficients;
using routed_norm::DType;
using routed_norm::GradParams;
using routed_norm::Params;

using MaybeTensor = std::optional<Tensor>;

constexpr char kNoMemory[] = "out of memory for the scratch buffers of routed_norm";

DType kernel_dtype(ScalarType dtype) { return float_dtype<DType>("routed_norm", dtype); }

// [B, T, C] like `input`, channels adjacent.
void check_tokens(const char* name, const Tensor& tensor, const Tensor& input) {
    STD_TORCH_CHECK(shape_of(tensor) == shape_of(input) && tensor.scalar_type() == input.scalar_type(), name,
                    ": wrong shape or dtype");
    STD_TORCH_CHECK(tensor.stride(2) == 1 || tensor.size(2) == 1, name, ": expected adjacent channels");
}

void* dense_tokens(const char* name, const Tensor& tensor, const Tensor& input) {
    check_tokens(name, tensor, input);
    STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
    return tensor.data_ptr();
}

// float32 [B, C] or [1, C].
Coefficients coefficients(const char* name, const MaybeTensor& given, const Params& p) {
    if (!given) return {nullptr, 0};
    STD_TORCH_CHECK(given->scalar_type() == ScalarType::Float && given->is_contiguous() && given->dim() == 2 &&
                        (given->size(0) == p.batch || given->size(0) == 1) && given->size(1) == p.channels,
                    name, ": expected contiguous float32 [B, C] or [1, C]");
    return {static_cast<const float*>(given->data_ptr()), given->size(0) == 1 ? 0 : p.channels};
}

const float* floats(const char* name, const Tensor& tensor, int64_t count) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == count,
                    name, ": expected ", count, " contiguous float32");
    return static_cast<const float*>(tensor.data_ptr());
}

Params params_of(const Tensor& input, const MaybeTensor& mask, const MaybeTensor& update, const MaybeTensor& gate,
                 const Tensor& scale, const Tensor& shift, int64_t total, double eps) {
    STD_TORCH_CHECK(input.dim() == 3, "input: expected [B, T, C]");
    check_tokens("input", input, input);
    Params p{};
    p.dtype = kernel_dtype(input.scalar_type());
    p.batch = input.size(0), p.tokens = input.size(1), p.channels = input.size(2), p.total = total;
    STD_TORCH_CHECK(total >= p.channels, "total: fewer than there are channels");
    p.input = input.data_ptr(), p.input_batch = input.stride(0), p.input_token = input.stride(1);
    if (update) {
        check_tokens("update", *update, input);
        p.update = update->data_ptr(), p.update_batch = update->stride(0), p.update_token = update->stride(1);
    }
    p.mask = coefficients("mask", mask, p), p.gate = coefficients("gate", gate, p);
    STD_TORCH_CHECK((p.update != nullptr) == (p.gate.data != nullptr) || input.numel() == 0,
                    "gate: goes with an update");
    p.scale = coefficients("scale", scale, p), p.shift = coefficients("shift", shift, p);
    p.eps = eps;
    return p;
}

std::tuple<Tensor, Tensor, Tensor> routed(const Tensor& input, const MaybeTensor& mask, const MaybeTensor& update,
                                          const MaybeTensor& gate, const Tensor& scale, const Tensor& shift,
                                          int64_t total, double eps) {
    Params p = params_of(input, mask, update, gate, scale, shift, total, eps);
    const std::vector<int64_t> shape = shape_of(input);
    Tensor output = empty_row_major(shape, input.scalar_type());
    Tensor carried = update ? empty_row_major(shape, input.scalar_type()) : empty_row_major({0}, input.scalar_type());
    Tensor stats = empty_row_major({p.batch, p.tokens, 2}, ScalarType::Float);
    p.output = output.data_ptr(), p.carried = carried.data_ptr();
    p.stats = static_cast<float*>(stats.data_ptr());
    if (input.numel() > 0)
        run_and_record([p] { STD_TORCH_CHECK(routed_norm::run(active_isa(), p), kNoMemory); }, input, mask, update,
                       gate, scale, shift, output, carried, stats);
    return {output, carried, stats};
}

std::tuple<Tensor, Tensor, Tensor> routed_backward(const Tensor& grad, const MaybeTensor& grad_carried,
                                                   const MaybeTensor& grad_constant, const Tensor& input,
                                                   const MaybeTensor& mask, const MaybeTensor& update,
                                                   const MaybeTensor& gate, const Tensor& scale, const Tensor& stats,
                                                   int64_t total) {
    GradParams p{};
    p.forward = params_of(input, mask, update, gate, scale, scale, total, 0);
    const Params& f = p.forward;
    const std::vector<int64_t> shape = shape_of(input);
    Tensor grad_input = empty_row_major(shape, input.scalar_type());
    Tensor grad_update =
        update ? empty_row_major(shape, input.scalar_type()) : empty_row_major({0}, input.scalar_type());
    Tensor partials = empty_row_major({f.batch, routed_norm::chunks_of(f.tokens), 3, f.channels}, ScalarType::Float);
    if (input.numel() == 0) return {grad_input, grad_update, partials};
    p.forward.stats = const_cast<float*>(floats("stats", stats, f.batch * f.tokens * 2));
    p.grad = dense_tokens("grad", grad, input);
    if (grad_carried) p.carried = dense_tokens("grad_carried", *grad_carried, input);
    if (grad_constant) p.constant = floats("grad_constant", *grad_constant, f.batch * f.tokens);
    p.grad_input = grad_input.data_ptr(), p.grad_update = grad_update.data_ptr();
    p.partials = static_cast<float*>(partials.data_ptr());
    run_and_record([p] { STD_TORCH_CHECK(routed_norm::run(active_isa(), p), kNoMemory); }, grad, grad_carried,
                   grad_constant, input, mask, update, gate, scale, stats, grad_input, grad_update, partials);
    return {grad_input, grad_update, partials};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def(
        "routed_norm_cpu(Tensor input, Tensor? mask, Tensor? update, Tensor? gate, Tensor scale, Tensor shift, int "
        "total, float eps) -> (Tensor, Tensor, Tensor)");
    m.def(
        "routed_norm_backward_cpu(Tensor grad, Tensor? grad_carried, Tensor? grad_constant, Tensor input, Tensor? "
        "mask, "
        "Tensor? update, Tensor? gate, Tensor scale, Tensor stats, int total) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CPU, m) {
    m.impl("routed_norm_cpu", TORCH_BOX(&routed));
    m.impl("routed_norm_backward_cpu", TORCH_BOX(&routed_backward));
}

}  // namespace bindings
}  // namespace pdn
