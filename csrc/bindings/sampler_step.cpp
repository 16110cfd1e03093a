// Torch op of the CPU kernels of sampler_step, and the prepared step that loops use. Arguments were checked in Python;
// what is checked again in the op is what would make a kernel touch memory that is not its own.
#include "sampler_step.h"

#include <torch/csrc/stable/library.h>

#include "../sampler_step/dispatch.h"
#include "tape.h"
#include "tensors.h"

namespace pdn {
namespace bindings {
namespace {

using sampler_step::DType;
using sampler_step::Params;
using sampler_step::Statistics;

using MaybeTensor = std::optional<Tensor>;

constexpr char kNoReplay[] = "sampler_step belongs to a sampler's loop: a replay would repeat its noise";

DType kernel_dtype(const char* name, ScalarType dtype) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                    ": cpu kernels of sampler_step take float32, bfloat16 and float16");
    return dtype == ScalarType::Float ? DType::float32 : dtype == ScalarType::Half ? DType::float16 : DType::bfloat16;
}

void* dense_data(const char* name, const Tensor& tensor, int64_t count, ScalarType dtype) {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.numel() == count && tensor.is_contiguous(), name,
                    ": expected a contiguous tensor of ", count, " elements and of the right dtype");
    return tensor.data_ptr();
}

void* dense_data(const char* name, const MaybeTensor& tensor, int64_t count, ScalarType dtype) {
    return tensor ? dense_data(name, *tensor, count, dtype) : nullptr;
}

// The stride from sample to sample of what a model returned; a sample of it is dense.
int64_t output_stride(const char* name, const Tensor& tensor, int64_t batch, int64_t size) {
    int64_t dense = 1;
    bool fits = tensor.dim() >= 1 && tensor.size(0) == batch;
    for (int64_t axis = tensor.dim() - 1; axis >= 1; --axis) {
        fits = fits && (tensor.size(axis) == 1 || tensor.stride(axis) == dense);
        dense *= tensor.size(axis);
    }
    STD_TORCH_CHECK(fits && dense == size, name, ": expected ", batch, " dense samples of ", size, " elements");
    return tensor.stride(0);
}

void set_output(Params& p, const MaybeTensor& output, const MaybeTensor& unconditional) {
    const int64_t size = p.learned_variance ? 2 * p.size : p.size;
    STD_TORCH_CHECK(output || !(unconditional || p.learned_variance), "output: missing");
    p.model = output ? kernel_dtype("output", output->scalar_type()) : DType::float32;
    if (output) p.output = output->data_ptr(), p.output_stride = output_stride("output", *output, p.batch, size);
    if (!unconditional) return;
    STD_TORCH_CHECK(unconditional->scalar_type() == output->scalar_type(), "unconditional: dtype does not fit output");
    p.unconditional = unconditional->data_ptr();
    p.unconditional_stride = output_stride("unconditional", *unconditional, p.batch, size);
}

void set_rows(Params& p, const Tensor& table, const Tensor& rows) {
    STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == sampler_step::kRowWidth, "table: expected [R, 32]");
    p.table = static_cast<const float*>(dense_data("table", table, table.numel(), ScalarType::Float));
    p.table_rows = table.size(0);
    p.groups = rows.numel();
    const bool fits = p.groups == 1 || (p.groups > 0 && p.groups % p.batch == 0 && p.size % (p.groups / p.batch) == 0);
    STD_TORCH_CHECK(fits, "rows: ", p.groups, " do not divide ", p.batch, " samples of ", p.size, " elements");
    p.rows = static_cast<const int64_t*>(dense_data("rows", rows, p.groups, ScalarType::Long));
    for (int64_t g = 0; g < p.groups; ++g)
        STD_TORCH_CHECK(p.rows[g] >= 0 && p.rows[g] < p.table_rows, "rows: ", p.rows[g], " is outside the table");
}

void set_model_input(Params& p, const MaybeTensor& model_input) {
    if (!model_input) return;
    p.input_dtype = kernel_dtype("model_input", model_input->scalar_type());
    const int64_t copies = model_input->numel() / (p.batch * p.size);
    STD_TORCH_CHECK(copies >= 1 && copies <= sampler_step::kMostCopies, "model_input: too many copies, or none");
    p.model_input = dense_data("model_input", *model_input, copies * p.batch * p.size, model_input->scalar_type());
    p.copies = static_cast<int>(copies);
}

// An uninitialised tensor [groups, count] of float64 from torch's allocator.
Tensor empty_sums(int64_t groups, int64_t count) {
    const int64_t shape[2] = {groups, count}, strides[2] = {count, 1};
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        2, shape, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(ScalarType::Double)),
        aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

Tensor step(const Tensor& sample, const MaybeTensor& output, const MaybeTensor& unconditional, const MaybeTensor& base,
            const MaybeTensor& history, const MaybeTensor& noise, const MaybeTensor& threshold, const Tensor& table,
            const Tensor& rows, const MaybeTensor& keys, const Tensor& number, bool learned_variance,
            int64_t statistics, const Tensor& out, const MaybeTensor& kept, const MaybeTensor& preview,
            const MaybeTensor& model_input, const MaybeTensor& faults) {
    refuse_recording(kNoReplay);
    Params p{};
    const ScalarType dtype = sample.scalar_type();
    p.state = kernel_dtype("sample", dtype);
    const int64_t count = sample.numel();
    STD_TORCH_CHECK(sample.dim() >= 1 && statistics >= 0 && statistics <= 2, "sample: expected [B, ...]");
    p.batch = sample.size(0), p.size = p.batch > 0 ? count / p.batch : 0;
    p.statistics = static_cast<Statistics>(statistics);
    p.learned_variance = learned_variance;
    p.slots = history ? static_cast<int>(history->size(0)) : 0;
    STD_TORCH_CHECK(p.slots <= sampler_step::kSlots, "history: too many slots");
    const int64_t groups = rows.numel() > p.batch ? rows.numel() : p.batch;
    Tensor sums = empty_sums(statistics ? groups : 0, sum_count(p));
    if (count == 0) {
        if (sums.numel() > 0) torch::stable::fill_(sums, 0);
        return sums;
    }
    p.sample = dense_data("sample", sample, count, dtype);
    set_output(p, output, unconditional);
    set_rows(p, table, rows);
    p.base = dense_data("base", base, count, dtype), p.noise = dense_data("noise", noise, count, dtype);
    p.history = dense_data("history", history, p.slots * count, dtype);
    p.threshold = static_cast<const float*>(dense_data("threshold", threshold, p.batch, ScalarType::Float));
    p.keys = static_cast<const int64_t*>(dense_data("keys", keys, 2 * p.batch, ScalarType::Long));
    const int64_t at = *static_cast<const int64_t*>(dense_data("step", number, 1, ScalarType::Long));
    p.step = static_cast<uint32_t>(at);
    p.out = dense_data("out", out, count, dtype), p.kept = dense_data("kept", kept, count, dtype);
    p.preview = dense_data("preview", preview, count, dtype);
    set_model_input(p, model_input);
    auto* fault = static_cast<int32_t*>(dense_data("faults", faults, 1, ScalarType::Int));
    p.past_caches = sampler_step::exceeds_caches(p);
    const sampler_step::Result result =
        run(active_isa(), p, statistics ? static_cast<double*>(sums.data_ptr()) : nullptr);
    STD_TORCH_CHECK(result.enough_memory, "out of memory for the scratch buffers of sampler_step");
    const auto low = static_cast<int32_t>(at & 0x7fffffff);
    if (fault != nullptr && !result.finite && low < *fault) *fault = low;
    return sums;
}

namespace py = pybind11;

// A step on buffers that stay where they are; `pydenoise/ops/_rows/sampler_step_cpu.py` checks and keeps them.
class Prepared {
  public:
    explicit Prepared(const py::dict& fields) {
        const auto number = [&](const char* name) { return fields[name].cast<int64_t>(); };
        const auto pointer = [&](const char* name) { return reinterpret_cast<void*>(fields[name].cast<uintptr_t>()); };
        const auto dtype = [&](const char* name) { return static_cast<DType>(fields[name].cast<int>()); };
        p_.state = dtype("state"), p_.input_dtype = dtype("input_dtype");
        p_.batch = number("batch"), p_.size = number("size"), p_.groups = 1;
        p_.sample = pointer("sample"), p_.base = pointer("base"), p_.history = pointer("history");
        p_.slots = static_cast<int>(number("slots"));
        p_.table = static_cast<const float*>(pointer("table")), p_.table_rows = number("table_rows");
        p_.keys = static_cast<const int64_t*>(pointer("keys"));
        p_.learned_variance = number("learned_variance") != 0;
        p_.out = pointer("out"), p_.kept = pointer("kept"), p_.preview = pointer("preview");
        p_.model_input = pointer("model_input"), p_.copies = static_cast<int>(number("copies"));
        p_.past_caches = sampler_step::exceeds_caches(p_);
    }

    bool run(uintptr_t output, int64_t output_stride, uintptr_t unconditional, int64_t unconditional_stride, int model,
             int64_t row, uint64_t step) {
        refuse_recording(kNoReplay);
        if (row < 0 || row >= p_.table_rows)
            throw py::value_error("row: outside the table, " + std::to_string(row) + " of " +
                                  std::to_string(p_.table_rows));
        p_.model = static_cast<DType>(model);
        p_.output = reinterpret_cast<const void*>(output), p_.output_stride = output_stride;
        p_.unconditional = reinterpret_cast<const void*>(unconditional), p_.unconditional_stride = unconditional_stride;
        p_.row = row, p_.step = static_cast<uint32_t>(step);
        constexpr int64_t kBrief =
            1 << 16;  // elements, of which a step takes less time than Python's switch of threads
        if (p_.batch * p_.size < kBrief) return sampler_step::run(active_isa(), p_, nullptr).finite;
        py::gil_scoped_release release;
        return sampler_step::run(active_isa(), p_, nullptr).finite;
    }

  private:
    Params p_{};
};

// The columns of a row, by the names of pydenoise/step_row.py.
py::dict columns() {
    using namespace sampler_step;
    const std::pair<const char*, Column> named[] = {
        {"guidance", kGuidance},  {"x0_sample", kX0Sample},
        {"x0_output", kX0Output}, {"clip", kClip},
        {"m_sample", kMSample},   {"m_output", kMOutput},
        {"m_x0", kMX0},           {"slot", kSlot},
        {"sample", kSample},      {"base", kBase},
        {"output", kOutput},      {"m", kM},
        {"noise", kNoise},        {"log_small", kLogSmall},
        {"log_large", kLogLarge}, {"input_scale", kInputScale},
        {"history", kHistory},    {"kept_sample", kKeptSample},
        {"kept_base", kKeptBase}, {"kept_m", kKeptM},
        {"kept_out", kKeptOut},   {"kept_history", kKeptHistory},
    };
    py::dict found;
    for (const auto& [name, column] : named) found[name] = static_cast<int>(column);
    return found;
}

}  // namespace

void define_sampler_step(py::module_& m) {
    m.def("sampler_step_columns", &columns, "Where the kernels of sampler_step find what in a row of coefficients.");
    py::class_<Prepared>(m, "SamplerStep",
                         "A step of a sampler on fixed buffers: fields by name, tensors as addresses.")
        .def(py::init<const py::dict&>())
        .def("run", &Prepared::run,
             "(output, its stride, unconditional, its stride, dtype of both, row, step) -> whether all is finite.");
}

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def(
        "sampler_step_cpu(Tensor sample, Tensor? output, Tensor? unconditional, Tensor? base, Tensor(a!)? history, "
        "Tensor? noise, Tensor? threshold, Tensor table, Tensor rows, Tensor? keys, Tensor step, bool "
        "learned_variance, int statistics, Tensor(b!) out, Tensor(c!)? kept, Tensor(d!)? preview, Tensor(e!)? "
        "model_input, Tensor(f!)? faults) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CPU, m) { m.impl("sampler_step_cpu", TORCH_BOX(&step)); }

}  // namespace bindings
}  // namespace pdn
