// pydenoise._cuda: the torch op of sampler_step. Sums are allocated in Python.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "../sampler_step/cuda.h"
#include "cuda_tensors.h"

namespace pdn {
namespace bindings {
namespace {

using sampler_step::Statistics;
using sampler_step::cuda::Element;
using sampler_step::cuda::Problem;

Element element_of(const char* name, const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return Element::float32;
        case ScalarType::BFloat16:
            return Element::bfloat16;
        case ScalarType::Half:
            return Element::float16;
        default:
            STD_TORCH_CHECK(false, "sampler_step on CUDA: ", name, ": unexpected dtype");
    }
}

void check_device(const char* name, const Tensor& tensor, const Tensor& sample) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == sample.get_device_index(), name,
                    ": not on the device of sample");
}

void* values(const char* name, const Tensor& tensor, const Tensor& sample, ScalarType type, int64_t count) {
    check_device(name, tensor, sample);
    STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == count, name,
                    ": expected ", count, " contiguous elements of another dtype or number");
    return tensor.data_ptr();
}

void* like_sample(const char* name, const MaybeTensor& tensor, const Tensor& sample, int64_t copies = 1) {
    return tensor ? values(name, *tensor, sample, sample.scalar_type(), copies * sample.numel()) : nullptr;
}

// What a model returned: samples that are dense, at any distance.
const void* output_of(const char* name, const MaybeTensor& tensor, const Tensor& sample, int64_t size, Element& type,
                      int64_t& stride) {
    if (!tensor) return nullptr;
    check_device(name, *tensor, sample);
    STD_TORCH_CHECK(
        tensor->dim() == sample.dim() && tensor->size(0) == sample.size(0) && tensor->numel() == size * sample.size(0),
        name, ": does not fit sample");
    int64_t dense = 1;
    for (int64_t i = tensor->dim() - 1; i > 0; --i) {
        STD_TORCH_CHECK(tensor->size(i) == 1 || tensor->stride(i) == dense, name, ": expected dense samples");
        dense *= tensor->size(i);
    }
    type = element_of(name, *tensor), stride = tensor->stride(0);
    return tensor->data_ptr();
}

Statistics statistics_of(const std::string& name) {
    if (name == "moments") return Statistics::moments;
    STD_TORCH_CHECK(name == "none" || name == "dots", "statistics: expected none, moments or dots");
    return name == "none" ? Statistics::none : Statistics::dots;
}

void step(const Tensor& sample, const MaybeTensor& output, const MaybeTensor& unconditional, const MaybeTensor& base,
          MaybeTensor history, const MaybeTensor& noise, const MaybeTensor& threshold, const Tensor& table,
          const Tensor& rows, const MaybeTensor& keys, const Tensor& step, bool learned_variance,
          std::string statistics, Tensor out, MaybeTensor kept, MaybeTensor preview, MaybeTensor model_input,
          MaybeTensor faults, Tensor sums) {
    STD_TORCH_CHECK(sample.dim() > 0 && sample.is_contiguous(), "sample: expected a contiguous [B, ...]");
    Problem p{};
    p.state = element_of("sample", sample), p.batch = sample.size(0);
    if (sample.numel() == 0) return;
    const int64_t size = sample.numel() / p.batch;
    STD_TORCH_CHECK(size < int64_t{1} << 30, "sample: too many elements");
    p.size = static_cast<int32_t>(size), p.learned_variance = learned_variance;
    const int64_t groups = rows.numel();
    p.units = groups > p.batch ? groups : p.batch;
    STD_TORCH_CHECK(groups == 1 || (groups % p.batch == 0 && sample.numel() % groups == 0),
                    "rows: expected 1, or a number for every equal part of a sample");
    divide(p);
    p.rows = static_cast<const int64_t*>(values("rows", rows, sample, ScalarType::Long, groups)),
    p.one_row = groups == 1;
    STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == sampler_step::kRowWidth, "table: expected [R, 32]");
    p.table = static_cast<const float*>(values("table", table, sample, ScalarType::Float, table.numel()));
    p.table_rows = table.size(0);
    p.step = static_cast<const int64_t*>(values("step", step, sample, ScalarType::Long, 1));
    if (keys) p.keys = static_cast<const int64_t*>(values("keys", *keys, sample, ScalarType::Long, 2 * p.batch));
    if (threshold)
        p.threshold = static_cast<const float*>(values("threshold", *threshold, sample, ScalarType::Float, p.batch));

    p.sample = sample.data_ptr(), p.base = like_sample("base", base, sample);
    p.noise = like_sample("noise", noise, sample), p.out = like_sample("out", out, sample);
    p.kept = like_sample("kept", kept, sample), p.preview = like_sample("preview", preview, sample);
    const int64_t wide = learned_variance ? 2 * size : size;
    STD_TORCH_CHECK(output || !learned_variance, "learned_variance: needs an output");
    STD_TORCH_CHECK(output || !unconditional, "unconditional: needs an output");
    p.output = output_of("output", output, sample, wide, p.output_type, p.output_stride);
    p.unconditional =
        output_of("unconditional", unconditional, sample, wide, p.unconditional_type, p.unconditional_stride);
    if (history) {
        STD_TORCH_CHECK(history->dim() > 0 && history->size(0) <= sampler_step::kSlots, "history: too many slots");
        p.slots = static_cast<int32_t>(history->size(0));
        p.history = like_sample("history", history, sample, p.slots);
    }
    if (model_input) {
        p.input_type = element_of("model_input", *model_input);
        p.copies = static_cast<int32_t>(model_input->numel() / sample.numel());
        STD_TORCH_CHECK(p.copies >= 1 && p.copies <= sampler_step::kMostCopies, "model_input: wrong number of copies");
        p.model_input =
            values("model_input", *model_input, sample, model_input->scalar_type(), p.copies * sample.numel());
    }
    if (faults) p.faults = static_cast<int32_t*>(values("faults", *faults, sample, ScalarType::Int, 1));

    const torch::stable::accelerator::DeviceGuard guard(sample.get_device_index());
    p.statistics = statistics_of(statistics);
    MaybeTensor workspace;
    if (p.statistics != Statistics::none) {
        p.statistic = static_cast<double*>(values("sums", sums, sample, ScalarType::Double, p.units * sum_count(p)));
        const int64_t doubles = workspace_doubles(p);
        if (doubles) {
            workspace = torch::stable::new_empty(sample, Ints{doubles}, ScalarType::Double);
            p.partials = static_cast<double*>(workspace->data_ptr());
        }
    }
    const char* why = sampler_step::cuda::run(p, current_stream(sample.get_device_index()));
    STD_TORCH_CHECK(why == nullptr, "sampler_step on CUDA: ", why);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def(
        "sampler_step_cuda(Tensor sample, Tensor? output, Tensor? unconditional, Tensor? base, Tensor(a!)? history, "
        "Tensor? noise, Tensor? threshold, Tensor table, Tensor rows, Tensor? keys, Tensor step, bool "
        "learned_variance, str statistics, Tensor(b!) out, Tensor(c!)? kept, Tensor(d!)? preview, Tensor(e!)? "
        "model_input, Tensor(f!)? faults, Tensor(g!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CUDA, m) { m.impl("sampler_step_cuda", TORCH_BOX(&step)); }

}  // namespace bindings
}  // namespace pdn
