// What stands between the matrix products of a Llama-shaped layer while training, forward and backward, each in one
// pass over its numbers.
//
// Numbers are float or bfloat16 in memory and float in registers. models/compiled.py compiles this file, tries it
// against PyTorch, and says what each argument is. Rows are shared out among threads, and no sum depends on how.

#include "vectors.h"

namespace {

// RMS norm of rows; `inverse` gets each row's factor, which backward wants.
template <class X, class Y>
void norm(const X *x, const float *weight, Y *out, float *inverse, int64_t rows, int64_t width, float eps,
          int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const X *from = x + row * width;
        Y *to = out + row * width;
        vec square = {};
        for (int64_t i = 0; i < width; i += LANES) {
            vec each = load(from + i);
            square += each * each;
        }
        float by = 1.0f / std::sqrt(total(square) / float(width) + eps);
        for (int64_t i = 0; i < width; i += LANES) store(to + i, load(from + i) * by * load(weight + i));
        inverse[row] = by;
    }
}

constexpr int64_t TOGETHER = 32;  // rows whose part of a weight's gradient is added up together

// grad_x, and for every TOGETHER rows their part of the weight's gradient.
template <class X, class Y>
void norm_back(const Y *grad, const X *x, const float *weight, const float *inverse, X *grad_x, float *grad_weight,
               int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < (rows + TOGETHER - 1) / TOGETHER; part++) {
        float *sums = grad_weight + part * width;
        for (int64_t i = 0; i < width; i += LANES) store(sums + i, vec{});
        for (int64_t row = part * TOGETHER; row < rows && row < (part + 1) * TOGETHER; row++) {
            const X *from = x + row * width;
            const Y *up = grad + row * width;
            X *to = grad_x + row * width;
            float by = inverse[row];
            vec along = {};
            for (int64_t i = 0; i < width; i += LANES) {
                vec each = load(up + i) * (load(from + i) * by);
                store(sums + i, load(sums + i) + each);
                along += each * load(weight + i);
            }
            float mean = total(along) / float(width);
            for (int64_t i = 0; i < width; i += LANES)
                store(to + i, (load(up + i) * load(weight + i) - load(from + i) * by * mean) * by);
        }
    }
}

inline vec sigmoid(vec x) {
    vec small = exp_of(x > vec{} ? -x : x);
    return (x > vec{} ? vec{} + 1.0f : small) / (small + 1.0f);
}

// `call` gets where each piece of `count` numbers begins; a piece is a multiple of LANES long.
constexpr int64_t PIECE = 4096;
template <class Call> inline void pieces(int64_t count, int threads, Call call) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < count; at += PIECE)
        for (int64_t i = at; i < count && i < at + PIECE; i += LANES) call(i);
}

// silu(gate) * up.
template <class T> void gated(const T *gate, const T *up, T *out, int64_t count, int threads) {
    pieces(count, threads, [=](int64_t i) {
        vec g = load(gate + i);
        store(out + i, g * sigmoid(g) * load(up + i));
    });
}

// silu(gate) * up again, and from the gradient of that, which is overwritten, those of the gate and of up.
template <class T>
void gated_back(const T *gate, const T *up, T *grad, T *inner, T *grad_up, int64_t count, int threads) {
    pieces(count, threads, [=](int64_t i) {
        vec g = load(gate + i), u = load(up + i), down = load(grad + i), s = sigmoid(g), silu = g * s;
        store(inner + i, silu * u);
        store(grad_up + i, silu * down);
        store(grad + i, down * u * s * (g * (1.0f - s) + 1.0f));
    });
}

// Rotary embedding of `heads` heads a token, or its transpose; cos and sin are [tokens, width].
template <class T>
void turn(const T *x, const float *cos, const float *sin, T *out, int64_t tokens, int64_t heads, int64_t width,
          int64_t x_token, int64_t x_head, int64_t out_token, int64_t out_head, int back, int threads) {
    const int64_t half = width / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t token = 0; token < tokens; token++) {
        const float *c = cos + token * width, *s = sin + token * width;
        for (int64_t head = 0; head < heads; head++) {
            const T *from = x + token * x_token + head * x_head;
            T *to = out + token * out_token + head * out_head;
            for (int64_t i = 0; i < half; i += LANES) {
                vec a = load(from + i), b = load(from + half + i);
                vec s1 = load(s + i), s2 = load(s + half + i);
                if (back) {
                    vec first = s1;
                    s1 = -s2, s2 = -first;
                }
                store(to + i, a * load(c + i) - b * s1);
                store(to + half + i, b * load(c + half + i) + a * s2);
            }
        }
    }
}

// Logits become the gradient of -log p(target), which is softmax less one at the target; `logp` is log p.
template <class T>
void softmax_less(T *logits, const int64_t *target, float *logp, int64_t rows, int64_t vocabulary, int gradient,
                  int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        T *line = logits + row * vocabulary;
        vec most = vec{} - INFINITY;
        for (int64_t i = 0; i < vocabulary; i += LANES) {
            vec x = load(line + i);
            most = x > most ? x : most;
        }
        float top = largest(most);
        double all = 0;
        for (int64_t at = 0; at < vocabulary; at += PIECE) {
            vec sum = {};
            for (int64_t i = at; i < vocabulary && i < at + PIECE; i += LANES) sum += exp_of(load(line + i) - top);
            all += total(sum);
        }
        float lse = top + float(std::log(all)), own = get(line[target[row]]);
        logp[row] = own - lse;
        if (!gradient) continue;
        for (int64_t i = 0; i < vocabulary; i += LANES) store(line + i, exp_of(load(line + i) - lse));
        put(line[target[row]], float(std::exp(own - lse)) - 1.0f);
    }
}

// Takes a tile of logits times a factor, z, into each row's running maximum, sum of e^(z - maximum), and sum of that
// times z - maximum, which moves with the maximum.
template <class T>
void fold(const T *logits, float *maximum, float *sum, float *moment, int64_t rows, int64_t width, float by,
          int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *line = logits + row * width;
        vec most = vec{} + maximum[row];
        for (int64_t i = 0; i < width; i += LANES) {
            vec z = load(line + i) * by;
            most = z > most ? z : most;
        }
        float top = largest(most);
        float shift = maximum[row] - top, keep = std::exp(shift);
        double all = double(sum[row]) * keep, weighed = moment ? (moment[row] + double(shift) * sum[row]) * keep : 0;
        for (int64_t at = 0; at < width; at += PIECE) {
            vec mass = {}, each = {};
            for (int64_t i = at; i < width && i < at + PIECE; i += LANES) {
                vec z = load(line + i) * by - top, p = exp_of(z);
                mass += p;
                each += p > vec{} ? p * z : vec{};  // not 0 * -inf
            }
            all += total(mass);
            weighed += total(each);
        }
        maximum[row] = top;
        sum[row] = float(all);
        if (moment) moment[row] = float(weighed);
    }
}

// A tile of logits becomes its gradient: by * (up * onehot(place) - p * (up + more * (log p + entropy))).
template <class T>
void slope(T *logits, const int64_t *place, const float *lse, const float *up, const float *entropy, const float *more,
           int64_t rows, int64_t width, float by, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        T *line = logits + row * width;
        float off = lse[row], level = more ? entropy[row] : 0, rise = more ? more[row] : 0, base = up[row];
        auto gradient = [=](vec z) {
            vec logp = z * by - off, p = exp_of(logp);
            return p > vec{} ? p * ((logp + level) * rise + base) * -by : p * -by;
        };
        float own = place[row] < 0 ? 0 : gradient(vec{} + get(line[place[row]]))[0] + base * by;
        for (int64_t i = 0; i < width; i += LANES) store(line + i, gradient(load(line + i)));
        if (place[row] >= 0) put(line[place[row]], own);
    }
}

}  // namespace

#define NORMS(NAME, X, Y)                                                                                             \
    extern "C" void norm_##NAME(const X *x, const float *weight, Y *out, float *inverse, int64_t rows, int64_t width, \
                                float eps, int threads) {                                                             \
        norm(x, weight, out, inverse, rows, width, eps, threads);                                                     \
    }                                                                                                                 \
    extern "C" void norm_back_##NAME(const Y *grad, const X *x, const float *weight, const float *inverse, X *grad_x, \
                                     float *grad_weight, int64_t rows, int64_t width, int threads) {                  \
        norm_back(grad, x, weight, inverse, grad_x, grad_weight, rows, width, threads);                               \
    }

NORMS(float32_float32, float, float)
NORMS(float32_bfloat16, float, bf16)
NORMS(bfloat16_bfloat16, bf16, bf16)

#define ENTRY(NAME, T)                                                                                                \
    extern "C" void gated_##NAME(const T *gate, const T *up, T *out, int64_t count, int threads) {                   \
        gated(gate, up, out, count, threads);                                                                         \
    }                                                                                                                 \
    extern "C" void gated_back_##NAME(const T *gate, const T *up, T *grad, T *inner, T *grad_up, int64_t count,      \
                                      int threads) {                                                                  \
        gated_back(gate, up, grad, inner, grad_up, count, threads);                                                   \
    }                                                                                                                 \
    extern "C" void turn_##NAME(const T *x, const float *cos, const float *sin, T *out, int64_t tokens,              \
                                int64_t heads, int64_t width, int64_t x_token, int64_t x_head, int64_t out_token,    \
                                int64_t out_head, int back, int threads) {                                            \
        turn(x, cos, sin, out, tokens, heads, width, x_token, x_head, out_token, out_head, back, threads);           \
    }                                                                                                                 \
    extern "C" void softmax_less_##NAME(T *logits, const int64_t *target, float *logp, int64_t rows,                 \
                                        int64_t vocabulary, int gradient, int threads) {                              \
        softmax_less(logits, target, logp, rows, vocabulary, gradient, threads);                                      \
    }                                                                                                                 \
    extern "C" void fold_##NAME(const T *logits, float *maximum, float *sum, float *moment, int64_t rows,            \
                                int64_t width, float by, int threads) {                                               \
        fold(logits, maximum, sum, moment, rows, width, by, threads);                                                 \
    }                                                                                                                 \
    extern "C" void slope_##NAME(T *logits, const int64_t *place, const float *lse, const float *up,                 \
                                 const float *entropy, const float *more, int64_t rows, int64_t width, float by,     \
                                 int threads) {                                                                       \
        slope(logits, place, lse, up, entropy, more, rows, width, by, threads);                                       \
    }

ENTRY(float32, float)
ENTRY(bfloat16, bf16)
