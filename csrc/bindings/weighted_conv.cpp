// Torch ops of the CPU kernels of weighted convolution. Arguments were checked in Python; what is checked again here is
// what would make a kernel touch memory that is not its own.
#include <torch/csrc/stable/library.h>

#include "../weighted_conv/dispatch.h"
#include "tape.h"
#include "tensors.h"

namespace pdn {
namespace bindings {
namespace {

using weighted_conv::Activation;
using weighted_conv::Algorithm;
using weighted_conv::Axis;
using weighted_conv::ConvParams;
using weighted_conv::DType;
using weighted_conv::GradWeightParams;
using weighted_conv::WeightView;

using Ints = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

// `geometry` is stride (d ints), padding (2d: low and high per axis), dilation (d) and kernel (d).
struct Geometry {
    int64_t dims;
    const int64_t *stride, *padding, *dilation, *kernel;

    explicit Geometry(const Ints& flat) : dims(static_cast<int64_t>(flat.size()) / 5) {
        STD_TORCH_CHECK(flat.size() % 5 == 0 && dims >= 1 && dims <= 3,
                        "geometry: expected 5 ints per axis, 1 to 3 axes");
        stride = flat.data();
        padding = stride + dims;
        dilation = padding + 2 * dims;
        kernel = dilation + dims;
        for (int64_t i = 0; i < dims; ++i)
            STD_TORCH_CHECK(stride[i] > 0 && dilation[i] > 0 && kernel[i] > 0,
                            "geometry: stride, dilation, kernel must be positive");
    }

    int64_t out_size(int64_t in_size, int64_t i) const {
        return (in_size + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1) / stride[i] + 1;
    }
};

DType kernel_dtype(ScalarType dtype) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                    "cpu kernels take float32 and bfloat16");
    return dtype == ScalarType::Float ? DType::float32 : DType::bfloat16;
}

// Kernel, step and dilation; sizes and strides stay those of a single pixel until a tensor is there.
ConvParams without_tensors(const Geometry& g, int64_t in_channels, int64_t out_channels, int64_t groups,
                           ScalarType dtype) {
    STD_TORCH_CHECK(groups > 0 && out_channels % groups == 0, "groups must divide the output channels");
    ConvParams p{};
    p.dtype = kernel_dtype(dtype);
    p.batch = 1;
    p.groups = groups;
    p.in_channels = in_channels;
    p.out_channels = out_channels / groups;
    for (int64_t axis = 0; axis < 3; ++axis) {
        const int64_t i = axis - (3 - g.dims);
        Axis& a = p.axis[axis];
        a.in_size = a.out_size = i < 0 ? 1 : 2;  // an axis that exists is of unknown size, which is not 1
        a.step = i < 0 ? 1 : g.stride[i];
        a.offset = i < 0 ? 0 : -g.padding[2 * i];
        a.offset_step = i < 0 ? 1 : g.dilation[i];
        a.kernel = a.taps = i < 0 ? 1 : g.kernel[i];
        a.tap_step = 1;
    }
    return p;
}

void set_input(ConvParams& p, const Geometry& g, const Tensor& input) {
    p.batch = input.size(0);
    p.in_batch_stride = input.stride(0);
    p.input = input.data_ptr();
    for (int64_t i = 0; i < g.dims; ++i) {
        Axis& a = p.axis[3 - g.dims + i];
        a.in_size = input.size(2 + i);
        a.in_stride = input.stride(2 + i);
        a.out_size = g.out_size(a.in_size, i);
    }
}

void set_output(ConvParams& p, const Geometry& g, const Tensor& output) {
    p.out_batch_stride = output.stride(0);
    p.output = output.data_ptr();
    for (int64_t i = 0; i < g.dims; ++i) p.axis[3 - g.dims + i].out_stride = output.stride(2 + i);
}

Ints output_shape(const ConvParams& p, const Geometry& g) {
    Ints shape = {p.batch, p.groups * p.out_channels};
    for (int64_t i = 0; i < g.dims; ++i) shape.push_back(p.axis[3 - g.dims + i].out_size);
    return shape;
}

WeightView view_of(const ConvParams& p, const Tensor& weight, const MaybeTensor& density) {
    const int64_t taps = p.axis[0].kernel * p.axis[1].kernel * p.axis[2].kernel;
    return {weight.data_ptr(),
            density ? density->data_ptr() : nullptr,
            p.out_channels * p.in_channels * taps,
            p.in_channels * taps,
            taps,
            1};
}

MaybeTensor map(const MaybeTensor& tensor, Tensor (*f)(const Tensor&)) {
    return tensor ? MaybeTensor(f(*tensor)) : std::nullopt;
}

Tensor widened(const Tensor& tensor) { return to_dtype(tensor, ScalarType::Float); }

Tensor empty_bytes(int64_t bytes) {
    const int64_t shape[1] = {bytes};
    return torch::stable::empty({shape, 1}, ScalarType::Byte);
}

Isa isa_of(int64_t level) {
    STD_TORCH_CHECK(level >= 0 && level < kIsaCount && isa_available(static_cast<Isa>(level)),
                    "packed weights are of an ISA level this processor lacks");
    return static_cast<Isa>(level);
}

const Algorithm& algorithm_at(Isa isa, int64_t index) {
    const auto& set = weighted_conv::kernel_set(isa);
    STD_TORCH_CHECK(index >= 0 && index < set.algorithm_count, "packed weights name an algorithm that does not exist");
    return set.algorithms[index];
}

// -> packed weights, [ISA level, algorithm]: what weighted_conv_packed needs back. Algorithm -1, and nothing packed,
// where no kernel of the active level takes this dtype directly.
std::tuple<Tensor, Ints> pack(const Tensor& weight, const MaybeTensor& density, Ints geometry, int64_t groups,
                              bool approximate) {
    const Geometry g(geometry);
    const ConvParams p = without_tensors(g, weight.size(1), weight.size(0), groups, weight.scalar_type());
    const Isa isa = active_isa();
    const int index = weighted_conv::choose_algorithm(isa, p, approximate);
    if (index < 0) return {empty_bytes(0), Ints{static_cast<int64_t>(isa), -1}};
    const Algorithm& algorithm = algorithm_at(isa, index);
    const Tensor w = dense(weight);
    const MaybeTensor d = map(density, dense);
    Tensor packed = empty_bytes(algorithm.packed_bytes(p));
    weighted_conv::pack(algorithm, p, view_of(p, w, d), packed.data_ptr());
    return {packed, Ints{static_cast<int64_t>(isa), index}};
}

Tensor run_packed(const Tensor& input, ConvParams p, const Geometry& g, const Algorithm& algorithm,
                  const Tensor& packed, const MaybeTensor& bias, const MaybeTensor& residual, int64_t activation) {
    STD_TORCH_CHECK(input.dim() == g.dims + 2, "input: wrong number of dimensions");
    STD_TORCH_CHECK(input.size(1) == p.groups * p.in_channels, "input: wrong number of channels");
    const Tensor x = with_adjacent_channels(input);
    set_input(p, g, x);
    for (const Axis& a : p.axis) STD_TORCH_CHECK(a.out_size > 0, "input: the kernel does not fit the padded input");
    STD_TORCH_CHECK(ends_convolution(activation), "activation: unknown");
    p.activation = static_cast<Activation>(activation);
    p.packed = packed.data_ptr();
    const Ints shape = output_shape(p, g);
    Tensor output = empty_channels_last(shape, input.scalar_type());
    set_output(p, g, output);
    if (p.batch == 0) return output;
    const MaybeTensor b = map(bias, dense), r = map(residual, with_adjacent_channels);
    if (b) {
        STD_TORCH_CHECK(b->numel() == p.groups * p.out_channels, "bias: wrong length");
        p.bias = b->data_ptr();
    }
    if (r) {
        STD_TORCH_CHECK(r->dim() == g.dims + 2, "residual: wrong number of dimensions");
        for (size_t i = 0; i < shape.size(); ++i)
            STD_TORCH_CHECK(r->size(static_cast<int64_t>(i)) == shape[i], "residual: wrong shape");
        p.residual = r->data_ptr();
        p.residual_batch_stride = r->stride(0);
        for (int64_t i = 0; i < g.dims; ++i) p.axis[3 - g.dims + i].residual_stride = r->stride(2 + i);
    }
    run_and_record(
        [&algorithm, p] {
            STD_TORCH_CHECK(weighted_conv::run(algorithm, p), "out of memory for the scratch buffers of weighted_conv");
        },
        x, packed, b, r, output);
    return output;
}

Tensor forward_packed(const Tensor& input, const Tensor& packed, Ints kind, const MaybeTensor& bias,
                      const MaybeTensor& residual, Ints geometry, int64_t out_channels, int64_t groups,
                      int64_t activation) {
    const Geometry g(geometry);
    STD_TORCH_CHECK(kind.size() == 2, "kind: expected [ISA level, algorithm]");
    const ConvParams p =
        without_tensors(g, input.size(1) / (groups > 0 ? groups : 1), out_channels, groups, input.scalar_type());
    const Algorithm& algorithm = algorithm_at(isa_of(kind[0]), kind[1]);
    STD_TORCH_CHECK(algorithm.unsupported(p) == nullptr && packed.numel() == algorithm.packed_bytes(p),
                    "packed: weights of another convolution");
    return run_packed(input, p, g, algorithm, packed, bias, residual, activation);
}

Tensor forward(const Tensor& input, const Tensor& weight, const MaybeTensor& density, const MaybeTensor& bias,
               const MaybeTensor& residual, Ints geometry, int64_t groups, int64_t activation, bool approximate) {
    refuse_recording("weighted_conv packs its weight in every call; only layers that hold packed weights are recorded");
    const Geometry g(geometry);
    const ConvParams p = without_tensors(g, weight.size(1), weight.size(0), groups, input.scalar_type());
    const Isa isa = active_isa();
    const int index = weighted_conv::choose_algorithm(isa, p, approximate);
    if (index < 0) {  // bfloat16 storage without bfloat16 arithmetic: compute in float32, round once at the end
        const Tensor y = forward(widened(input), widened(weight), map(density, widened), map(bias, widened),
                                 map(residual, widened), geometry, groups, activation, approximate);
        return to_dtype(y, input.scalar_type());
    }
    const Algorithm& algorithm = algorithm_at(isa, index);
    const Tensor w = dense(weight);
    const MaybeTensor d = map(density, dense);
    const Tensor packed = empty_bytes(algorithm.packed_bytes(p));
    weighted_conv::pack(algorithm, p, view_of(p, w, d), packed.data_ptr());
    return run_packed(input, p, g, algorithm, packed, bias, residual, activation);
}

Tensor grad_input(const Tensor& grad, const Tensor& weight, const MaybeTensor& density, Ints input_shape, Ints geometry,
                  int64_t groups, bool approximate) {
    const Geometry g(geometry);
    ConvParams p = without_tensors(g, weight.size(1), weight.size(0), groups, grad.scalar_type());
    const Isa isa = active_isa();
    const Tensor w = dense(weight);
    const MaybeTensor d = map(density, dense);
    const Tensor dy = with_adjacent_channels(grad);
    Tensor dx = empty_channels_last(input_shape, grad.scalar_type());
    set_input(p, g, dx);
    set_output(p, g, dy);
    STD_TORCH_CHECK(output_shape(p, g).size() == static_cast<size_t>(dy.dim()), "grad: wrong number of dimensions");
    for (int64_t i = 0; i < dy.dim(); ++i)
        STD_TORCH_CHECK(output_shape(p, g)[static_cast<size_t>(i)] == dy.size(i), "grad: wrong shape");
    if (p.batch == 0) return dx;
    const WeightView straight = view_of(p, w, d);
    const int64_t taps = straight.in_stride, bytes = p.dtype == DType::float32 ? 4 : 2;
    Tensor packed = empty_bytes(0);
    int packed_by = -2;
    for (int64_t phase = 0; phase < weighted_conv::grad_input_phases(p); ++phase) {
        auto part = weighted_conv::grad_input_phase(p, phase);
        ConvParams& q = part.problem;
        if (q.axis[0].out_size == 0 || q.axis[1].out_size == 0 || q.axis[2].out_size == 0) continue;
        const int index = weighted_conv::choose_algorithm(isa, q, approximate);
        if (index < 0)
            return to_dtype(
                grad_input(widened(dy), widened(w), map(d, widened), input_shape, geometry, groups, approximate),
                grad.scalar_type());
        const Algorithm& algorithm = algorithm_at(isa, index);
        if (index != packed_by) {
            WeightView view = straight;
            view.out_stride = straight.in_stride;
            view.in_stride = straight.out_stride;
            if (part.flipped) {
                view.tap_stride = -1;
                view.weight = static_cast<const char*>(view.weight) + (taps - 1) * bytes;
                if (view.density) view.density = static_cast<const char*>(view.density) + (taps - 1) * bytes;
            }
            packed = empty_bytes(algorithm.packed_bytes(q));
            weighted_conv::pack(algorithm, q, view, packed.data_ptr());
            packed_by = index;
        }
        q.input = dy.data_ptr();
        q.packed = packed.data_ptr();
        q.output = static_cast<char*>(dx.data_ptr()) + part.output_offset * bytes;
        STD_TORCH_CHECK(weighted_conv::run(algorithm, q), "out of memory for the scratch buffers of weighted_conv");
    }
    return dx;
}

std::tuple<Tensor, Tensor> grad_weight(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                       const MaybeTensor& density, Ints geometry, int64_t groups, bool need_weight,
                                       bool need_density) {
    if (input.scalar_type() != ScalarType::Float) {
        auto [dw, dd] = grad_weight(widened(grad), widened(input), widened(weight), map(density, widened), geometry,
                                    groups, need_weight, need_density);
        return {to_dtype(dw, input.scalar_type()), to_dtype(dd, input.scalar_type())};
    }
    const Geometry g(geometry);
    ConvParams shape = without_tensors(g, weight.size(1), weight.size(0), groups, input.scalar_type());
    const Tensor x = with_adjacent_channels(input), dy = with_adjacent_channels(grad);
    STD_TORCH_CHECK(x.size(1) == groups * weight.size(1), "input: wrong number of channels");
    set_input(shape, g, x);
    set_output(shape, g, dy);
    for (int64_t i = 0; i < dy.dim(); ++i)
        STD_TORCH_CHECK(output_shape(shape, g)[static_cast<size_t>(i)] == dy.size(i), "grad: wrong shape");
    const Tensor w = dense(weight);
    const MaybeTensor d = map(density, dense);
    Tensor none = torch::stable::new_empty(w, std::vector<int64_t>{0});
    Tensor dw = need_weight ? torch::stable::empty_like(w) : none;
    Tensor dd = need_density && d ? torch::stable::empty_like(*d) : none;
    GradWeightParams p{};
    p.dtype = shape.dtype;
    p.batch = shape.batch;
    p.groups = shape.groups;
    p.in_channels = shape.in_channels;
    p.out_channels = shape.out_channels;
    p.in_batch_stride = shape.in_batch_stride;
    p.out_batch_stride = shape.out_batch_stride;
    for (int i = 0; i < 3; ++i) p.axis[i] = shape.axis[i];
    p.input = x.data_ptr();
    p.grad = dy.data_ptr();
    p.weight = w.data_ptr();
    p.density = d ? d->data_ptr() : nullptr;
    p.weight_grad = need_weight ? dw.data_ptr() : nullptr;
    p.density_grad = need_density && d ? dd.data_ptr() : nullptr;
    STD_TORCH_CHECK(weighted_conv::grad_weight(active_isa(), p),
                    "out of memory for the partial sums of the weight gradient");
    return {dw, dd};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def(
        "weighted_conv_cpu(Tensor input, Tensor weight, Tensor? density, Tensor? bias, Tensor? residual, int[] "
        "geometry, "
        "int groups, int activation, bool approximate) -> Tensor");
    m.def(
        "weighted_conv_cpu_pack(Tensor weight, Tensor? density, int[] geometry, int groups, bool approximate) -> "
        "(Tensor, int[])");
    m.def(
        "weighted_conv_cpu_packed(Tensor input, Tensor packed, int[] kind, Tensor? bias, Tensor? residual, int[] "
        "geometry, "
        "int out_channels, int groups, int activation) -> Tensor");
    m.def(
        "weighted_conv_cpu_grad_input(Tensor grad, Tensor weight, Tensor? density, int[] input_shape, int[] geometry, "
        "int groups, bool approximate) -> Tensor");
    m.def(
        "weighted_conv_cpu_grad_weight(Tensor grad, Tensor input, Tensor weight, Tensor? density, int[] geometry, "
        "int groups, bool need_weight, bool need_density) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CPU, m) {
    m.impl("weighted_conv_cpu", TORCH_BOX(&forward));
    m.impl("weighted_conv_cpu_pack", TORCH_BOX(&pack));
    m.impl("weighted_conv_cpu_packed", TORCH_BOX(&forward_packed));
    m.impl("weighted_conv_cpu_grad_input", TORCH_BOX(&grad_input));
    m.impl("weighted_conv_cpu_grad_weight", TORCH_BOX(&grad_weight));
}

}  // namespace bindings
}  // namespace pdn
