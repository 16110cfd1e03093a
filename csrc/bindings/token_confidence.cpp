// Torch op of the CPU kernels of token_confidence. Arguments were checked in Python; what is checked again here is what
// would make a kernel touch memory that is not its own.
#include <torch/csrc/stable/library.h>

#include "../token_confidence/dispatch.h"
#include "tape.h"
#include "tensors.h"

namespace pdn {
namespace bindings {
namespace {

using token_confidence::DType;
using token_confidence::Params;
using token_confidence::Tokens;

using MaybeTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

DType kernel_dtype(ScalarType dtype) { return float_dtype<DType>("token_confidence", dtype); }

void check_matrix(const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) > 0, name, ": expected [N, V]");
    STD_TORCH_CHECK(tensor.stride(1) == 1 || tensor.size(1) == 1, name, ": expected adjacent columns");
}

const int64_t* numbers(const char* name, const MaybeTensor& tensor, int64_t count) {
    if (!tensor) return nullptr;
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Long && tensor->is_contiguous() && tensor->numel() == count,
                    name, ": expected ", count, " contiguous int64");
    return static_cast<const int64_t*>(tensor->data_ptr());
}

Tokens tokens_of(const char* name, const Ints& given) {
    STD_TORCH_CHECK(given.size() <= token_confidence::kMostTokens, name, ": too many tokens");
    Tokens tokens{};
    for (int64_t token : given) tokens.v[tokens.count++] = token;
    return tokens;
}

// An uninitialised tensor of one dim from torch's allocator: results are small.
Tensor empty_vector(int64_t count, ScalarType dtype) {
    const int64_t stride = 1;
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        1, &count, &stride, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
        aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

std::tuple<Tensor, Tensor, Tensor> choose(const Tensor& logits, const MaybeTensor& unconditional,
                                          const MaybeTensor& rows, const MaybeTensor& keys, double guidance,
                                          double temperature, int64_t seed, int64_t step, Ints forbidden,
                                          Ints uncounted, int64_t eos) {
    check_matrix("logits", logits);
    Params p{};
    p.dtype = kernel_dtype(logits.scalar_type());
    p.source_rows = logits.size(0), p.vocabulary = logits.size(1);
    p.rows = rows ? rows->numel() : p.source_rows;
    p.logits = logits.data_ptr(), p.stride = logits.stride(0);
    if (unconditional) {
        check_matrix("unconditional", *unconditional);
        STD_TORCH_CHECK(unconditional->size(0) == p.source_rows && unconditional->size(1) == p.vocabulary &&
                            unconditional->scalar_type() == logits.scalar_type(),
                        "unconditional: shape or dtype does not fit logits");
        p.unconditional = unconditional->data_ptr(), p.unconditional_stride = unconditional->stride(0);
    }
    STD_TORCH_CHECK(eos < p.vocabulary, "eos: outside the vocabulary");
    p.index = numbers("rows", rows, p.rows), p.keys = numbers("keys", keys, 2 * p.rows);
    p.seed = seed, p.step = static_cast<uint32_t>(step);
    p.guidance = static_cast<float>(guidance), p.temperature = static_cast<float>(temperature);
    p.forbidden = tokens_of("forbidden", forbidden), p.uncounted = tokens_of("uncounted", uncounted);
    p.eos = eos;
    Tensor token = empty_vector(p.rows, ScalarType::Long);
    Tensor confidence = empty_vector(p.rows, ScalarType::Float);
    Tensor probability = empty_vector(eos >= 0 ? p.rows : 0, ScalarType::Float);
    p.token = static_cast<int64_t*>(token.data_ptr());
    p.confidence = static_cast<float*>(confidence.data_ptr());
    p.eos_probability = static_cast<float*>(probability.data_ptr());
    refuse_recording("token_confidence belongs to a sampler's loop: a replay would repeat its noise");
    if (p.rows > 0)
        STD_TORCH_CHECK(token_confidence::run(active_isa(), p),
                        "out of memory for the scratch buffers of token_confidence");
    return {token, confidence, probability};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def(
        "token_confidence_cpu(Tensor logits, Tensor? unconditional, Tensor? rows, Tensor? keys, float guidance, float "
        "temperature, int seed, int step, int[] forbidden, int[] uncounted, int eos) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CPU, m) { m.impl("token_confidence_cpu", TORCH_BOX(&choose)); }

}  // namespace bindings
}  // namespace pdn
