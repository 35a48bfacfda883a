// What stands between the matrix products of a Llama-shaped layer while decoding, each in one pass over its numbers.
//
// A decoding step has few rows, so PyTorch's operators spend it on starting, on passing intermediate results through
// memory, and, in attention, on matrices too small for any library to be fast. Numbers are float or bfloat16 in memory
// and float in registers. rollout/compiled.py compiles this file, tries it against PyTorch, and says what each argument
// is.

#include "slots.h"

namespace {

// RMS norm of rows of `width` numbers; rounds before the weight, as transformers does.
template <class T>
void norm(const T *x, const T *weight, T *out, int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *from = x + row * width;
        T *to = out + row * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) sum += get(from[i]) * get(from[i]);
        float scale = 1.0f / std::sqrt(sum / float(width) + eps);
#pragma omp simd
        for (int64_t i = 0; i < width; i++) put(to[i], rounded<T>(get(from[i]) * scale) * get(weight[i]));
    }
}

// Rotary embedding in place of the first `heads` (queries, also scaled) and the next `key_heads` heads of each row.
template <class T>
void turn(T *qkv, const T *cos, const T *sin, const int64_t *position, int64_t rows, int64_t heads, int64_t key_heads,
          int64_t width, float scale, int threads) {
    int64_t half = width / 2, line = (heads + 2 * key_heads) * width;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *c = cos + position[row] * width, *s = sin + position[row] * width;
        for (int64_t head = 0; head < heads + key_heads; head++) {
            T *first = qkv + row * line + head * width, *second = first + half;
            float by = head < heads ? scale : 1.0f;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float a = get(first[i]), b = get(second[i]);
                put(first[i], (a * get(c[i]) + b * get(s[i])) * by);
                put(second[i], (b * get(c[half + i]) + a * get(s[half + i])) * by);
            }
        }
    }
}

// silu(gate) * up, the sigmoid of the gate times the gate times up, of rows that hold `width` gates and then as many ups.
template <class T> void gated(const T *both, T *out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = both + 2 * row * width, *up = gate + width;
        T *to = out + row * width;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            vec x = load(gate + i), small = exp_of(x > vec{} ? -x : x);
            store(to + i, (x > vec{} ? x : x * small) / (small + 1.0f) * load(up + i));
        }
        for (; i < width; i++) {
            float x = get(gate[i]);
            put(to[i], x / (1.0f + std::exp(-x)) * get(up[i]));
        }
    }
}

// A vector of the row that ends at `end`, -inf past it.
template <class T> inline vec load_until(const T *from, const T *end) {
    if (end - from >= LANES) return load(from);
    float held[LANES];
    for (int i = 0; i < LANES; i++) held[i] = from + i < end ? get(from[i]) : -INFINITY;
    return load(held);
}

constexpr int64_t PART = 256;  // entries of the vocabulary that are summed together

// One token a row by inverting the distribution function of softmax(logits / temperature); the likeliest at 0.
template <class T>
void draw(const T *logits, const float *uniform, int64_t *token, float *logp, int64_t rows, int64_t vocabulary,
          float temperature, int threads) {
    const int64_t parts = (vocabulary + PART - 1) / PART;
    const float by = temperature > 0 ? 1.0f / temperature : 1.0f;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *from = logits + row * vocabulary, *end = from + vocabulary;
        vec highest = vec{} - INFINITY;
        for (const T *at = from; at < end; at += LANES) {
            vec x = load_until(at, end);
            highest = x > highest ? x : highest;
        }
        float most = largest(highest);

        std::vector<float> mass(parts);
        double sum = 0;
        for (int64_t part = 0; part < parts; part++) {
            const T *stop = from + (part + 1) * PART < end ? from + (part + 1) * PART : end;
            vec each = {};
            for (const T *at = from + part * PART; at < stop; at += LANES)
                each += exp_of((load_until(at, stop) - most) * by);
            mass[part] = total(each);
            sum += mass[part];
        }

        int64_t found = 0;
        if (temperature > 0) {
            // The first entry up to which there is more than the level, or else the last one with any mass.
            double level = double(uniform[row]) * sum;
            int64_t part = 0;
            for (int64_t next = 0; next < parts; next++) {
                if (!(mass[next] > 0)) continue;
                part = next;
                if (mass[next] > level) break;
                level -= mass[next];
            }
            for (int64_t i = part * PART; i < vocabulary && i < (part + 1) * PART; i++) {
                float mass_here = exp_of(vec{} + (get(from[i]) - most) * by)[0];
                if (!(mass_here > 0)) continue;
                found = i;
                if (mass_here > level) break;
                level -= mass_here;
            }
        } else {
            while (found + 1 < vocabulary && !(get(from[found]) >= most)) found++;
        }
        token[row] = found;
        logp[row] = (get(from[found]) - most) * by - float(std::log(sum));
    }
}

}  // namespace

#define ENTRY(NAME, T)                                                                                                \
    extern "C" void norm_##NAME(const T *x, const T *weight, T *out, int64_t rows, int64_t width, float eps,         \
                                int threads) {                                                                        \
        norm(x, weight, out, rows, width, eps, threads);                                                              \
    }                                                                                                                 \
    extern "C" void gated_##NAME(const T *both, T *out, int64_t rows, int64_t width, int threads) {                  \
        gated(both, out, rows, width, threads);                                                                       \
    }                                                                                                                 \
    extern "C" void turn_##NAME(T *qkv, const T *cos, const T *sin, const int64_t *position, int64_t rows,           \
                                int64_t heads, int64_t key_heads, int64_t width, float scale, int threads) {         \
        turn(qkv, cos, sin, position, rows, heads, key_heads, width, scale, threads);                                 \
    }                                                                                                                 \
    extern "C" void attend_##NAME(T *qkv, T *keys, T *values, const T *shared_keys, const T *shared_values,          \
                                  const int64_t *filled, const Shape *shape, float *beside, T *out, int threads) {   \
        attend<T, WIDTH>(qkv, keys, values, shared_keys, shared_values, filled, shape, beside, out, threads);         \
    }                                                                                                                 \
    extern "C" void draw_##NAME(const T *logits, const float *uniform, int64_t *token, float *logp, int64_t rows,    \
                                int64_t vocabulary, float temperature, int threads) {                                \
        draw(logits, uniform, token, logp, rows, vocabulary, temperature, threads);                                   \
    }

ENTRY(float32, float)
ENTRY(bfloat16, bf16)
