// pydenoise._cuda: the torch op of token_confidence. Results are allocated in Python.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../token_confidence/cuda.h"
#include "cuda_tensors.h"

namespace pdn {
namespace bindings {
namespace {

using token_confidence::cuda::Element;
using token_confidence::cuda::Partial;
using token_confidence::cuda::Problem;
using token_confidence::cuda::Tokens;

Element element_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return Element::float32;
        case ScalarType::BFloat16:
            return Element::bfloat16;
        case ScalarType::Half:
            return Element::float16;
        default:
            STD_TORCH_CHECK(false, "token_confidence on CUDA: unexpected dtype");
    }
}

Tokens tokens_of(const char* name, const Ints& given) {
    STD_TORCH_CHECK(given.size() <= token_confidence::cuda::kMostTokens, name, ": too many tokens");
    Tokens tokens{};
    for (int64_t token : given) tokens.v[tokens.count++] = static_cast<int>(token);
    return tokens;
}

void* values(const char* name, const Tensor& tensor, const Tensor& like, ScalarType type, int64_t count) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                    ": not on the device of logits");
    STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == count, name,
                    ": expected ", count, " contiguous elements of another dtype or number");
    return tensor.data_ptr();
}

const int64_t* numbers(const char* name, const MaybeTensor& tensor, const Tensor& like, int64_t count) {
    return tensor ? static_cast<const int64_t*>(values(name, *tensor, like, ScalarType::Long, count)) : nullptr;
}

void check_matrix(const char* name, const Tensor& tensor, const Tensor& like) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) > 0 && tensor.size(1) < int64_t{1} << 30, name,
                    ": expected [N, V]");
    STD_TORCH_CHECK(tensor.stride(1) == 1 || tensor.size(1) == 1, name, ": expected adjacent columns");
    STD_TORCH_CHECK(tensor.size(0) == like.size(0) && tensor.size(1) == like.size(1) &&
                        tensor.scalar_type() == like.scalar_type() && tensor.is_cuda() &&
                        tensor.get_device_index() == like.get_device_index(),
                    name, ": does not fit logits");
}

void choose(const Tensor& logits, const MaybeTensor& unconditional, const MaybeTensor& rows, const MaybeTensor& keys,
            double guidance, double temperature, int64_t seed, int64_t step, Ints forbidden, Ints uncounted,
            int64_t eos, Tensor token, Tensor confidence, Tensor probability) {
    check_matrix("logits", logits, logits);
    Problem p{};
    p.type = element_of(logits);
    p.vocabulary = static_cast<int32_t>(logits.size(1)), p.source_rows = logits.size(0), p.rows = token.numel();
    p.pieces = (p.vocabulary + token_confidence::cuda::kPiece - 1) / token_confidence::cuda::kPiece;
    p.logits = logits.data_ptr(), p.stride = logits.stride(0);
    if (unconditional) {
        check_matrix("unconditional", *unconditional, logits);
        p.unconditional = unconditional->data_ptr(), p.unconditional_stride = unconditional->stride(0);
    }
    STD_TORCH_CHECK(rows || p.rows == p.source_rows, "token: wrong number of rows");
    p.index = numbers("rows", rows, logits, p.rows), p.keys = numbers("keys", keys, logits, 2 * p.rows);
    p.seed = seed, p.step = static_cast<uint32_t>(step);
    p.guidance = static_cast<float>(guidance), p.temperature = static_cast<float>(temperature);
    p.forbidden = tokens_of("forbidden", forbidden), p.uncounted = tokens_of("uncounted", uncounted);
    STD_TORCH_CHECK(eos < p.vocabulary, "eos: outside the vocabulary");
    p.eos = static_cast<int32_t>(eos);
    p.token = static_cast<int64_t*>(values("token", token, logits, ScalarType::Long, p.rows));
    p.confidence = static_cast<float*>(values("confidence", confidence, logits, ScalarType::Float, p.rows));
    p.eos_probability =
        static_cast<float*>(values("probability", probability, logits, ScalarType::Float, eos >= 0 ? p.rows : 0));
    if (p.rows == 0) return;
    const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
    const auto floats = static_cast<int64_t>(p.rows * p.pieces * sizeof(Partial) / sizeof(float));
    const Tensor workspace = torch::stable::new_empty(logits, Ints{floats}, ScalarType::Float);
    p.partials = static_cast<Partial*>(workspace.data_ptr());
    const char* why = token_confidence::cuda::run(p, current_stream(logits.get_device_index()));
    STD_TORCH_CHECK(why == nullptr, "token_confidence on CUDA: ", why);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def(
        "token_confidence_cuda(Tensor logits, Tensor? unconditional, Tensor? rows, Tensor? keys, float guidance, float "
        "temperature, int seed, int step, int[] forbidden, int[] uncounted, int eos, Tensor(a!) token, Tensor(b!) "
        "confidence, Tensor(c!) probability) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CUDA, m) { m.impl("token_confidence_cuda", TORCH_BOX(&choose)); }

}  // namespace bindings
}  // namespace pdn
