// Torch ops of the CPU kernels of ode_stage. Arguments were checked in Python; what is checked again here is what would
// make a kernel touch memory that is not its own.
#include <torch/csrc/stable/library.h>

#include "../ode_stage/dispatch.h"
#include "rows.h"

namespace pdn {
namespace bindings {
namespace {

using ode_stage::DType;
using ode_stage::GradParams;
using ode_stage::kMostSlopes;
using ode_stage::Part;
using ode_stage::StageParams;

using MaybeTensor = std::optional<Tensor>;

DType kernel_dtype(ScalarType dtype) { return float_dtype<DType>("ode_stage", dtype); }

// `image` itself if its memory is dense with adjacent channels, else a copy of which that is true.
Tensor dense_rows(const Tensor& image) {
    const bool usable =
        image.numel() == 0 || (has_adjacent_channels(image) && joined_stride(image, 0, 4) == image.size(1));
    return usable ? image : copied_rows(image);
}

void check_image(const char* name, const Tensor& image, const Tensor& like, int64_t channels) {
    STD_TORCH_CHECK(image.dim() == 4 && image.size(0) == like.size(0) && image.size(1) == channels &&
                        image.size(2) == like.size(2) && image.size(3) == like.size(3) &&
                        image.scalar_type() == like.scalar_type(),
                    name, ": wrong shape or dtype");
}

Tensor empty_image(const Tensor& like, int64_t channels) {
    return empty_channels_last({like.size(0), channels, like.size(2), like.size(3)}, like.scalar_type());
}

Tensor nothing(ScalarType dtype) { return empty_row_major({0}, dtype); }

// Both halves take the slopes from their first channel on where the order is second.
void set_parts(StageParams& p, const std::vector<double>& weights, const std::vector<double>& position_weights,
               double drift, bool second) {
    STD_TORCH_CHECK(weights.size() == static_cast<size_t>(p.slopes) &&
                        (!second || position_weights.size() == static_cast<size_t>(p.slopes)),
                    "weights: expected one a slope");
    p.parts = second ? 2 : 1;
    const int64_t channels = second ? p.channels / 2 : p.channels;
    for (int i = 0; i < p.parts; ++i) {
        Part& part = p.part[i];
        part.first = i * channels;
        part.channels = channels;
        const bool position = second && i == 0;
        part.drift = position ? static_cast<float>(drift) : 0.f;
        for (size_t j = 0; j < weights.size(); ++j)
            part.weight[j] = static_cast<float>(position ? position_weights[j] : weights[j]);
    }
}

std::tuple<Tensor, Tensor, Tensor> stage(const Tensor& state, std::vector<Tensor> slopes, std::vector<double> weights,
                                         std::vector<double> position_weights, double drift, bool second,
                                         const MaybeTensor& film, std::optional<double> plane, double eps,
                                         bool normalise, bool keep) {
    STD_TORCH_CHECK(state.dim() == 4 && (!second || state.size(1) % 2 == 0), "state: expected images [N, C, H, W]");
    STD_TORCH_CHECK(slopes.size() <= kMostSlopes, "slopes: too many");
    StageParams p{};
    p.dtype = kernel_dtype(state.scalar_type());
    p.batch = state.size(0), p.channels = state.size(1), p.pixels = state.size(2) * state.size(3);
    p.slopes = static_cast<int>(slopes.size());
    p.slope_channels = second ? p.channels / 2 : p.channels;
    const Tensor x = dense_rows(state);
    p.state = x.data_ptr();
    for (size_t i = 0; i < slopes.size(); ++i) {
        check_image("slopes", slopes[i], state, p.slope_channels);
        slopes[i] = dense_rows(slopes[i]);
        p.slope[i] = slopes[i].data_ptr();
    }
    set_parts(p, weights, position_weights, drift, second);
    const MaybeTensor f = dense(film);
    check_numel(f, ScalarType::Float, 2 * p.batch * p.channels, "film");
    p.film = pointer<float>(f);
    p.eps = eps;
    p.has_plane = plane.has_value();
    p.plane = static_cast<float>(plane.value_or(0.0));
    Tensor point = keep ? empty_image(state, p.channels) : nothing(state.scalar_type());
    Tensor output = normalise ? empty_image(state, p.channels + p.has_plane) : nothing(state.scalar_type());
    Tensor moments = empty_row_major(normalise ? std::vector<int64_t>{p.batch, 2, p.channels} : std::vector<int64_t>{0},
                                     ScalarType::Float);
    p.point = keep ? point.data_ptr() : nullptr;
    p.output = normalise ? output.data_ptr() : nullptr;
    p.moments = static_cast<float*>(moments.data_ptr());
    const auto run = [p] {
        STD_TORCH_CHECK(ode_stage::run(active_isa(), p), "out of memory for the partial sums of ode_stage");
    };
    if (state.numel() > 0 && (normalise || keep)) {
        const auto slope = [&](size_t i) { return i < slopes.size() ? MaybeTensor(slopes[i]) : std::nullopt; };
        run_and_record(run, x, slope(0), slope(1), slope(2), slope(3), f, point, output, moments);
    }
    return {output, point, moments};
}

std::tuple<Tensor, Tensor> stage_backward(const Tensor& grad, const Tensor& point, const Tensor& moments,
                                          const MaybeTensor& film, const MaybeTensor& beside, bool need_film) {
    STD_TORCH_CHECK(point.dim() == 4 && grad.dim() == 4, "point: expected images [N, C, H, W]");
    GradParams p{};
    p.dtype = kernel_dtype(point.scalar_type());
    p.batch = point.size(0), p.channels = point.size(1), p.pixels = point.size(2) * point.size(3);
    p.grad_channels = grad.size(1);
    STD_TORCH_CHECK(p.grad_channels == p.channels || p.grad_channels == p.channels + 1, "grad: wrong channels");
    check_image("grad", grad, point, p.grad_channels);
    const Tensor g = dense_rows(grad), x = dense_rows(point), m = dense(moments);
    STD_TORCH_CHECK(m.scalar_type() == ScalarType::Float && m.numel() == 2 * p.batch * p.channels,
                    "moments: wrong dtype or length");
    const MaybeTensor f = dense(film);
    check_numel(f, ScalarType::Float, 2 * p.batch * p.channels, "film");
    MaybeTensor b;
    if (beside) {
        check_image("beside", *beside, point, p.channels);
        b = dense_rows(*beside);
        p.beside = b->data_ptr();
    }
    Tensor grad_point = empty_image(point, p.channels);
    Tensor grad_film = empty_row_major(
        need_film ? std::vector<int64_t>{p.batch, 2 * p.channels} : std::vector<int64_t>{0}, ScalarType::Float);
    p.grad = g.data_ptr(), p.point = x.data_ptr();
    p.moments = static_cast<const float*>(m.data_ptr());
    p.film = pointer<float>(f);
    p.grad_point = grad_point.data_ptr();
    p.grad_film = need_film ? static_cast<float*>(grad_film.data_ptr()) : nullptr;
    refuse_recording("gradients of ode_stage are not recorded");
    if (point.numel() > 0)
        STD_TORCH_CHECK(ode_stage::run(active_isa(), p), "out of memory for the partial sums of ode_stage");
    return {grad_point, grad_film};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pydenoise, m) {
    m.def(
        "ode_stage_cpu(Tensor state, Tensor[] slopes, float[] weights, float[] position_weights, float drift, "
        "bool second, Tensor? film, float? plane, float eps, bool normalise, bool keep) -> (Tensor, Tensor, Tensor)");
    m.def(
        "ode_stage_backward_cpu(Tensor grad, Tensor point, Tensor moments, Tensor? film, Tensor? beside, "
        "bool need_film) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pydenoise, CPU, m) {
    m.impl("ode_stage_cpu", TORCH_BOX(&stage));
    m.impl("ode_stage_backward_cpu", TORCH_BOX(&stage_backward));
}

}  // namespace bindings
}  // namespace pdn
