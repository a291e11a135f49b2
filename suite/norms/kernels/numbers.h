// Element types of the CPU kernels: float32 is used as it is, bfloat16 and float16 are converted by
// integer arithmetic that every compiler turns into vector code. Rounds to nearest even; NaN stays
// NaN, also where its payload would be rounded away.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace dyt {

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

struct bfloat16 {
    uint16_t bits;
};

struct half {
    uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(bfloat16 value) { return from_bits(uint32_t(value.bits) << 16); }

inline float load(half value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
    const uint32_t shifted = uint32_t(value.bits & 0x7fff) << 13;
    // exponents differ by 112; the multiplication also makes subnormal numbers normal
    const uint32_t finite = to_bits(from_bits(shifted) * from_bits((127 + 112) << 23));
    const uint32_t special = shifted | 0x7f800000;  // infinity and NaN
    return from_bits(sign | (shifted >= (0x7c00u << 13) ? special : finite));
}

template <class T>
inline T store(float value);

template <>
inline float store<float>(float value) {
    return value;
}

template <>
inline bfloat16 store<bfloat16>(float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40;
    return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded)};
}

template <>
inline half store<half>(float value) {
    const uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
    const uint32_t odd = (size >> 13) & 1;
    const uint32_t normal = (size - (112u << 23) + 0xfff + odd) >> 13;
    // 0.5 has the spacing of float16's subnormal numbers, so this addition rounds to them
    const uint32_t subnormal = to_bits(from_bits(size) + 0.5f) - to_bits(0.5f);
    uint32_t found = size < (113u << 23) ? subnormal : normal;
    found = size >= to_bits(65520.0f) ? 0x7c00 : found;  // halfway to the next power of two
    found = size > 0x7f800000 ? 0x7e00 : found;
    return {uint16_t(sign | found)};
}

template <class T>
void widen(const T* __restrict x, float* __restrict wide, int64_t n) {
    for (int64_t i = 0; i < n; ++i) wide[i] = load(x[i]);
}

template <class T>
void narrow(const float* __restrict wide, T* __restrict x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = store<T>(wide[i]);
}

template <>
inline void narrow(const float* __restrict, float* __restrict, int64_t) {}  // in place already

#ifdef __AVX512BF16__
// One instruction in place of eight. It takes numbers below float32's normal range for 0.
template <>
inline void narrow(const float* __restrict wide, bfloat16* __restrict x, int64_t n) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m512 low = _mm512_loadu_ps(wide + i), high = _mm512_loadu_ps(wide + i + 16);
        _mm512_storeu_si512(x + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    for (; i < n; ++i) x[i] = store<bfloat16>(wide[i]);
}
#endif

}  // namespace dyt
