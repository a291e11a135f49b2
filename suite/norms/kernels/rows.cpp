// LayerNorm and RMSNorm over the last dimension of x [rows, C], with their backward.
//
// A row's statistics are taken in float32 from the row in the cache, the variance from differences
// to the mean. Rows are cut into chunks by the shape alone and the chunks' sums for weight and bias
// are added in order: the bits do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>

#include "numbers.h"

namespace dyt {
namespace {

constexpr int64_t FLUSH = 64;        // rows summed in float32 before they are added in float64
constexpr int64_t SERIAL = 1 << 15;  // numbers below which a second thread costs more than it gives
constexpr int64_t LANES = 32;        // independent partial sums of a row, added in order

int64_t chunk_of(int64_t rows, int64_t channels) {
    const int64_t least = std::max<int64_t>(FLUSH, 16384 / channels);
    return std::max(least, std::min<int64_t>((rows + 31) / 32, 512));
}

// The sum of term(0) ... term(n - 1), in one fixed order that a vectoriser can use.
template <class Term>
inline float sum_of(int64_t n, const Term& term) {
    float lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int64_t k = 0; k < LANES; ++k) lanes[k] += term(i + k);
    for (int64_t k = 0; i + k < n; ++k) lanes[k] += term(i + k);
    for (int64_t width = LANES / 2; width > 0; width /= 2)
        for (int64_t k = 0; k < width; ++k) lanes[k] += lanes[k + width];
    return lanes[0];
}

struct Forward {
    int64_t rows, channels;
    const void *x, *residual;
    void *h, *y;
    float *mean, *rstd;  // mean is null for RMSNorm
    const float *weight, *bias;
    float eps;
    int threads;
};

struct Backward {
    int64_t rows, channels;
    const void *dy, *dh, *h;
    void* dx;
    const float *mean, *rstd, *weight;
    double* totals;  // [chunks][weight, bias][C]
    int threads;
};

template <class T>
void forward_row(const Forward& job, int64_t row, float* __restrict v, const float* __restrict weight,
                 const float* __restrict bias) {
    const int64_t n = job.channels;
    const T* __restrict x = static_cast<const T*>(job.x) + row * n;
    if (job.residual != nullptr) {
        const T* __restrict other = static_cast<const T*>(job.residual) + row * n;
        T* __restrict h = static_cast<T*>(job.h) + row * n;
        for (int64_t i = 0; i < n; ++i) {
            h[i] = store<T>(load(x[i]) + load(other[i]));
            v[i] = load(h[i]);
        }
    } else {
        for (int64_t i = 0; i < n; ++i) v[i] = load(x[i]);
    }
    float mean = 0;
    if (job.mean != nullptr) mean = sum_of(n, [v](int64_t i) { return v[i]; }) / float(n);
    const auto squared = [v, mean](int64_t i) { return (v[i] - mean) * (v[i] - mean); };
    const float rstd = 1.0f / std::sqrt(sum_of(n, squared) / float(n) + job.eps);
    T* __restrict y = static_cast<T*>(job.y) + row * n;
    for (int64_t i = 0; i < n; ++i) y[i] = store<T>((v[i] - mean) * rstd * weight[i] + bias[i]);
    if (job.mean != nullptr) job.mean[row] = mean;
    job.rstd[row] = rstd;
}

template <class T>
void backward_row(const Backward& job, int64_t row, float* __restrict hat, float* __restrict scaled,
                  const float* __restrict weight, float* __restrict dweight,
                  float* __restrict dbias) {
    const int64_t n = job.channels;
    const T* __restrict dy = static_cast<const T*>(job.dy) + row * n;
    const T* __restrict h = static_cast<const T*>(job.h) + row * n;
    T* __restrict dx = static_cast<T*>(job.dx) + row * n;
    const float mean = job.mean == nullptr ? 0.0f : job.mean[row], rstd = job.rstd[row];
    for (int64_t i = 0; i < n; ++i) {
        const float grad = load(dy[i]), value = (load(h[i]) - mean) * rstd;
        hat[i] = value;
        scaled[i] = grad * weight[i];
        dweight[i] += grad * value;
        dbias[i] += grad;
    }
    const auto product = [hat, scaled](int64_t i) { return hat[i] * scaled[i]; };
    const float along = sum_of(n, product) / float(n);
    float level = 0;
    if (job.mean != nullptr) level = sum_of(n, [scaled](int64_t i) { return scaled[i]; }) / float(n);
    if (job.dh == nullptr) {
        for (int64_t i = 0; i < n; ++i)
            dx[i] = store<T>((scaled[i] - level - hat[i] * along) * rstd);
        return;
    }
    const T* __restrict dh = static_cast<const T*>(job.dh) + row * n;
    for (int64_t i = 0; i < n; ++i)
        dx[i] = store<T>((scaled[i] - level - hat[i] * along) * rstd + load(dh[i]));
}

std::unique_ptr<float[]> spread(const float* values, int64_t n, float absent) {
    std::unique_ptr<float[]> found(new float[n]);
    for (int64_t i = 0; i < n; ++i) found[i] = values == nullptr ? absent : values[i];
    return found;
}

template <class T>
void forward(const Forward& job) {
    const auto weight = spread(job.weight, job.channels, 1.0f);
    const auto bias = spread(job.bias, job.channels, 0.0f);
#pragma omp parallel num_threads(job.threads) if (job.threads > 1)
    {
        const std::unique_ptr<float[]> v(new float[job.channels]);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < job.rows; ++row)
            forward_row<T>(job, row, v.get(), weight.get(), bias.get());
    }
}

template <class T>
void backward(const Backward& job) {
    const int64_t n = job.channels, chunk = chunk_of(job.rows, n);
    const int64_t chunks = (job.rows + chunk - 1) / chunk;
    const auto weight = spread(job.weight, n, 1.0f);
#pragma omp parallel num_threads(job.threads) if (job.threads > 1)
    {
        const std::unique_ptr<float[]> room(new float[4 * n]);
        float *hat = room.get(), *scaled = hat + n, *sums = hat + 2 * n;
#pragma omp for schedule(static)
        for (int64_t k = 0; k < chunks; ++k) {
            double* totals = job.totals + k * 2 * n;
            std::fill_n(totals, 2 * n, 0.0);
            const int64_t last = std::min(job.rows, (k + 1) * chunk);
            for (int64_t start = k * chunk; start < last; start += FLUSH) {
                std::fill_n(sums, 2 * n, 0.0f);
                for (int64_t row = start; row < std::min(last, start + FLUSH); ++row)
                    backward_row<T>(job, row, hat, scaled, weight.get(), sums, sums + n);
                for (int64_t i = 0; i < 2 * n; ++i) totals[i] += sums[i];
            }
        }
    }
}

// Add the sums of all chunks, in order, into those of the first.
void reduce(double* totals, int64_t chunks, int64_t width) {
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        const double* __restrict more = totals + chunk * width;
        for (int64_t i = 0; i < width; ++i) totals[i] += more[i];
    }
}

void deliver(const double* totals, int64_t channels, float* result) {
    if (result == nullptr) return;
    for (int64_t c = 0; c < channels; ++c) result[c] = float(totals[c]);
}

}  // namespace
}  // namespace dyt

extern "C" {

// Numbers of float64 that rows_backward needs to work in.
int64_t rows_room(int64_t rows, int64_t channels) {
    const int64_t chunk = dyt::chunk_of(rows, channels);
    return (rows + chunk - 1) / chunk * 2 * channels;
}

void rows_forward(int dtype, int64_t rows, int64_t channels, const void* x, const void* residual,
                  void* h, void* y, float* mean, float* rstd, const float* weight,
                  const float* bias, float eps, int threads) {
    const int useful = rows * channels < dyt::SERIAL ? 1 : threads;
    const dyt::Forward job{rows, channels, x, residual, h, y, mean, rstd, weight, bias, eps, useful};
    if (dtype == 0) dyt::forward<float>(job);
    if (dtype == 1) dyt::forward<dyt::bfloat16>(job);
    if (dtype == 2) dyt::forward<dyt::half>(job);
}

void rows_backward(int dtype, int64_t rows, int64_t channels, const void* dy, const void* dh,
                   const void* h, void* dx, const float* mean, const float* rstd,
                   const float* weight, double* room, float* dweight, float* dbias, int threads) {
    const int useful = rows * channels < dyt::SERIAL ? 1 : threads;
    const dyt::Backward job{rows, channels, dy, dh, h, dx, mean, rstd, weight, room, useful};
    if (dtype == 0) dyt::backward<float>(job);
    if (dtype == 1) dyt::backward<dyt::bfloat16>(job);
    if (dtype == 2) dyt::backward<dyt::half>(job);
    const int64_t chunk = dyt::chunk_of(rows, channels), chunks = (rows + chunk - 1) / chunk;
    dyt::reduce(room, chunks, 2 * channels);
    dyt::deliver(room, channels, dweight);
    dyt::deliver(room + channels, channels, dbias);
}

}
