// Torch ops of the CPU kernels of int8_conv2d and int8_linear, which run on one engine: tokens are the pixels of an
// image of one row. Arguments were checked in Python; what is checked again here is what would make a kernel touch
// memory that is not its own.
#include <torch/csrc/stable/library.h>

#include "../int8_conv2d/dispatch.h"
#include "rows.h"

namespace pdn {
namespace bindings {
namespace {

using int8_conv2d::Activation;
using int8_conv2d::Algorithm;
using int8_conv2d::Axis;
using int8_conv2d::ConvParams;
using int8_conv2d::DType;

using Ints = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

DType kernel_dtype(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Float:
            return DType::float32;
        case ScalarType::BFloat16:
            return DType::bfloat16;
        case ScalarType::Half:
            return DType::float16;
        case ScalarType::Char:
            return DType::int8;
        case ScalarType::Int:
            return DType::int32;
        default:
            STD_TORCH_CHECK(false, "cpu kernels of int8_conv2d give float32, bfloat16, float16, int8 and int32");
            return DType::float32;
    }
}

// `geometry` is stride (2 ints), padding (top, bottom, left, right), dilation (2) and kernel (2).
struct Geometry {
    const int64_t *stride, *padding, *dilation, *kernel;

    explicit Geometry(const Ints& flat) {
        STD_TORCH_CHECK(flat.size() == 10, "geometry: expected 10 ints");
        stride = flat.data();
        padding = stride + 2;
        dilation = padding + 4;
        kernel = dilation + 2;
        for (int i = 0; i < 2; ++i)
            STD_TORCH_CHECK(stride[i] > 0 && dilation[i] > 0 && kernel[i] > 0,
                            "geometry: stride, dilation, kernel must be positive");
    }
};

// What the choice of the algorithm and the packed weights depend on.
ConvParams without_tensors(const Geometry& g, int64_t in_channels, int64_t out_channels, int64_t groups) {
    STD_TORCH_CHECK(groups > 0 && out_channels > 0 && out_channels % groups == 0 && in_channels > 0,
                    "groups must divide the output channels");
    STD_TORCH_CHECK(in_channels * g.kernel[0] * g.kernel[1] <= 131071, "weight: too many products for an int32 sum");
    ConvParams p{};
    p.batch = p.upsample = p.threads = 1;
    p.groups = groups;
    p.in_channels = in_channels;
    p.out_channels = out_channels / groups;
    for (int i = 0; i < 2; ++i) {
        Axis& a = i == 0 ? p.rows : p.columns;
        a.step = g.stride[i];
        a.offset = -g.padding[2 * i];
        a.dilation = g.dilation[i];
        a.kernel = g.kernel[i];
    }
    return p;
}

Tensor empty_bytes(int64_t bytes) {
    const int64_t shape[1] = {bytes};
    return torch::stable::empty({shape, 1}, ScalarType::Byte);
}

const Algorithm& algorithm_at(const Ints& kind) {
    STD_TORCH_CHECK(kind.size() == 2 && kind[0] >= 0 && kind[0] < kIsaCount, "kind: expected [ISA level, algorithm]");
    const Isa isa = static_cast<Isa>(kind[0]);
    STD_TORCH_CHECK(isa_available(isa), "packed weights are of an ISA level this processor lacks");
    const auto& set = int8_conv2d::kernel_set(isa);
    STD_TORCH_CHECK(kind[1] >= 0 && kind[1] < set.algorithm_count,
                    "packed weights name an algorithm that does not exist");
    return set.algorithms[kind[1]];
}

struct Packed {
    Tensor data;
    Ints kind;  // ISA level, algorithm
};

Packed pack_weight(const Tensor& weight, const ConvParams& p) {
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char, "weight: expected int8");
    const Isa isa = active_isa();
    const int index = int8_conv2d::choose_algorithm(isa, p);
    const Ints kind = {static_cast<int64_t>(isa), index};
    const Algorithm& algorithm = algorithm_at(kind);
    const Tensor w = dense(weight);
    Tensor packed = empty_bytes(algorithm.packed_bytes(p));
    int8_conv2d::pack(algorithm, p, static_cast<const int8_t*>(w.data_ptr()), packed.data_ptr());
    return {packed, kind};
}

// Scales and zero points as kernels read them; `pixels` of them where there is one per pixel.
struct Scales {
    Tensor input, weight;
    MaybeTensor zero_point;

    Scales(ConvParams& p, const Tensor& input_scale, const Tensor& weight_scale, const MaybeTensor& input_zero_point,
           int64_t pixels)
        : input(dense(input_scale)), weight(dense(weight_scale)), zero_point(dense(input_zero_point)) {
        p.per_pixel = input.dim() > 0;
        const int64_t count = p.per_pixel ? pixels : 1;
        check_numel(input, ScalarType::Float, count, "input_scale");
        check_numel(zero_point, ScalarType::Int, count, "input_zero_point");
        check_numel(weight, ScalarType::Float, p.groups * p.out_channels, "weight_scale");
        p.input_zero_point = pointer<int32_t>(zero_point);
        if (p.out_dtype == DType::int32) {
            STD_TORCH_CHECK(!p.per_pixel, "input_scale: int32 results need one scale for the tensor");
            return;
        }
        p.input_scale = static_cast<const float*>(input.data_ptr());
        p.weight_scale = static_cast<const float*>(weight.data_ptr());
    }
};

struct Requantization {
    MaybeTensor scale, zero_point;

    Requantization(ConvParams& p, const MaybeTensor& out_scale, const MaybeTensor& out_zero_point) {
        if (p.out_dtype != DType::int8) return;
        scale = dense(out_scale), zero_point = dense(out_zero_point);
        STD_TORCH_CHECK(scale.has_value(), "out_scale: int8 results need one");
        check_numel(scale, ScalarType::Float, 1, "out_scale");
        check_numel(zero_point, ScalarType::Int, 1, "out_zero_point");
        p.out_scale = pointer<float>(scale);
        p.out_zero_point = pointer<int32_t>(zero_point);
    }
};

void set_activation(ConvParams& p, int64_t activation) {
    STD_TORCH_CHECK(is_elementwise(activation), "activation: unknown");
    p.activation = static_cast<Activation>(activation);
}

template <class... Tensors>
void run_checked(const Algorithm& algorithm, const ConvParams& given, const Tensors&... tensors) {
    if (given.batch == 0) return;
    run_and_record(
        [&algorithm, p = int8_conv2d::prepared(algorithm, given)] {
            STD_TORCH_CHECK(int8_conv2d::run(algorithm, p), "out of memory for the scratch buffers of int8_conv2d");
        },
        tensors...);
}

// ------------------------------------------------------------------------------------------------------ convolution

void set_axis(Axis& a, const Geometry& g, int i, const Tensor& x, int64_t upsample) {
    a.in_size = x.size(2 + i);
    a.in_stride = x.stride(2 + i);
    const int64_t span = g.dilation[i] * (g.kernel[i] - 1) + 1;
    const int64_t room = a.in_size * upsample + g.padding[2 * i] + g.padding[2 * i + 1] - span;
    STD_TORCH_CHECK(room >= 0, "input: the kernel does not fit the padded input");
    a.out_size = room / g.stride[i] + 1;
}

void set_output(ConvParams& p, const Tensor& output) {
    p.output = output.data_ptr();
    p.out_batch_stride = output.stride(0);
    p.rows.out_stride = output.stride(2);
    p.columns.out_stride = output.stride(3);
}

void set_residual(ConvParams& p, const MaybeTensor& residual, const Ints& shape) {
    if (!residual) return;
    STD_TORCH_CHECK(residual->dim() == 4 && shape_of(*residual) == shape, "residual: wrong shape");
    p.residual_dtype = kernel_dtype(residual->scalar_type());
    STD_TORCH_CHECK(p.residual_dtype <= DType::float16, "residual: expected float32, bfloat16 or float16");
    p.residual = residual->data_ptr();
    p.residual_batch_stride = residual->stride(0);
    p.rows.residual_stride = residual->stride(2);
    p.columns.residual_stride = residual->stride(3);
}

Tensor convolve(const Tensor& input, const Packed& packed, ConvParams p, const Geometry& g, const Tensor& input_scale,
                const Tensor& weight_scale, const MaybeTensor& input_zero_point, const MaybeTensor& bias,
                const MaybeTensor& channel_bias, const MaybeTensor& film, const MaybeTensor& residual,
                int64_t activation, ScalarType out_dtype, const MaybeTensor& out_scale,
                const MaybeTensor& out_zero_point, int64_t upsample) {
    STD_TORCH_CHECK(input.dim() == 4 && input.scalar_type() == ScalarType::Char, "input: expected int8 [N, C, H, W]");
    STD_TORCH_CHECK(input.size(1) == p.groups * p.in_channels, "input: wrong number of channels");
    STD_TORCH_CHECK(upsample == 1 || upsample == 2, "upsample: expected 1 or 2");
    const Algorithm& algorithm = algorithm_at(packed.kind);
    const Tensor x = with_adjacent_channels(input);
    p.batch = x.size(0);
    p.input = static_cast<const int8_t*>(x.data_ptr());
    p.in_batch_stride = x.stride(0);
    p.upsample = upsample;
    p.threads = torch::stable::get_num_threads();
    set_axis(p.rows, g, 0, x, upsample);
    set_axis(p.columns, g, 1, x, upsample);
    p.packed = packed.data.data_ptr();
    p.out_dtype = kernel_dtype(out_dtype);
    set_activation(p, activation);
    const int64_t channels = p.groups * p.out_channels;
    const Ints shape = {p.batch, channels, p.rows.out_size, p.columns.out_size};
    Tensor output = empty_channels_last(shape, out_dtype);
    set_output(p, output);
    const Scales scales(p, input_scale, weight_scale, input_zero_point, p.batch * x.size(2) * x.size(3));
    const Requantization requantization(p, out_scale, out_zero_point);
    const MaybeTensor b = dense(bias), c = dense(channel_bias), f = dense(film);
    const MaybeTensor r = residual ? MaybeTensor(with_adjacent_channels(*residual)) : std::nullopt;
    check_numel(b, ScalarType::Float, channels, "bias");
    check_numel(c, ScalarType::Float, p.batch * channels, "channel_bias");
    check_numel(f, ScalarType::Float, p.batch * 2 * channels, "film");
    p.bias = pointer<float>(b), p.channel_bias = pointer<float>(c), p.film = pointer<float>(f);
    set_residual(p, r, shape);
    run_checked(algorithm, p, x, packed.data, scales.input, scales.weight, scales.zero_point, b, c, f, r,
                requantization.scale, requantization.zero_point, output);
    return output;
}

Tensor conv(const Tensor& input, const Tensor& weight, const Tensor& input_scale, const Tensor& weight_scale,
            const MaybeTensor& input_zero_point, const MaybeTensor& bias, Ints geometry, int64_t groups,
            const MaybeTensor& channel_bias, const MaybeTensor& film, const MaybeTensor& residual, int64_t activation,
            ScalarType out_dtype, const MaybeTensor& out_scale, const MaybeTensor& out_zero_point, int64_t upsample) {
    refuse_recording("int8_conv2d packs its weight in every call; only layers that hold packed weights are recorded");
    const Geometry g(geometry);
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == g.kernel[0] && weight.size(3) == g.kernel[1],
                    "weight: not of the geometry's kernel");
    const ConvParams p = without_tensors(g, weight.size(1), weight.size(0), groups);
    return convolve(input, pack_weight(weight, p), p, g, input_scale, weight_scale, input_zero_point, bias,
                    channel_bias, film, residual, activation, out_dtype, out_scale, out_zero_point, upsample);
}

// -> packed weights, [ISA level, algorithm]: what int8_conv2d_cpu_packed needs back.
std::tuple<Tensor, Ints> pack(const Tensor& weight, Ints geometry, int64_t groups) {
    const Geometry g(geometry);
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == g.kernel[0] && weight.size(3) == g.kernel[1],
                    "weight: not of the geometry's kernel");
    Packed packed = pack_weight(weight, without_tensors(g, weight.size(1), weight.size(0), groups));
    return {packed.data, packed.kind};
}

Packed checked(const Tensor& packed, Ints kind, const ConvParams& p) {
    const Algorithm& algorithm = algorithm_at(kind);
    STD_TORCH_CHECK(algorithm.unsupported(p) == nullptr && packed.numel() == algorithm.packed_bytes(p),
                    "packed: weights of another layer");
    return {packed, kind};
}

Tensor conv_packed(const Tensor& input, const Tensor& packed, Ints kind, const Tensor& input_scale,
                   const Tensor& weight_scale, const MaybeTensor& input_zero_point, const MaybeTensor& bias,
                   Ints geometry, int64_t out_channels, int64_t groups, const MaybeTensor& channel_bias,
                   const MaybeTensor& film, const MaybeTensor& residual, int64_t activation, ScalarType out_dtype,
                   const MaybeTensor& out_scale, const MaybeTensor& out_zero_point, int64_t upsample) {
    const Geometry g(geometry);
    STD_TORCH_CHECK(input.dim() == 4, "input: expected [N, C, H, W]");
    const ConvParams p = without_tensors(g, input.size(1) / (groups > 0 ? groups : 1), out_channels, groups);
    return convolve(input, checked(packed, kind, p), p, g, input_scale, weight_scale, input_zero_point, bias,
                    channel_bias, film, residual, activation, out_dtype, out_scale, out_zero_point, upsample);
}

// ------------------------------------------------------------------------------------------------------ linear

const Ints kOnePixel = {1, 1, 0, 0, 0, 0, 1, 1, 1, 1};

// Tokens of one tensor as the pixels of a row.
Rows tokens_of(const Tensor& given) {
    const int64_t last = given.dim() - 1;
    const auto stride = [&](const Tensor& t) {  // between tokens, -1 if there is no one stride
        int64_t step = -1, expected = 0;
        for (int64_t axis = last - 1; axis >= 0; --axis) {
            if (t.size(axis) == 1) continue;
            if (step >= 0 && t.stride(axis) != expected) return static_cast<int64_t>(-1);
            if (step < 0) step = t.stride(axis);
            expected = t.stride(axis) * t.size(axis);
        }
        return step < 0 ? t.size(last) : step;
    };
    const bool adjacent = given.size(last) == 1 || given.stride(last) == 1;
    const Tensor tensor = given.numel() == 0 || (adjacent && stride(given) >= 0) ? given : dense(given);
    const int64_t channels = tensor.size(last);
    return {tensor, channels > 0 ? tensor.numel() / channels : 0, channels, stride(tensor)};
}

Tensor multiply(const Tensor& input, const Packed& packed, ConvParams p, const Tensor& input_scale,
                const Tensor& weight_scale, const MaybeTensor& input_zero_point, const MaybeTensor& bias,
                const MaybeTensor& residual, int64_t activation, ScalarType out_dtype, const MaybeTensor& out_scale,
                const MaybeTensor& out_zero_point) {
    STD_TORCH_CHECK(input.scalar_type() == ScalarType::Char, "input: expected int8");
    const Algorithm& algorithm = algorithm_at(packed.kind);
    const Rows x = tokens_of(input);
    STD_TORCH_CHECK(x.channels == p.in_channels, "input: wrong number of channels");
    p.threads = torch::stable::get_num_threads();
    p.batch = x.rows > 0 ? 1 : 0;
    p.rows.in_size = p.rows.out_size = 1;
    p.columns.in_size = p.columns.out_size = x.rows;
    p.columns.in_stride = x.row_stride;
    p.columns.out_stride = p.out_channels;
    p.input = static_cast<const int8_t*>(x.tensor.data_ptr());
    p.packed = packed.data.data_ptr();
    p.out_dtype = kernel_dtype(out_dtype);
    set_activation(p, activation);
    Ints shape = shape_of(input);
    shape.back() = p.out_channels;
    Tensor output = empty_row_major(shape, out_dtype);
    p.output = output.data_ptr();
    const Scales scales(p, input_scale, weight_scale, input_zero_point, x.rows);
    const Requantization requantization(p, out_scale, out_zero_point);
    const MaybeTensor b = dense(bias);
    check_numel(b, ScalarType::Float, p.out_channels, "bias");
    p.bias = pointer<float>(b);
    MaybeTensor r;
    if (residual) {
        STD_TORCH_CHECK(shape_of(*residual) == shape, "residual: wrong shape");
        const Rows rows = tokens_of(*residual);
        r = rows.tensor;
        p.residual_dtype = kernel_dtype(r->scalar_type());
        STD_TORCH_CHECK(p.residual_dtype <= DType::float16, "residual: expected float32, bfloat16 or float16");
        p.residual = r->data_ptr();
        p.columns.residual_stride = rows.row_stride;
    }
    run_checked(algorithm, p, x.tensor, packed.data, scales.input, scales.weight, scales.zero_point, b, r,
                requantization.scale, requantization.zero_point, output);
    return output;
}

Tensor linear(const Tensor& input, const Tensor& weight, const Tensor& input_scale, const Tensor& weight_scale,
              const MaybeTensor& input_zero_point, const MaybeTensor& bias, const MaybeTensor& residual,
              int64_t activation, ScalarType out_dtype, const MaybeTensor& out_scale,
              const MaybeTensor& out_zero_point) {
    refuse_recording("int8_linear packs its weight in every call; only layers that hold packed weights are recorded");
    STD_TORCH_CHECK(input.dim() >= 1 && weight.dim() == 2, "expected input [..., K] and weight [O, K]");
    const ConvParams p = without_tensors(Geometry(kOnePixel), weight.size(1), weight.size(0), 1);
    return multiply(input, pack_weight(weight, p), p, input_scale, weight_scale, input_zero_point, bias, residual,
                    activation, out_dtype, out_scale, out_zero_point);
}

Tensor linear_packed(const Tensor& input, const Tensor& packed, Ints kind, const Tensor& input_scale,
                     const Tensor& weight_scale, const MaybeTensor& input_zero_point, const MaybeTensor& bias,
                     int64_t out_channels, const MaybeTensor& residual, int64_t activation, ScalarType out_dtype,
                     const MaybeTensor& out_scale, const MaybeTensor& out_zero_point) {
    STD_TORCH_CHECK(input.dim() >= 1, "input: expected [..., K]");
    const ConvParams p = without_tensors(Geometry(kOnePixel), input.size(input.dim() - 1), out_channels, 1);
    return multiply(input, checked(packed, kind, p), p, input_scale, weight_scale, input_zero_point, bias, residual,
                    activation, out_dtype, out_scale, out_zero_point);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def(
        "int8_conv2d_cpu(Tensor input, Tensor weight, Tensor input_scale, Tensor weight_scale, Tensor? "
        "input_zero_point, Tensor? bias, int[] geometry, int groups, Tensor? channel_bias, Tensor? film, Tensor? "
        "residual, int activation, ScalarType out_dtype, Tensor? out_scale, Tensor? out_zero_point, int upsample) -> "
        "Tensor");
    m.def("int8_conv2d_cpu_pack(Tensor weight, int[] geometry, int groups) -> (Tensor, int[])");
    m.def(
        "int8_conv2d_cpu_packed(Tensor input, Tensor packed, int[] kind, Tensor input_scale, Tensor weight_scale, "
        "Tensor? input_zero_point, Tensor? bias, int[] geometry, int out_channels, int groups, Tensor? channel_bias, "
        "Tensor? film, Tensor? residual, int activation, ScalarType out_dtype, Tensor? out_scale, Tensor? "
        "out_zero_point, int upsample) -> Tensor");
    m.def(
        "int8_linear_cpu(Tensor input, Tensor weight, Tensor input_scale, Tensor weight_scale, Tensor? "
        "input_zero_point, Tensor? bias, Tensor? residual, int activation, ScalarType out_dtype, Tensor? out_scale, "
        "Tensor? out_zero_point) -> Tensor");
    m.def(
        "int8_linear_cpu_packed(Tensor input, Tensor packed, int[] kind, Tensor input_scale, Tensor weight_scale, "
        "Tensor? input_zero_point, Tensor? bias, int out_channels, Tensor? residual, int activation, ScalarType "
        "out_dtype, Tensor? out_scale, Tensor? out_zero_point) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CPU, m) {
    m.impl("int8_conv2d_cpu", TORCH_BOX(&conv));
    m.impl("int8_conv2d_cpu_pack", TORCH_BOX(&pack));
    m.impl("int8_conv2d_cpu_packed", TORCH_BOX(&conv_packed));
    m.impl("int8_linear_cpu", TORCH_BOX(&linear));
    m.impl("int8_linear_cpu_packed", TORCH_BOX(&linear_packed));
}

}  // namespace bindings
}  // namespace pdn
