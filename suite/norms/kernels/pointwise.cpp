// y = weight * f(alpha * x + shift) + bias and its backward on x seen as [outer, C, inner].
//
// A row is one index of outer, C * inner numbers. Rows are cut into panels of whole channels that
// are at most PANEL numbers wide (one wider channel is taken in pieces); a panel's parameters and
// its sums lie in the L1 cache, spread to one per number, while the rows of a chunk stream by, so
// that each tensor is read once. The cut into panels and chunks is a function of the shape alone
// and sums of chunks are added in order: the bits do not depend on the number of threads.
#include <algorithm>
#include <cstddef>
#include <numeric>

#include "functions.h"

namespace dyt {
namespace {

constexpr int64_t PANEL = 1024;      // numbers
constexpr int64_t SPACE = PANEL + 112;
constexpr int64_t FLUSH = 128;       // rows summed in float32 before they are added in float64
constexpr int64_t SERIAL = 1 << 15;  // numbers below which a second thread costs more than it gives

struct Shape {
    int64_t outer, channels, inner;

    int64_t row() const { return channels * inner; }
    int64_t panel_channels() const {
        const int64_t most = std::max<int64_t>(1, PANEL / inner);
        const int64_t panels = (channels + most - 1) / most;
        const int64_t even = (channels + panels - 1) / panels;
        return std::min(most, (even + 15) / 16 * 16);
    }
    int64_t panels() const { return (channels + panel_channels() - 1) / panel_channels(); }
    int64_t chunk() const {  // rows: 32 chunks, but each with some work and rounding under control
        const int64_t least = std::max<int64_t>(FLUSH, 16384 / (panel_channels() * inner));
        return std::max(least, std::min<int64_t>((outer + 31) / 32, 512));
    }
    int64_t chunks() const { return (outer + chunk() - 1) / chunk(); }
};

struct Parameter {  // values: null, one number, or one per channel
    const float* values;
    int64_t count;

    float at(int64_t channel, float absent) const {
        return values == nullptr ? absent : values[count == 1 ? 0 : channel];
    }
};

struct Parameters {
    Parameter alpha, shift, weight, bias;
};

// What backward sums per channel, in the order of its results.
enum Sum { ALPHA, SHIFT, WEIGHT, BIAS, SUMS };

struct Panel {
    // not PANEL apart: arrays a multiple of 4096 bytes apart crowd the same sets of the L1 cache
    alignas(64) float alpha[SPACE], shift[SPACE], weight[SPACE], bias[SPACE];
    alignas(64) float sums[SUMS][SPACE];
    int64_t first, channels, width;  // width: numbers that are held, a piece of a wide channel

    void fill(const Shape& shape, const Parameters& p, int64_t index) {
        first = index * shape.panel_channels();
        channels = std::min(shape.panel_channels(), shape.channels - first);
        width = std::min(channels * shape.inner, PANEL);
        const int64_t repeat = std::min(shape.inner, PANEL);
        for (int64_t c = 0; c < channels; ++c) {
            const int64_t from = c * repeat;
            std::fill_n(alpha + from, repeat, p.alpha.at(first + c, 1.0f));
            std::fill_n(shift + from, repeat, p.shift.at(first + c, 0.0f));
            std::fill_n(weight + from, repeat, p.weight.at(first + c, 1.0f));
            std::fill_n(bias + from, repeat, p.bias.at(first + c, 0.0f));
        }
    }

    void clear() {
        for (auto& sum : sums) std::fill_n(sum, width, 0.0f);
    }

    // Add the sums to totals [SUMS][C], which start at the panel's first channel, and start again.
    void flush(double* totals, const Shape& shape) {
        const int64_t repeat = std::min(shape.inner, PANEL);
        for (int which = 0; which < SUMS; ++which) {
            double* __restrict total = totals + which * shape.channels;
            const float* __restrict sum = sums[which];
            if (repeat == 1) {
                for (int64_t c = 0; c < channels; ++c) total[c] += sum[c];
                continue;
            }
            for (int64_t c = 0; c < channels; ++c)
                total[c] = std::accumulate(sum + c * repeat, sum + (c + 1) * repeat, total[c]);
        }
        clear();
    }
};

// What a norm has, from the usual to all that there may be: one alpha and no shift, one of each, or
// alpha and shift of every channel and, in a backward, a gradient that arrives at h. What is absent
// costs no loads and no sums.
enum Mode { PLAIN, SHIFTED, FULL, MODES };

inline Mode mode_of(const Parameters& p) {
    if (p.alpha.count > 1 || p.shift.count > 1) return FULL;
    return p.shift.values != nullptr ? SHIFTED : PLAIN;
}

template <class T>
void add_run(const T* __restrict x, const T* __restrict other, T* __restrict sum, int64_t n) {
    for (int64_t i = 0; i < n; ++i) sum[i] = store<T>(load(x[i]) + load(other[i]));
}

template <class F, class T, Mode MODE>
void forward_run(const T* __restrict x, float* __restrict y, const Panel& p, int64_t n,
                 float constant) {
    const float alpha = p.alpha[0], shift = MODE == PLAIN ? 0.0f : p.shift[0];
    for (int64_t i = 0; i < n; ++i) {
        const float u = MODE == FULL ? p.alpha[i] * load(x[i]) + p.shift[i]
                                     : alpha * load(x[i]) + shift;
        y[i] = p.weight[i] * F::at(u, constant).f + p.bias[i];
    }
}

template <class F, class T, Mode MODE>
void backward_run(const T* __restrict dy, const T* __restrict dh, const T* __restrict h,
                  float* __restrict dx, Panel& p, int64_t n, float constant) {
    const float one_alpha = p.alpha[0], one_shift = MODE == PLAIN ? 0.0f : p.shift[0];
    for (int64_t i = 0; i < n; ++i) {
        const float alpha = MODE == FULL ? p.alpha[i] : one_alpha;
        const float shift = MODE == FULL ? p.shift[i] : one_shift;
        const float x = load(h[i]), grad = load(dy[i]);
        const Value value = F::at(alpha * x + shift, constant);
        const float inner = grad * p.weight[i] * value.slope;
        dx[i] = inner * alpha + (MODE == FULL ? load(dh[i]) : 0.0f);
        p.sums[ALPHA][i] += inner * x;
        if (MODE != PLAIN) p.sums[SHIFT][i] += inner;
        p.sums[WEIGHT][i] += grad * value.f;
        p.sums[BIAS][i] += grad;
    }
}

// The code for one function: loops that read T and give float32. Null where there is none for T.
template <class T>
struct Loops {
    void (*forward[MODES])(const T*, float*, const Panel&, int64_t, float) = {};
    void (*backward[MODES])(const T*, const T*, const T*, float*, Panel&, int64_t, float) = {};
};

template <class F, class T = float>
constexpr Loops<T> loops_of() {
    return {{forward_run<F, T, FULL>, forward_run<F, T, FULL>, forward_run<F, T, FULL>},
            {backward_run<F, T, FULL>, backward_run<F, T, FULL>, backward_run<F, T, FULL>}};
}

template <class F, class T = float>
constexpr Loops<T> fast_loops_of() {
    return {{forward_run<F, T, PLAIN>, forward_run<F, T, SHIFTED>, forward_run<F, T, FULL>},
            {backward_run<F, T, PLAIN>, backward_run<F, T, SHIFTED>, backward_run<F, T, FULL>}};
}

// In the order of cpp.py's FUNCTIONS.
const Loops<float> FLOAT_LOOPS[] = {
    fast_loops_of<Tanh>(),   fast_loops_of<Erf>(), loops_of<Isru>(),        loops_of<Arctan>(),
    loops_of<Satursin>(),    loops_of<Softsign>(), loops_of<Hardtanh>(),    loops_of<LogsignClip>(),
    loops_of<ArcsinhClip>(), loops_of<Expsign>(),  loops_of<Exproot>(),     loops_of<Relsign>(),
    loops_of<Saturlog>(),    loops_of<Cubsign>(),  loops_of<LogquadClip>(), loops_of<Power23Clip>(),
    loops_of<Dyisru>(),      loops_of<Sigmoid>(),
};

// Loops that convert on the way are made for the two functions that matter most; they would double
// the time to compile. All others convert to float32 in the L1 cache and back.
template <class T>
Loops<T> direct_loops(int) {
    return {};
}

template <>
Loops<float> direct_loops(int function) {
    return FLOAT_LOOPS[function];
}

template <>
Loops<bfloat16> direct_loops(int function) {
    if (function == 0) return fast_loops_of<Tanh, bfloat16>();
    if (function == 1) return fast_loops_of<Erf, bfloat16>();
    return {};
}

// Where results of type T are put in float32 first: in their own place if that is what they are.
template <class T>
float* place(T*, float* aside) {
    return aside;
}

template <>
float* place(float* x, float*) {
    return x;
}

template <class T>
void forward_any(const Loops<T>& direct, const Loops<float>& loops, const T* x, T* y,
                 const Panel& panel, int64_t n, float constant, Mode mode) {
    alignas(64) float wide[SPACE], aside[SPACE];
    float* found = place(y, aside);
    if (direct.forward[mode] != nullptr) {
        direct.forward[mode](x, found, panel, n, constant);
    } else {
        widen(x, wide, n);
        loops.forward[FULL](wide, found, panel, n, constant);
    }
    narrow(found, y, n);
}

template <class T>
const T ZEROS[PANEL] = {};

// dh may be null.
template <class T>
void backward_any(const Loops<T>& direct, const Loops<float>& loops, const T* dy, const T* dh,
                  const T* h, T* dx, Panel& panel, int64_t n, float constant, Mode mode) {
    alignas(64) float wide[3][SPACE], aside[SPACE];
    float* found = place(dx, aside);
    const T* extra = dh == nullptr ? ZEROS<T> : dh;
    if (direct.backward[mode] != nullptr) {
        direct.backward[mode](dy, extra, h, found, panel, n, constant);
    } else {
        widen(dy, wide[0], n);
        widen(extra, wide[1], n);
        widen(h, wide[2], n);
        loops.backward[FULL](wide[0], wide[1], wide[2], found, panel, n, constant);
    }
    narrow(found, dx, n);
}

struct Job {
    int function;
    Shape shape;
    Parameters parameters;
    float constant;
    int threads;
};

struct Forward : Job {
    const void *x, *residual;
    void *h, *y;
};

struct Backward : Job {
    const void *dy, *dh, *h;
    void* dx;
    double* totals;  // [chunks][SUMS][C]
};

// run(offset, numbers) over the pieces of a panel in the rows of a chunk.
template <class Run>
void over_rows(const Shape& s, const Panel& panel, int64_t chunk, const Run& run) {
    const int64_t span = panel.channels * s.inner;
    const int64_t last = std::min(s.outer, (chunk + 1) * s.chunk());
    for (int64_t row = chunk * s.chunk(); row < last; ++row) {
        const int64_t start = row * s.row() + panel.first * s.inner;
        for (int64_t from = 0; from < span; from += PANEL)
            run(start + from, std::min(PANEL, span - from));
    }
}

template <class T>
void forward(const Forward& job) {
    const Shape& s = job.shape;
    const int64_t panels = s.panels(), items = panels * s.chunks();
    const Loops<T> direct = direct_loops<T>(job.function);
    const Loops<float>& loops = FLOAT_LOOPS[job.function];
    const Mode mode = mode_of(job.parameters);
    const T *x = static_cast<const T*>(job.x), *residual = static_cast<const T*>(job.residual);
    T *h = static_cast<T*>(job.h), *y = static_cast<T*>(job.y);
#pragma omp parallel for schedule(static) num_threads(job.threads) if (job.threads > 1)
    for (int64_t item = 0; item < items; ++item) {
        Panel panel;
        panel.fill(s, job.parameters, item % panels);
        over_rows(s, panel, item / panels, [&](int64_t at, int64_t n) {
            if (residual != nullptr) add_run(x + at, residual + at, h + at, n);
            const T* from = residual != nullptr ? h : x;
            forward_any(direct, loops, from + at, y + at, panel, n, job.constant, mode);
        });
    }
}

template <class T>
void backward(const Backward& job) {
    const Shape& s = job.shape;
    const int64_t panels = s.panels(), items = panels * s.chunks();
    const Loops<T> direct = direct_loops<T>(job.function);
    const Loops<float>& loops = FLOAT_LOOPS[job.function];
    const T *dy = static_cast<const T*>(job.dy), *dh = static_cast<const T*>(job.dh);
    const T* h = static_cast<const T*>(job.h);
    T* dx = static_cast<T*>(job.dx);
    const Mode mode = dh != nullptr ? FULL : mode_of(job.parameters);
#pragma omp parallel for schedule(static) num_threads(job.threads) if (job.threads > 1)
    for (int64_t item = 0; item < items; ++item) {
        Panel panel;
        panel.fill(s, job.parameters, item % panels);
        panel.clear();
        double* totals = job.totals + item / panels * SUMS * s.channels + panel.first;
        for (int which = 0; which < SUMS; ++which)
            std::fill_n(totals + which * s.channels, panel.channels, 0.0);
        int64_t runs = 0;
        over_rows(s, panel, item / panels, [&](int64_t at, int64_t n) {
            const T* extra = dh == nullptr ? nullptr : dh + at;
            backward_any(direct, loops, dy + at, extra, h + at, dx + at, panel, n, job.constant,
                         mode);
            if (++runs % FLUSH == 0) panel.flush(totals, s);
        });
        if (runs % FLUSH != 0) panel.flush(totals, s);
    }
}

// Add the sums of all chunks, in order, into those of the first.
void reduce(const Shape& s, double* totals) {
    const int64_t width = SUMS * s.channels;
    for (int64_t chunk = 1; chunk < s.chunks(); ++chunk) {
        const double* __restrict more = totals + chunk * width;
        for (int64_t i = 0; i < width; ++i) totals[i] += more[i];
    }
}

// One parameter's gradient: a number per channel, or their sum.
void deliver(const double* totals, int64_t channels, float* result, int64_t count) {
    if (result == nullptr) return;
    if (count == 1)
        result[0] = float(std::accumulate(totals, totals + channels, 0.0));
    else
        for (int64_t c = 0; c < channels; ++c) result[c] = float(totals[c]);
}

Job job_of(int function, const Shape& s, const float* const* values, const int64_t* counts,
           int threads) {
    const auto one = [&](int i) { return Parameter{values[i], counts[i]}; };
    const int useful = s.outer * s.row() < SERIAL ? 1 : threads;
    return {function, s, {one(0), one(1), one(2), one(3)}, 1.0f / float(s.channels), useful};
}

}  // namespace
}  // namespace dyt

// Parameters and their gradients come in the order alpha, shift, weight, bias; null is absent.
extern "C" {

// Numbers of float64 that pointwise_backward needs to work in.
int64_t pointwise_room(int64_t outer, int64_t channels, int64_t inner) {
    return dyt::Shape{outer, channels, inner}.chunks() * dyt::SUMS * channels;
}

void pointwise_forward(int function, int dtype, int64_t outer, int64_t channels, int64_t inner,
                       const void* x, const void* residual, void* h, void* y,
                       const float* const* values, const int64_t* counts, int threads) {
    const dyt::Forward job{dyt::job_of(function, {outer, channels, inner}, values, counts, threads),
                           x, residual, h, y};
    if (dtype == 0) dyt::forward<float>(job);
    if (dtype == 1) dyt::forward<dyt::bfloat16>(job);
    if (dtype == 2) dyt::forward<dyt::half>(job);
}

void pointwise_backward(int function, int dtype, int64_t outer, int64_t channels, int64_t inner,
                        const void* dy, const void* dh, const void* h, void* dx, double* room,
                        const float* const* values, const int64_t* counts, float* const* gradients,
                        int threads) {
    const dyt::Backward job{dyt::job_of(function, {outer, channels, inner}, values, counts, threads),
                            dy, dh, h, dx, room};
    if (dtype == 0) dyt::backward<float>(job);
    if (dtype == 1) dyt::backward<dyt::bfloat16>(job);
    if (dtype == 2) dyt::backward<dyt::half>(job);
    dyt::reduce(job.shape, room);
    for (int which = 0; which < dyt::SUMS; ++which)
        dyt::deliver(room + which * channels, channels, gradients[which], counts[which]);
}

}
