// Attention of one token a row over keys and values that lie in slots, as a running softmax (Milakov and Gimelshein,
// arXiv 1805.02867): what rows share is read once for all of them, and each row goes on from there with its own.

#pragma once
#include <vector>

#include "vectors.h"

namespace {

constexpr int BLOCK = 64;  // places whose scores are alive together

// The running softmax of one query: scores' maximum, sum of exponentials, and weighted sum of values.
template <int D> struct Running {
    float most = -INFINITY, sum = 0, q[D], out[D] = {}, score[BLOCK];
};

// Scores become weights: e to their distance from the maximum so far.
template <int D> inline void exponentials(Running<D> &query, int count) {
    float most = query.most;
#pragma omp simd reduction(max : most)
    for (int s = 0; s < count; s++) most = query.score[s] > most ? query.score[s] : most;
    vec sum = {};
    for (int s = 0; s < count; s += LANES) {
        vec weight = exp_of(load(query.score + s) - most);  // NaN, which is no maximum, stays NaN
        store(query.score + s, weight);
        sum += weight;
    }
    float keep = exp_of(vec{} + (query.most - most))[0];
    query.sum = query.sum * keep + total(sum);
    query.most = most;
    for (int i = 0; i < D; i++) query.out[i] *= keep;
}

template <class T> inline void fetch(const T *from, int count) {  // asks memory for it, without waiting
    for (int i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}

// Adds `count` weighted values to the sums of N queries; asks for `coming` lines at `next`.
template <class T, int D, int N>
inline void weigh(Running<D> *query, const T *values, int count, const T *next = nullptr,
                  int64_t coming = 0) {
    constexpr int WIDE = D / LANES, FIT = REGISTERS / N;
    constexpr int AT_ONCE = FIT >= WIDE ? WIDE : FIT >= 4 && WIDE % 4 == 0 ? 4 : FIT >= 2 && WIDE % 2 == 0 ? 2 : 1;
    for (int i = 0; i < D; i += AT_ONCE * LANES) {
        vec sum[N][AT_ONCE];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++)
#pragma GCC unroll 8
            for (int j = 0; j < AT_ONCE; j++) sum[n][j] = load(query[n].out + i + j * LANES);
        for (int s = 0; s < count; s++) {
            if (s < coming) fetch(next + s * D + i, AT_ONCE * LANES);
#pragma GCC unroll 8
            for (int j = 0; j < AT_ONCE; j++) {
                vec value = load(values + s * D + i + j * LANES);
#pragma GCC unroll 8
                for (int n = 0; n < N; n++) sum[n][j] += query[n].score[s] * value;
            }
        }
#pragma GCC unroll 8
        for (int n = 0; n < N; n++)
#pragma GCC unroll 8
            for (int j = 0; j < AT_ONCE; j++) store(query[n].out + i + j * LANES, sum[n][j]);
    }
}

// -- few queries: every line is used as it is read, by all of them --

// Scores of N queries with `count` keys; asks for as much at `next`.
template <class T, int D, int N> inline void few_scores(Running<D> *query, const T *keys, const T *next, int count) {
    for (int s = 0; s < count; s += 4) {
        const T *line[4];
        for (int j = 0; j < 4; j++) line[j] = keys + (s + j < count ? s + j : count - 1) * D;
        vec sum[N][4] = {};
        fetch(next + s * D, 4 * D);
#pragma GCC unroll 8
        for (int i = 0; i < D; i += LANES)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                vec key = load(line[j] + i);
#pragma GCC unroll 8
                for (int n = 0; n < N; n++) sum[n][j] += load(query[n].q + i) * key;
            }
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            vec four = totals(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
            std::memcpy(query[n].score + s, &four, 4 * sizeof(float));
        }
    }
    for (int n = 0; n < N; n++)
        for (int s = count; s % LANES; s++) query[n].score[s] = -INFINITY;
}

template <class T, int D, int N> void fold_few(Running<D> *query, const T *keys, const T *values, int64_t places) {
    for (int64_t start = 0; start < places; start += BLOCK, keys += BLOCK * D, values += BLOCK * D) {
        int count = int(places - start < BLOCK ? places - start : BLOCK);
        few_scores<T, D, N>(query, keys, values, count);
        for (int n = 0; n < N; n++) exponentials<D>(query[n], count);
        weigh<T, D, N>(query, values, count, keys + BLOCK * D, places - start - BLOCK);
    }
}

// -- many queries: a block of lines is made floats, and turned, once for all of them --

// Lines of D numbers as floats: where they are, or a copy.
template <int D> inline const float *wide(const float *from, float *, int) { return from; }
template <int D> inline const float *wide(const bf16 *from, float *room, int count) {
    for (int i = 0; i < count * D; i += LANES) store(room + i, load(from + i));
    return room;
}

// Lines of D numbers as floats, turned: [D, BLOCK].
template <class T, int D> inline void turned(const T *from, float *to, int count) {
    for (int i = 0; i < D; i += LANES)
        for (int s = 0; s < count; s += LANES) {
            vec x[LANES];
#pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) x[j] = load(from + (s + j < count ? s + j : count - 1) * D + i);
            transpose(x);
#pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) store(to + (i + j) * BLOCK + s, x[j]);
        }
}

// Scores of N queries with `count` turned keys: sums go down the lanes, and none has to be made across them.
template <int D, int N> inline void scores(Running<D> *query, const float *keys, int count) {
    constexpr int WIDE = REGISTERS / N >= 4 ? 4 : 2;
    for (int s = 0; s < count; s += WIDE * LANES) {
        vec sum[N][WIDE] = {};
        for (int i = 0; i < D; i++) {
#pragma GCC unroll 4
            for (int j = 0; j < WIDE; j++) {
                vec key = load(keys + i * BLOCK + s + j * LANES);
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) sum[n][j] += query[n].q[i] * key;
            }
        }
#pragma GCC unroll 4
        for (int n = 0; n < N; n++)
#pragma GCC unroll 4
            for (int j = 0; j < WIDE; j++) store(query[n].score + s + j * LANES, sum[n][j]);
    }
    for (int n = 0; n < N; n++)
        for (int s = count; s < BLOCK; s++) query[n].score[s] = -INFINITY;
}

template <class T, int D>
void fold_many(Running<D> *query, int count, const T *keys, const T *values, int64_t places) {
    float room[BLOCK * D];
    for (int64_t start = 0; start < places; start += BLOCK, keys += BLOCK * D, values += BLOCK * D) {
        int lines = int(places - start < BLOCK ? places - start : BLOCK), part = (lines + count - 1) / count, n = 0;
        turned<T, D>(keys, room, lines);
        for (; n + 4 <= count; n += 4) scores<D, 4>(query + n, room, lines);
        for (; n < count; n++) scores<D, 1>(query + n, room, lines);
        for (n = 0; n < count; n++) {
            fetch(values + n * part * D, (lines - n * part < part ? lines - n * part : part) * D);
            exponentials<D>(query[n], lines);
        }
        const float *line = wide<D>(values, room, lines);
        for (n = 0; n + 4 <= count; n += 4) weigh<float, D, 4>(query + n, line, lines);
        for (; n + 2 <= count; n += 2) weigh<float, D, 2>(query + n, line, lines);
        if (n < count) weigh<float, D, 1>(query + n, line, lines);
    }
}

// Folds `places` lines of keys and values into the running softmaxes of `count` queries.
template <class T, int D> void fold(Running<D> *query, int count, const T *keys, const T *values, int64_t places) {
    switch (count) {
        case 1: return fold_few<T, D, 1>(query, keys, values, places);
        case 2: return fold_few<T, D, 2>(query, keys, values, places);
        case 3: return fold_few<T, D, 3>(query, keys, values, places);
        case 4: return fold_few<T, D, 4>(query, keys, values, places);
        case 5: return fold_few<T, D, 5>(query, keys, values, places);
        case 6: return fold_few<T, D, 6>(query, keys, values, places);
        default: return fold_many<T, D>(query, count, keys, values, places);
    }
}

struct Shape {  // of one layer's step; strides count numbers
    int64_t rows, heads, key_heads, slot_stride, head_stride, shared_slot_stride, shared_head_stride;
    // What rows share, slot by slot: filled places, where its rows begin in `member`, and all rows in that order.
    const int64_t *size, *first, *member;
    int64_t slots;
};

// One token's keys and values go to their slots; each row attends to its slot, and to the one that it shares.
template <class T, int D>
void attend(T *qkv, T *keys, T *values, const T *shared_keys, const T *shared_values, const int64_t *filled,
            const Shape *shape, float *beside, T *out, int threads) {
    const int64_t group = shape->heads / shape->key_heads, line = (shape->heads + 2 * shape->key_heads) * D;
    const int64_t state = D + 2;  // of a query in `beside`: maximum, sum of exponentials, sum of values
#pragma omp parallel num_threads(threads)
    {
        std::vector<Running<D>> query;
#pragma omp for schedule(dynamic, 1)
        for (int64_t pair = 0; pair < shape->slots * shape->key_heads; pair++) {
            int64_t slot = pair / shape->key_heads, head = pair % shape->key_heads;
            query.assign((shape->first[slot + 1] - shape->first[slot]) * group, Running<D>());
            if (query.empty()) continue;
            for (size_t n = 0; n < query.size(); n++) {
                const T *q = qkv + shape->member[shape->first[slot] + n / group] * line + (head * group + n % group) * D;
                for (int i = 0; i < D; i++) query[n].q[i] = get(q[i]);
            }
            int64_t start = slot * shape->shared_slot_stride + head * shape->shared_head_stride;
            fold<T, D>(query.data(), int(query.size()), shared_keys + start, shared_values + start, shape->size[slot]);
            for (size_t n = 0; n < query.size(); n++) {
                int64_t row = shape->member[shape->first[slot] + n / group];
                float *to = beside + (row * shape->heads + head * group + n % group) * state;
                to[0] = query[n].most, to[1] = query[n].sum;
                std::memcpy(to + 2, query[n].out, sizeof query[n].out);
            }
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t pair = 0; pair < shape->rows * shape->key_heads; pair++) {
            int64_t row = pair / shape->key_heads, head = pair % shape->key_heads, cached = filled[row];
            T *own = qkv + row * line;
            int64_t start = row * shape->slot_stride + head * shape->head_stride;
            std::memcpy(keys + start + cached * D, own + (shape->heads + head) * D, D * sizeof(T));
            std::memcpy(values + start + cached * D, own + (shape->heads + shape->key_heads + head) * D, D * sizeof(T));
            query.assign(group, Running<D>());
            for (int64_t n = 0; n < group; n++) {
                int64_t at = row * shape->heads + head * group + n;
                for (int i = 0; i < D; i++) query[n].q[i] = get(own[(head * group + n) * D + i]);
                if (shape->slots) {  // go on from what was folded above
                    query[n].most = beside[at * state], query[n].sum = beside[at * state + 1];
                    std::memcpy(query[n].out, beside + at * state + 2, sizeof query[n].out);
                }
            }
            fold<T, D>(query.data(), int(group), keys + start, values + start, cached + 1);
            for (int64_t n = 0; n < group; n++) {
                float by = 1.0f / query[n].sum;
                T *to = out + (row * shape->heads + head * group + n) * D;
                for (int i = 0; i < D; i++) put(to[i], query[n].out[i] * by);
            }
        }
    }
}

}  // namespace
