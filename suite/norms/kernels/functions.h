// The functions f of the point-wise norms with their slopes, as branch-free code for vectorisers.
//
// What they mean is suite/norms/functions.py: its clamps, its slopes at 0 and at the clip points.
// Each takes u and gives f(u), and its slope too where that is asked for. tanh, the exponentials
// and erf are accurate relative to their own size from the smallest u to the largest, and so are
// their slopes, which 1 - tanh^2 is not where the function saturates. Polynomials are minimax fits
// made for this file. A comparison with NaN is false, and every choice below lets NaN through.
#pragma once

#include <cfloat>
#include <cmath>

#include "numbers.h"

namespace dyt {

inline float at_most(float a, float limit) { return limit < a ? limit : a; }
inline float size_of(float u) { return from_bits(to_bits(u) & 0x7fffffff); }

// |a| with the sign of u.
inline float signed_as(float a, float u) {
    return from_bits((to_bits(a) & 0x7fffffff) | (to_bits(u) & 0x80000000));
}

// e^(-SCALE a) as power * (1 + rest) with power = 2^k, for SCALE a in [0, 87].
struct Split {
    float power, rest;
};

template <int SCALE>
inline Split split_exponential(float a) {
    constexpr float s = SCALE;
    // adding 1.5 * 2^23 rounds to a whole number; with 127 more its last bits are 2^k's exponent
    constexpr float magic = 12582912.0f + 127.0f;
    const float shifted = a * (-1.44269504f * s) + magic, k = shifted - magic;
    const float r = k * (0.693147181f / s) + a;  // at most ln 2 / 2 / s
    float p = -0.0083727967f * s * s * s * s * s;
    p = p * r + 0.0418746881f * s * s * s * s;
    p = p * r - 0.166664794f * s * s * s;
    p = p * r + 0.499993831f * s * s;
    return {from_bits(to_bits(shifted) << 23), r * (p * r - s)};
}

// e^-a for a >= 0, and 0 where that leaves float32's normal range.
inline float decay(float a) {
    const Split e = split_exponential<1>(at_most(a, 87.0f));
    const float found = e.power * e.rest + e.power;
    return a > 87.0f ? 0.0f : found;
}

// e^-a - 1 for a >= 0.
inline float decay_minus_one(float a) {
    const Split e = split_exponential<1>(at_most(a, 87.0f));
    return e.power * e.rest + (e.power - 1.0f);
}

// ln(1 + a) for a in [0, e - 1].
inline float log1p_small(float a) {
    float p = 0.00034072530f;
    p = p * a - 0.0035324600f;
    p = p * a + 0.016535779f;
    p = p * a - 0.046997584f;
    p = p * a + 0.093306109f;
    p = p * a - 0.14422111f;
    p = p * a + 0.19328833f;
    p = p * a - 0.24880084f;
    p = p * a + 0.33322477f;
    p = p * a - 0.49999654f;
    return p * a * a + a;
}

// ln(1 + a) for any finite a >= 0: the exponent apart, where there is one.
inline float log1p_any(float a) {
    const uint32_t bits = to_bits(1.0f + a);
    const float k = float(int32_t(bits >> 23) - 127);
    const float mantissa = from_bits((bits & 0x007fffff) | 0x3f800000);
    const float found = log1p_small(a < 1.0f ? a : mantissa - 1.0f) + k * 0.693147181f;
    return a != a ? a : found;
}

// a^(-1/3) for a > 0: a guess from the exponent, then Newton's iteration without a division.
inline float inverse_cube_root(float a) {
    const bool tiny = a < 1e-30f;
    const float b = tiny ? a * 0x1p96f : a;
    float r = from_bits(0x54a2fa8c - uint32_t(float(int32_t(to_bits(b))) * 0.333333333f));
    for (int i = 0; i < 4; ++i) r = r * (1.33333333f - 0.333333333f * b * r * r * r);
    return tiny ? r * 0x1p32f : r;
}

struct Value {
    float f, slope;
};

// Each function: at(u, constant) -> f and f'. The compiler drops the slope where it is not used.
// `constant` is 1 / dim for DyISRU and unused elsewhere.

struct Tanh {
    static inline Value at(float u, float) {
        const float a = size_of(u);
        const Split e = split_exponential<2>(at_most(a, 43.0f));
        const float m = e.power * e.rest + (e.power - 1.0f);  // e^-2a - 1
        const float d = 1.0f / (2.0f + m);
        const float slope = 4.0f * (e.power * e.rest + e.power) * (d * d);
        return {signed_as(m * d, u), a > 43.0f ? 0.0f : slope};
    }
};

struct Erf {
    static inline Value at(float u, float) {
        const float a = size_of(u), c = at_most(a, 3.93f), y = c * c;
        float p = 1.9815353e-8f;
        p = p * y - 1.9553511e-6f;
        p = p * y + 0.00014248812f;
        p = p * y + 0.0037365579f;
        p = p * y + 0.050688505f;
        p = p * y + 0.20080097f;
        p = p * y + 1.1283791f;
        float q = 0.00096385088f;
        q = q * y + 0.014426460f;
        q = q * y + 0.11535961f;
        q = q * y + 0.51128685f;
        q = q * y + 1.0f;
        return {signed_as(at_most(c * p / q, 1.0f), u), 1.12837917f * decay(u * u)};
    }
};

struct Isru {
    static inline Value at(float u, float) {
        const float a = size_of(u), v = at_most(a, 1e18f);
        const float r = 1.0f / std::sqrt(1.0f + v * v);
        return {signed_as(v * r, u), r * r * r};
    }
};

struct Arctan {
    static inline Value at(float u, float) {
        const float a = size_of(u), z = a > 1.0f ? 1.0f / a : a, y = z * z;
        float p = 0.0029745856f;
        p = p * y - 0.016581167f;
        p = p * y + 0.043553513f;
        p = p * y - 0.075805761f;
        p = p * y + 0.10678940f;
        p = p * y - 0.14214209f;
        p = p * y + 0.19994137f;
        p = p * y - 0.33333167f;
        const float small = p * y * z + z;
        const float found = a > 1.0f ? 1.57079633f - small : small;
        return {signed_as(0.636619772f * found, u), 0.636619772f / (1.0f + a * a)};
    }
};

struct Satursin {
    static inline Value at(float u, float) {
        const float limit = 1.57079633f, a = size_of(u), v = at_most(a, limit), y = v * v;
        float p = 2.6089322e-6f;
        p = p * y - 0.00019811113f;
        p = p * y + 0.0083330879f;
        p = p * y - 0.16666661f;
        float c = 1.9869186e-9f;
        c = c * y - 2.7522506e-7f;
        c = c * y + 2.4801007e-5f;
        c = c * y - 0.0013888885f;
        c = c * y + 0.041666668f;
        c = c * y * y - 0.5f * y + 1.0f;
        return {signed_as(p * y * v + v, u), a <= limit ? c : 0.0f};
    }
};

struct Softsign {
    static inline Value at(float u, float) {
        const float a = size_of(u), d = 1.0f / (1.0f + a);
        return {signed_as(at_most(a, FLT_MAX) / (1.0f + at_most(a, FLT_MAX)), u), d * d};
    }
};

struct Hardtanh {
    static inline Value at(float u, float) {
        const float a = size_of(u);
        return {signed_as(at_most(a, 1.0f), u), a <= 1.0f ? 1.0f : 0.0f};
    }
};

struct LogsignClip {
    static inline Value at(float u, float) {
        const float limit = 1.71828183f, a = size_of(u), v = at_most(a, limit);
        const float slope = 1.0f / (1.0f + v);
        return {signed_as(log1p_small(v), u), a <= limit ? slope : 0.0f};
    }
};

struct ArcsinhClip {
    static inline Value at(float u, float) {
        const float limit = 1.17520119f, a = size_of(u), v = at_most(a, limit), y = v * v;
        float p = 0.00031087571f;
        p = p * y - 0.0022871166f;
        p = p * y + 0.0077404091f;
        p = p * y - 0.016761163f;
        p = p * y + 0.028259616f;
        p = p * y - 0.044172309f;
        p = p * y + 0.074947916f;
        p = p * y - 0.16666466f;
        const float slope = 1.0f / std::sqrt(1.0f + y);
        return {signed_as(p * y * v + v, u), a <= limit ? slope : 0.0f};
    }
};

struct Expsign {
    static inline Value at(float u, float) {
        const float a = size_of(u);
        return {signed_as(decay_minus_one(a), u), decay(a)};
    }
};

struct Exproot {
    static inline Value at(float u, float) {
        const float root = std::sqrt(size_of(u)), slope = decay(root) / (2.0f * root);
        return {signed_as(decay_minus_one(root), u), root == 0.0f ? 0.0f : slope};
    }
};

struct Relsign {
    static inline Value at(float u, float) {
        const float v = at_most(size_of(u), 1e18f), q = std::sqrt(1.0f + v * v);
        const float d = 1.0f / (1.0f + q);
        return {signed_as(v * d, u), d / q};
    }
};

struct Saturlog {
    static inline Value at(float u, float) {
        const float a = size_of(u), log = log1p_any(at_most(a, FLT_MAX));
        const float d = 1.0f / (1.0f + log), found = a > FLT_MAX ? 1.0f : log * d;
        return {signed_as(found, u), d * d / (1.0f + a)};
    }
};

struct Cubsign {
    static inline Value at(float u, float) {
        const float v = at_most(size_of(u), 1e10f), square = v * v, cube = square * v;
        const float d = 1.0f / (1.0f + cube);
        return {signed_as(cube * d, u), 3.0f * square * d * d};
    }
};

struct LogquadClip {
    static inline Value at(float u, float) {
        const float limit = 1.31083250f, a = size_of(u), v = at_most(a, limit), y = v * v;
        const float slope = 2.0f * v / (1.0f + y);
        return {signed_as(log1p_small(y), u), a <= limit ? slope : 0.0f};
    }
};

struct Power23Clip {
    static inline Value at(float u, float) {
        const float a = size_of(u), v = at_most(a, 1.0f), r = inverse_cube_root(v);
        const bool inside = a > 0.0f && a <= 1.0f;
        return {signed_as(a == 0.0f ? 0.0f : v * r, u), inside ? 0.666666667f * r : 0.0f};
    }
};

struct Dyisru {
    static inline Value at(float u, float constant) {
        const float v = at_most(size_of(u), 1e18f), r = 1.0f / std::sqrt(1.0f + v * v * constant);
        return {signed_as(v * r, u), r * r * r};
    }
};

struct Sigmoid {
    static inline Value at(float u, float) {
        const float a = size_of(u), e = decay(a), d = 1.0f / (1.0f + e), other = e * d;
        return {u < 0.0f ? other : d, other * d};
    }
};

}  // namespace dyt
