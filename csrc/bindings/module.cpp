// pydenoise._C: what is no tensor op. ISA levels and their cap, the list of kernel variants, build facts, and machine
// peaks measured without Python in the loop.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <string>
#include <vector>

#include "../core/isa.h"
#include "../core/peaks.h"
#include "../core/pool.h"
#include "../core/tape.h"
#include "../core/threads.h"
#include "../int8_conv2d/dispatch.h"
#include "../weighted_conv/dispatch.h"
#include "sampler_step.h"

namespace py = pybind11;

namespace {

// torch's pool. Workers take items one by one: a core that is slowed down by others then holds nobody up.
void torch_parallel_for(int64_t count, int64_t grain, pdn::RangeBody body, void* context) {
    if (count <= 0) return;
    const int64_t ranges = (count + grain - 1) / grain;
    const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), ranges);
    if (workers <= 1) {
        body(context, 0, count);
        return;
    }
    const int64_t share = std::max<int64_t>(grain, count / (workers * 16));
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
        for (int64_t begin = next.fetch_add(share); begin < count; begin = next.fetch_add(share))
            body(context, begin, std::min(count, begin + share));
    });
}

std::vector<std::string> isa_levels() {
    std::vector<std::string> names;
    for (int i = 0; i < pdn::kIsaCount; ++i)
        if (pdn::isa_available(static_cast<pdn::Isa>(i))) names.push_back(pdn::isa_name(static_cast<pdn::Isa>(i)));
    return names;
}

py::list variants() {
    py::list rows;
    for (int level = 0; level < pdn::kIsaCount; ++level) {
        const auto isa = static_cast<pdn::Isa>(level);
        if (!pdn::isa_available(isa)) continue;
        const auto& set = pdn::weighted_conv::kernel_set(isa);
        for (int i = 0; i < set.algorithm_count; ++i)
            rows.append(py::make_tuple("weighted_conv", pdn::isa_name(isa), set.algorithms[i].name));
        for (int i = 0; i < set.grad_algorithm_count; ++i)
            rows.append(py::make_tuple("weighted_conv_backward", pdn::isa_name(isa), set.grad_algorithms[i].name));
        const auto& int8_set = pdn::int8_conv2d::kernel_set(isa);
        for (int i = 0; i < int8_set.algorithm_count; ++i)
            rows.append(py::make_tuple("int8_conv2d", pdn::isa_name(isa), int8_set.algorithms[i].name));
    }
    return rows;
}

py::dict build_info() {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["cxx_standard"] = static_cast<long>(__cplusplus);
    info["torch_target_version"] = "2.10";
#if defined(PDN_BUILD_FLAGS)
    info["flags"] = PDN_BUILD_FLAGS;
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled CPU kernels of pydenoise and what describes them.";
    pdn::install_parallel_for(torch_parallel_for);
    m.def("isa_levels", &isa_levels, "ISA levels this processor offers, lowest first.");
    m.def("detected_isa", [] { return std::string(pdn::isa_name(pdn::detected_isa())); });
    m.def("active_isa", [] { return std::string(pdn::isa_name(pdn::active_isa())); });
    m.def(
        "set_isa_cap",
        [](const std::string& name) {
            if (!pdn::set_isa_cap(name.c_str()))
                throw py::value_error("name: expected one of the ISA levels, got '" + name + "'");
        },
        py::arg("name"), "Lower the ISA level in use; a level above the detected one means the detected one.");
    m.def(
        "isa_name", [](int level) { return std::string(pdn::isa_name(static_cast<pdn::Isa>(level))); },
        py::arg("level"), "Name of a level's number, as packed weights hold it.");
    m.def("isa_environment_error", [] {
        const char* error = pdn::isa_environment_error();
        return error ? py::object(py::str(error)) : py::object(py::none());
    });
    m.def("variants", &variants, "(op, ISA level, algorithm) of every compiled kernel that this processor can run.");
    m.def(
        "algorithm_name",
        [](const std::string& isa, int index) {
            for (int level = 0; level < pdn::kIsaCount; ++level) {
                if (isa != pdn::isa_name(static_cast<pdn::Isa>(level))) continue;
                const auto& set = pdn::weighted_conv::kernel_set(static_cast<pdn::Isa>(level));
                if (index >= 0 && index < set.algorithm_count) return std::string(set.algorithms[index].name);
            }
            throw py::value_error("no such algorithm");
        },
        py::arg("isa"), py::arg("index"));
    m.def("build_info", &build_info);
    py::class_<pdn::Tape>(m, "Tape",
                          "Kernel calls recorded with their pointers, to be run again: see csrc/core/tape.h.")
        .def(py::init<>())
        .def(
            "start", [](pdn::Tape& tape) { pdn::record_on(&tape); }, "Record this thread's kernel calls from now on.")
        .def("stop", [](pdn::Tape&) { pdn::record_on(nullptr); })
        .def("__len__", [](const pdn::Tape& tape) { return tape.steps.size(); })
        .def_property_readonly("refusal", [](const pdn::Tape& tape) { return tape.refusal; })
        .def_property_readonly("arena_bytes", [](const pdn::Tape& tape) { return tape.arena->bytes(); })
        .def("replay", &pdn::Tape::replay, py::arg("begin"), py::arg("end"), py::call_guard<py::gil_scoped_release>());
    pdn::bindings::define_sampler_step(m);
    m.def("pool_limit", &pdn::pool_limit, "Bytes of unused output buffers that may be kept (PYDENOISE_POOL_MIB).");
    m.def("pool_unused", &pdn::pool_unused, "Bytes of output buffers that are kept for reuse now.");
    m.def("pool_clear", &pdn::pool_clear, "Free the output buffers that are kept for reuse.");
    m.def(
        "measure_peak",
        [](const std::string& what, double seconds, int threads) {
            py::gil_scoped_release release;
            const double value = pdn::measure_peak(what.c_str(), seconds, threads);
            if (value < 0)
                throw py::value_error("what: expected fma_f32, bf16_dot, vnni_dot, read, copy or write, got '" + what +
                                      "'");
            return value;
        },
        py::arg("what"), py::arg("seconds") = 0.2, py::arg("threads") = 1,
        "Best rate seen in repeated short bursts: operations (fma_f32, bf16_dot, vnni_dot) or bytes (read, copy: "
        "bytes read plus bytes written, write) per second. 0 where the ISA level in use lacks the instruction.");
}
