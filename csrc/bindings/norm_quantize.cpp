// Torch ops of the CPU kernels of norm_quantize. Arguments were checked in Python; what is checked again here is what
// would make a kernel touch memory that is not its own.
#include <torch/csrc/stable/library.h>

#include "../norm_quantize/dispatch.h"
#include "rows.h"

namespace pdn {
namespace bindings {
namespace {

using norm_quantize::Activation;
using norm_quantize::CodesOut;
using norm_quantize::DType;
using norm_quantize::GroupNormParams;
using norm_quantize::LayerNormParams;
using norm_quantize::Panel;

using MaybeTensor = std::optional<Tensor>;

DType kernel_dtype(ScalarType dtype) { return float_dtype<DType>("norm_quantize", dtype); }

// Codes, and where no scale is given, scale and zero point a row; else empty tensors in their place.
struct Results {
    Tensor codes, scale, zero_point;
};

Results empty_results(const std::vector<int64_t>& shape, int64_t channel_axis, bool dynamic) {
    std::vector<int64_t> position = shape;
    position[static_cast<size_t>(channel_axis)] = 1;
    if (!dynamic) position = {0};
    return {empty_rows(shape, ScalarType::Char), empty_row_major(position, ScalarType::Float),
            empty_row_major(position, ScalarType::Int)};
}

CodesOut codes_out(const Results& results, const MaybeTensor& scale, const MaybeTensor& zero_point) {
    check_numel(scale, ScalarType::Float, 1, "scale");
    check_numel(zero_point, ScalarType::Int, 1, "zero_point");
    CodesOut out{};
    out.scale = pointer<float>(scale);
    out.zero_point = pointer<int32_t>(zero_point);
    if (!scale) {
        out.out_scale = static_cast<float*>(results.scale.data_ptr());
        out.out_zero_point = static_cast<int32_t*>(results.zero_point.data_ptr());
    }
    out.codes = static_cast<int8_t*>(results.codes.data_ptr());
    return out;
}

// `image` itself if every image's pixels have one stride and adjacent channels, else a copy of which that is true.
Tensor with_rows(const Tensor& image) {
    const bool usable = image.numel() == 0 || (has_adjacent_channels(image) && joined_stride(image, 2, 4) >= 0);
    return usable ? image : copied_rows(image);
}

Panel panel_of(const Tensor& image) {
    return {image.data_ptr(), image.size(1), image.stride(0), joined_stride(image, 2, 4)};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_quantize(const Tensor& input, const MaybeTensor& skip, int64_t groups,
                                                       const MaybeTensor& weight, const MaybeTensor& bias, double eps,
                                                       const MaybeTensor& film, int64_t activation,
                                                       const MaybeTensor& channel_scale, const MaybeTensor& scale,
                                                       const MaybeTensor& zero_point) {
    STD_TORCH_CHECK(input.dim() == 4, "input: expected images [N, C, H, W]");
    const Tensor x = with_rows(input);
    MaybeTensor second;
    std::vector<int64_t> shape = shape_of(input);
    if (skip) {
        STD_TORCH_CHECK(skip->dim() == 4 && skip->size(0) == shape[0] && skip->size(2) == shape[2] &&
                            skip->size(3) == shape[3] && skip->scalar_type() == input.scalar_type(),
                        "skip: wrong shape or dtype");
        second = with_rows(*skip);
        shape[1] += skip->size(1);
    }
    STD_TORCH_CHECK(groups > 0 && shape[1] % groups == 0, "groups must divide the channels");
    STD_TORCH_CHECK(is_elementwise(activation), "activation: unknown");
    const Results results = empty_results(shape, 1, !scale);
    const MaybeTensor w = dense(weight), b = dense(bias), f = dense(film), factors = dense(channel_scale);
    for (const auto& [tensor, count, name] :
         {std::tuple{&w, shape[1], "weight"}, std::tuple{&b, shape[1], "bias"},
          std::tuple{&f, 2 * shape[0] * shape[1], "film"}, std::tuple{&factors, shape[1], "channel_scale"}})
        check_numel(*tensor, ScalarType::Float, count, name);
    GroupNormParams p{};
    p.dtype = kernel_dtype(x.scalar_type());
    p.activation = static_cast<Activation>(activation);
    p.batch = shape[0];
    p.pixels = shape[2] * shape[3];
    p.channels = shape[1];
    p.groups = groups;
    p.panel[0] = panel_of(x);
    if (second) p.panel[1] = panel_of(*second);
    p.eps = eps;
    p.weight = pointer<float>(w);
    p.bias = pointer<float>(b);
    p.film = pointer<float>(f);
    p.channel_scale = pointer<float>(factors);
    p.out = codes_out(results, scale, zero_point);
    const auto run = [p] {
        STD_TORCH_CHECK(norm_quantize::run(active_isa(), p), "out of memory for the partial sums of norm_quantize");
    };
    if (p.batch > 0 && p.pixels > 0 && p.channels > 0)
        run_and_record(run, x, second, w, b, f, factors, scale, zero_point, results.codes, results.scale,
                       results.zero_point);
    return {results.codes, results.scale, results.zero_point};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_quantize(const Tensor& input, const MaybeTensor& weight,
                                                       const MaybeTensor& bias, double eps, const MaybeTensor& film,
                                                       const MaybeTensor& channel_scale, const MaybeTensor& scale,
                                                       const MaybeTensor& zero_point) {
    STD_TORCH_CHECK(input.dim() == 2 || input.dim() == 3, "input: expected [N, C] or [N, T, C]");
    const Rows x = rows_of(input);
    const Results results = empty_results(shape_of(input), input.dim() - 1, !scale);
    const MaybeTensor w = dense(weight), b = dense(bias), f = dense(film), factors = dense(channel_scale);
    check_numel(w, ScalarType::Float, x.channels, "weight");
    check_numel(b, ScalarType::Float, x.channels, "bias");
    check_numel(f, ScalarType::Float, 2 * x.channels * input.size(0), "film");
    check_numel(factors, ScalarType::Float, x.channels, "channel_scale");
    LayerNormParams p{};
    p.dtype = kernel_dtype(x.tensor.scalar_type());
    p.rows = x.rows;
    p.channels = x.channels;
    p.row_stride = x.row_stride;
    p.input = x.tensor.data_ptr();
    p.eps = eps;
    p.weight = pointer<float>(w);
    p.bias = pointer<float>(b);
    p.film = pointer<float>(f);
    p.film_rows = p.film && input.size(0) > 0 ? p.rows / input.size(0) : p.rows;
    p.channel_scale = pointer<float>(factors);
    p.out = codes_out(results, scale, zero_point);
    const auto run = [p] {
        STD_TORCH_CHECK(norm_quantize::run(active_isa(), p), "out of memory for the scratch buffers of norm_quantize");
    };
    if (p.rows > 0 && p.channels > 0)
        run_and_record(run, x.tensor, w, b, f, factors, scale, zero_point, results.codes, results.scale,
                       results.zero_point);
    return {results.codes, results.scale, results.zero_point};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def(
        "group_norm_quantize_cpu(Tensor input, Tensor? skip, int groups, Tensor? weight, Tensor? bias, float eps, "
        "Tensor? film, int activation, Tensor? channel_scale, Tensor? scale, Tensor? zero_point) -> (Tensor, Tensor, "
        "Tensor)");
    m.def(
        "layer_norm_quantize_cpu(Tensor input, Tensor? weight, Tensor? bias, float eps, Tensor? film, "
        "Tensor? channel_scale, Tensor? scale, Tensor? zero_point) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CPU, m) {
    m.impl("group_norm_quantize_cpu", TORCH_BOX(&group_norm_quantize));
    m.impl("layer_norm_quantize_cpu", TORCH_BOX(&layer_norm_quantize));
}

}  // namespace bindings
}  // namespace pdn
