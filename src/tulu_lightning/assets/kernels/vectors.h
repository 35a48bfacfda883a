// Numbers in memory (float or bfloat16), and vectors of floats as wide as the machine's registers, without intrinsics.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace {

struct bf16 {
    uint16_t bits;
};

inline float get(float x) { return x; }
inline float get(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}
inline void put(float &to, float x) { to = x; }
inline void put(bf16 &to, float x) {  // to nearest, ties to even; NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
template <class T> inline float rounded(float x) {
    T narrow;
    put(narrow, x);
    return get(narrow);
}

// A vector as wide as the machine's registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 24;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 12;
#else
constexpr int LANES = 4, REGISTERS = 24;
#endif
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));

// The same at any address.
typedef vec loose_vec __attribute__((aligned(4), may_alias));
typedef halves loose_halves __attribute__((aligned(2), may_alias));

inline vec load(const float *from) { return *(const loose_vec *)from; }
inline vec load(const bf16 *from) { return (vec)(__builtin_convertvector(*(const loose_halves *)from, words) << 16); }
inline void store(float *to, vec x) { *(loose_vec *)to = x; }
inline void store(bf16 *to, vec x) {
    words bits = (words)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, none = words{} + 0x7fc0;
    *(loose_halves *)to = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? none : rounded, halves);
}

inline float total(vec x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

inline float largest(vec x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

#ifdef __clang__
template <int... I> inline vec mixed(vec a, vec b) { return __builtin_shufflevector(a, b, I...); }
#else
template <int... I> inline vec mixed(vec a, vec b) { return __builtin_shuffle(a, b, ints{I...}); }
#endif

// Turns a square of LANES vectors over its diagonal, by ever smaller blocks.
template <int H, int... L> inline void swapped(vec &a, vec &b, std::integer_sequence<int, L...>) {
    vec first = mixed<(L & H ? LANES + (L ^ H) : L)...>(a, b);
    b = mixed<(L & H ? LANES + L : L ^ H)...>(a, b);
    a = first;
}
template <int H = LANES / 2> inline void transpose(vec *x) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & H)) swapped<H>(x[i], x[i + H], std::make_integer_sequence<int, LANES>());
    if constexpr (H > 1) transpose<H / 2>(x);
}

// Lanes without bit H: sums of a's lanes that differ in it alone; lanes with it: the same of b.
template <int H, int... L> inline vec halved(vec a, vec b, std::integer_sequence<int, L...>) {
    return mixed<(L & H ? LANES + (L ^ H) : L)...>(a, b) + mixed<(L & H ? LANES + L : L ^ H)...>(a, b);
}

// The totals of four vectors, in the first four lanes.
inline vec totals(vec a, vec b, vec c, vec d) {
    constexpr std::make_integer_sequence<int, LANES> lanes;
    vec sum = halved<2>(halved<1>(a, b, lanes), halved<1>(c, d, lanes), lanes);
    if constexpr (LANES > 4) sum = halved<4>(sum, sum, lanes);
    if constexpr (LANES > 8) sum = halved<8>(sum, sum, lanes);
    return sum;
}

// e^x for x <= 0, within 2 units in the last place from -20 on and 5 before (without fused multiply-add 1e-6 and 4e-6 of it);
// NaN stays. By 2^n e^r with |r| <= ln(2) / 2, as in Cephes' expf.
inline vec exp_of(vec x) {
    const vec least = vec{} - 87.0f;
    vec far = x < least ? least : x;
    ints n = __builtin_convertvector(far * 1.44269504f - 0.5f, ints);
    vec whole = __builtin_convertvector(n, vec);
    vec r = far - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec y = vec{} + 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    y *= (vec)((n + 127) << 23);
    return x < least ? vec{} : y;
}

}  // namespace
