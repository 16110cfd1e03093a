// Torch ops of the CPU kernels that construct DCLS kernels. Arguments were checked in Python; what is checked again
// here is what would make a kernel touch memory that is not its own.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../dcls_kernel/dispatch.h"
#include "tape.h"
#include "tensors.h"

namespace pdn {
namespace bindings {
namespace {

using dcls_kernel::Params;
using MaybeTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

void check_floats(const char* name, const Tensor& tensor, int64_t count) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.numel() == count, name, ": expected ", count,
                    " float32");
}

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); }
float* written(Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// Dense tensors of a call, and the parameters that point into them. The kernel's axes are the last of p.axis.
struct Call {
    Tensor weight, positions;
    MaybeTensor widths;
    Params p{};
    std::vector<int64_t> shape;  // of the kernel
    Ints axes;

    Call(const Tensor& given, const Tensor& P, const MaybeTensor& SIG, const Ints& size, Ints order,
         const Ints& centres, bool gauss, bool normalized, double spread)
        : weight(dense(given)), positions(dense(P)), axes(std::move(order)) {
        if (SIG) widths = dense(*SIG);
        const size_t dims = size.size();
        STD_TORCH_CHECK(given.dim() == 3 && given.numel() > 0, "weight: expected [O, I, C]");
        STD_TORCH_CHECK(dims >= 1 && dims <= 3 && axes.size() == dims && centres.size() == dims,
                        "size: expected 1 to 3 axes");
        const int64_t dim_count = static_cast<int64_t>(dims), count = weight.numel();
        check_floats("weight", weight, count);
        check_floats("P", positions, dim_count * count);
        if (widths) check_floats("SIG", *widths, dim_count * count);
        p.gauss = gauss, p.normalized = normalized, p.spread = static_cast<float>(spread);
        p.pairs = given.size(0) * given.size(1), p.components = given.size(2);
        p.weight = floats(weight);
        shape = {given.size(0), given.size(1)};
        for (size_t i = 0; i < 3; ++i) p.axis[i] = {1, 0, nullptr, nullptr, nullptr, nullptr};
        for (size_t i = 0; i < dims; ++i) {
            STD_TORCH_CHECK(size[i] > 0 && axes[i] >= 0 && axes[i] < dim_count, "size, axes: out of range");
            auto& axis = p.axis[3 - dims + i];
            axis.size = size[i], axis.centre = centres[i];
            axis.position = floats(positions) + axes[i] * count;
            if (widths) axis.width = floats(*widths) + axes[i] * count;
            shape.push_back(size[i]);
        }
    }

    int64_t taps() const { return p.axis[0].size * p.axis[1].size * p.axis[2].size; }
};

constexpr const char* kNoMemory = "out of memory for the scratch buffers of dcls_kernel";

Tensor forward(const Tensor& weight, const Tensor& P, const MaybeTensor& SIG, Ints size, Ints axes, Ints centres,
               bool gauss, bool normalized, double spread) {
    Call call(weight, P, SIG, size, axes, centres, gauss, normalized, spread);
    Tensor kernel = empty_row_major(call.shape, ScalarType::Float);
    call.p.kernel = written(kernel);
    const Params p = call.p;
    run_and_record([p] { STD_TORCH_CHECK(dcls_kernel::forward(active_isa(), p), kNoMemory); }, call.weight,
                   call.positions, call.widths, kernel);
    return kernel;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& weight, const Tensor& P,
                                            const MaybeTensor& SIG, Ints size, Ints axes, Ints centres, bool gauss,
                                            bool normalized, double spread) {
    Call call(weight, P, SIG, size, axes, centres, gauss, normalized, spread);
    const Tensor g = dense(grad);
    check_floats("grad", g, call.p.pairs * call.taps());
    Tensor weight_grad = empty_row_major(shape_of(weight), ScalarType::Float);
    Tensor positions_grad = empty_row_major(shape_of(P), ScalarType::Float);
    Tensor widths_grad = empty_row_major(SIG ? shape_of(P) : std::vector<int64_t>{0}, ScalarType::Float);
    call.p.grad = floats(g), call.p.weight_grad = written(weight_grad);
    const size_t dims = size.size();
    for (size_t i = 0; i < dims; ++i) {
        auto& axis = call.p.axis[3 - dims + i];
        axis.position_grad = written(positions_grad) + call.axes[i] * weight_grad.numel();
        if (SIG) axis.width_grad = written(widths_grad) + call.axes[i] * weight_grad.numel();
    }
    const Params p = call.p;
    run_and_record([p] { STD_TORCH_CHECK(dcls_kernel::backward(active_isa(), p), kNoMemory); }, g, call.weight,
                   call.positions, call.widths, weight_grad, positions_grad, widths_grad);
    return {weight_grad, positions_grad, widths_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def(
        "dcls_kernel_cpu(Tensor weight, Tensor P, Tensor? SIG, int[] size, int[] axes, int[] centres, bool gauss, bool "
        "normalized, float spread) -> Tensor");
    m.def(
        "dcls_kernel_cpu_backward(Tensor grad, Tensor weight, Tensor P, Tensor? SIG, int[] size, int[] axes, int[] "
        "centres, bool gauss, bool normalized, float spread) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CPU, m) {
    m.impl("dcls_kernel_cpu", TORCH_BOX(&forward));
    m.impl("dcls_kernel_cpu_backward", TORCH_BOX(&backward));
}

}  // namespace bindings
}  // namespace pdn
