// The gradient of the normalisation: two sums per image and channel, then the gradient of the point. With x the
// normalised point, g the gradient of the output and a bar for the mean over an image's pixels, it is
// (1 + scale) / deviation * (g - bar(g) - x bar(g x)); the gradients of scale and shift are the sums of g x and g.
// Included once per ISA level.
#pragma once

#include "rows.inl"

namespace pdn {
namespace ode_stage {
namespace {

// Per channel of a chunk: the sums of g and of g x. `grad_sums` is given room for three arrays, as the stage needs.
template <class T>
void sums_typed(const GradParams& p, int64_t image, Span span, float* partial) {
    const int64_t size = channel_array(p.channels);
    const T* grad = static_cast<const T*>(p.grad) + image * p.pixels * p.grad_channels;
    const T* point = static_cast<const T*>(p.point) + image * p.pixels * p.channels;
    const float *mean = p.moments + image * 2 * p.channels, *inverse = mean + p.channels;
    for (int64_t begin = span.begin; begin < span.end; begin += kBlock) {
        const int64_t end = begin + kBlock < span.end ? begin + kBlock : span.end;
        vectors_once(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
            const vf center = load_lanes(mean + c, lanes), scale = load_lanes(inverse + c, lanes);
            vf sum{}, product{};
            for (int64_t pixel = begin; pixel < end; ++pixel) {
                const vf g = load_lanes(grad + pixel * p.grad_channels + c, lanes);
                sum += g;
                product += g * ((load_lanes(point + pixel * p.channels + c, lanes) - center) * scale);
            }
            store_lanes(partial + c, load_lanes(partial + c, lanes) + sum, lanes);
            store_lanes(partial + size + c, load_lanes(partial + size + c, lanes) + product, lanes);
        });
    }
}

void grad_sums(const GradParams& p, int64_t image, int64_t chunk, float* partial) {
    const Span span = span_of(p.pixels, p.channels, chunk);
    std::memset(partial, 0, static_cast<size_t>(2 * channel_array(p.channels)) * sizeof(float));
    switch (p.dtype) {
        case DType::float32:
            return sums_typed<float>(p, image, span, partial);
        case DType::bfloat16:
            return sums_typed<bf16>(p, image, span, partial);
        case DType::float16:
            return sums_typed<fp16>(p, image, span, partial);
    }
}

// The two sums over the whole image, divided by the pixels, and the gain: three arrays over the channels.
void grad_fold(const GradParams& p, int64_t image, const float* partials, float* coefficients) {
    const int64_t size = channel_array(p.channels), step = 3 * size;
    const int64_t chunk = chunk_pixels(p.pixels, p.channels), chunks = (p.pixels + chunk - 1) / chunk;
    const float* inverse = p.moments + (2 * image + 1) * p.channels;
    const double share = 1.0 / static_cast<double>(p.pixels);
    for (int64_t c = 0; c < p.channels; ++c) {
        double sum = 0, product = 0;
        for (int64_t i = 0; i < chunks; ++i) {
            sum += static_cast<double>(partials[i * step + c]);
            product += static_cast<double>(partials[i * step + size + c]);
        }
        coefficients[c] = static_cast<float>(sum * share);
        coefficients[size + c] = static_cast<float>(product * share);
        coefficients[2 * size + c] = inverse[c] * (p.film ? 1.f + p.film[image * 2 * p.channels + c] : 1.f);
        if (p.grad_film) {
            p.grad_film[image * 2 * p.channels + c] = static_cast<float>(product);
            p.grad_film[(2 * image + 1) * p.channels + c] = static_cast<float>(sum);
        }
    }
}

template <class T>
void write_typed(const GradParams& p, int64_t image, Span span, const float* coefficients) {
    const int64_t size = channel_array(p.channels), before = image * p.pixels;
    const float *mean = p.moments + image * 2 * p.channels, *inverse = mean + p.channels;
    for (int64_t pixel = before + span.begin; pixel < before + span.end; ++pixel) {
        const T* grad = static_cast<const T*>(p.grad) + pixel * p.grad_channels;
        const T* point = static_cast<const T*>(p.point) + pixel * p.channels;
        const T* beside = p.beside ? static_cast<const T*>(p.beside) + pixel * p.channels : nullptr;
        T* out = static_cast<T*>(p.grad_point) + pixel * p.channels;
        vectors_once(p.channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
            const vf x = (load_lanes(point + c, lanes) - load_lanes(mean + c, lanes)) * load_lanes(inverse + c, lanes);
            vf g = load_lanes(grad + c, lanes) - load_lanes(coefficients + c, lanes);
            g -= x * load_lanes(coefficients + size + c, lanes);
            g *= load_lanes(coefficients + 2 * size + c, lanes);
            if (beside) g += load_lanes(beside + c, lanes);
            store_lanes(out + c, g, lanes);
        });
    }
}

void grad_write(const GradParams& p, int64_t image, int64_t chunk, const float* coefficients) {
    const Span span = span_of(p.pixels, p.channels, chunk);
    switch (p.dtype) {
        case DType::float32:
            return write_typed<float>(p, image, span, coefficients);
        case DType::bfloat16:
            return write_typed<bf16>(p, image, span, coefficients);
        case DType::float16:
            return write_typed<fp16>(p, image, span, coefficients);
    }
}

}  // namespace
}  // namespace ode_stage
}  // namespace pdn
