// Causal attention over packed segments, forward and backward, one document and one query head at a time.
//
// A document is a tree of segments; a token sees the segments on the way to its root, and its own up to itself. Some
// queries of one segment go together: all their scores are computed, made weights, and multiplied with the values;
// nothing is computed for keys that none of them sees. Backward computes the weights again (Dao et al. 2022, section
// 3.1, with whole rows in place of running ones: a row of scores fits the cache).

#include <omp.h>

#include "scores.h"

namespace {

// One document and one head, with room for what is computed on the way.
template <class T, int D> struct Task {
    const Pack &pack;
    const Segment *segment;
    int64_t first, last, begin, tokens;
    std::vector<Range> ranges;

    Task(const Pack &pack, int64_t document)
        : pack(pack), segment(pack.segment), first(pack.document[2 * document]),
          last(pack.document[2 * document + 1]), begin(segment[first].start),
          tokens(segment[last - 1].end - begin) {}

    void turn(Rows rows, float *panels) const {
        for (int64_t i = first; i < last; i++)
            turned<D>({rows.at + (segment[i].start - begin) * rows.step, rows.step},
                      segment[i].end - segment[i].start, panels + segment[i].column * D);
    }

    // out [queries, row] = rows times the columns of all ranges.
    void scores(const float *rows, int64_t step, int64_t queries, const float *panels, float *out, int64_t row) const {
        for (const Range &range : ranges)
            for (int64_t c = 0; c < range.count; c += PANEL)
                panel_product(rows, step, queries, panels + (segment[range.segment].column + c) * D, D,
                              std::min<int64_t>(whole(range.count - c), PANEL), out + range.at + c, row);
    }

    // How many keys of a range the query of a place in its segment sees.
    int64_t seen(const Range &range, int64_t index, int64_t place) const {
        return range.segment == index ? place + 1 : range.count;
    }
};

// Room that one thread needs, in floats.
template <int D> inline int64_t room_for(const Pack &pack) {
    return (2 * pack.columns + 4 * pack.tokens) * D + 2 * QUERIES * (pack.columns + LANES) + QUERIES * D;
}

template <class T, int D>
void forward_one(const Pack &pack, const T *q, const T *k, const T *v, T *out, float *lse, int64_t document,
                 int64_t head, int64_t length, float *room) {
    Task<T, D> task(pack, document);
    const int64_t tokens = task.tokens, begin = task.begin, key_head = head / pack.group;
    float *panels = room, *copies = panels + pack.columns * D, *score = copies + 3 * pack.tokens * D;
    float *sums = score + QUERIES * (pack.columns + LANES);
    const T *k0 = k + begin * pack.k_token + key_head * pack.k_head;
    const T *v0 = v + begin * pack.v_token + key_head * pack.v_head;
    Rows keys = rows_of<D>(k0, pack.k_token, tokens, copies);
    task.turn(keys, panels);
    Rows values = rows_of<D>(v0, pack.v_token, tokens, copies);
    Rows queries = rows_of<D>(q + begin * pack.q_token + head * pack.q_head, pack.q_token, tokens,
                              copies + tokens * D);
    for (int64_t index = task.first; index < task.last; index++) {
        const Segment &own = pack.segment[index];
        for (int64_t at = own.start; at < own.end; at += QUERIES) {
            int64_t count = std::min(QUERIES, own.end - at);
            int64_t row = ranges_of(pack.segment, index, at + count, task.ranges);
            task.scores(queries.at + (at - begin) * queries.step, queries.step, count, panels, score, row);
            float share[QUERIES];
            for (int64_t i = 0; i < count; i++) {
                float *line = score + i * row, most = -INFINITY;
                for (const Range &range : task.ranges) {
                    float each = largest(line + range.at, task.seen(range, index, at - own.start + i), pack.scale);
                    most = each > most ? each : most;
                }
                vec sum = {};
                for (const Range &range : task.ranges)
                    sum += weights(line + range.at, task.seen(range, index, at - own.start + i), whole(range.count),
                                   pack.scale, most);
                float all = total(sum);
                share[i] = 1.0f / all;
                lse[head * length + at + i] = most + std::log(all);
            }
            std::fill(sums, sums + count * D, 0.0f);
            for (const Range &range : task.ranges) {
                const float *from = values.at + (pack.segment[range.segment].start - begin) * values.step;
                add_product<D>(score + range.at, row, 1, count, from, values.step, range.count, sums, D);
            }
            for (int64_t i = 0; i < count; i++)
                for (int j = 0; j < D; j += LANES)
                    store(out + ((at + i) * pack.heads + head) * D + j, load(sums + i * D + j) * share[i]);
        }
    }
}

// Gradients of one head's queries, and its part of those of its keys and values, [heads, length, D] floats.
template <class T, int D>
void backward_one(const Pack &pack, const T *q, const T *k, const T *v, const T *grad, const float *lse, T *grad_q,
                  float *grad_k, float *grad_v, int64_t document, int64_t head, int64_t length, float *room) {
    Task<T, D> task(pack, document);
    const int64_t tokens = task.tokens, begin = task.begin, key_head = head / pack.group;
    float *k_panels = room, *v_panels = k_panels + pack.columns * D, *copies = v_panels + pack.columns * D;
    float *weight = copies + 4 * pack.tokens * D, *slope = weight + QUERIES * (pack.columns + LANES);
    float *sums = slope + QUERIES * (pack.columns + LANES);
    Rows keys = rows_of<D>(k + begin * pack.k_token + key_head * pack.k_head, pack.k_token, tokens, copies);
    Rows values = rows_of<D>(v + begin * pack.v_token + key_head * pack.v_head, pack.v_token, tokens,
                             copies + tokens * D);
    Rows queries = rows_of<D>(q + begin * pack.q_token + head * pack.q_head, pack.q_token, tokens,
                              copies + 2 * tokens * D);
    Rows grads = rows_of<D>(grad + begin * pack.grad_token + head * pack.grad_head, pack.grad_token, tokens,
                            copies + 3 * tokens * D);
    task.turn(keys, k_panels);
    task.turn(values, v_panels);
    float *to_k = grad_k + (head * length + begin) * D, *to_v = grad_v + (head * length + begin) * D;
    std::fill(to_k, to_k + tokens * D, 0.0f);
    std::fill(to_v, to_v + tokens * D, 0.0f);
    for (int64_t index = task.first; index < task.last; index++) {
        const Segment &own = pack.segment[index];
        for (int64_t at = own.start; at < own.end; at += QUERIES) {
            int64_t count = std::min(QUERIES, own.end - at);
            int64_t row = ranges_of(pack.segment, index, at + count, task.ranges);
            const float *own_q = queries.at + (at - begin) * queries.step;
            const float *own_grad = grads.at + (at - begin) * grads.step;
            task.scores(own_q, queries.step, count, k_panels, weight, row);
            task.scores(own_grad, grads.step, count, v_panels, slope, row);
            for (int64_t i = 0; i < count; i++) {
                float *p = weight + i * row, *d = slope + i * row;
                for (const Range &range : task.ranges)
                    weights(p + range.at, task.seen(range, index, at - own.start + i), whole(range.count), pack.scale,
                            lse[head * length + at + i]);
                vec along = {};
                for (int64_t j = 0; j < row; j += LANES) along += load(p + j) * load(d + j);
                float mean = total(along);
                for (int64_t j = 0; j < row; j += LANES)
                    store(d + j, load(p + j) * (load(d + j) - mean) * pack.scale);
            }
            std::fill(sums, sums + count * D, 0.0f);
            for (const Range &range : task.ranges) {
                int64_t place = pack.segment[range.segment].start - begin;
                const float *from = keys.at + place * keys.step, *p = weight + range.at, *d = slope + range.at;
                add_product<D>(d, row, 1, count, from, keys.step, range.count, sums, D);
                add_product<D>(p, 1, row, range.count, own_grad, grads.step, count, to_v + place * D, D);
                add_product<D>(d, 1, row, range.count, own_q, queries.step, count, to_k + place * D, D);
            }
            for (int64_t i = 0; i < count; i++)
                for (int j = 0; j < D; j += LANES)
                    store(grad_q + ((at + i) * pack.heads + head) * D + j, load(sums + i * D + j));
        }
    }
}

// Every document and head is a task of its own, so that how many threads there are changes no sum.
template <class Call> inline void each_task(const Pack &pack, int threads, Call call) {
#pragma omp parallel num_threads(threads)
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pack.documents * pack.heads; task++)
        call(task / pack.heads, task % pack.heads, omp_get_thread_num());
}

// Gradients of the query heads' parts [heads, length, D], summed over each group, as [length, key heads, D].
template <class T, int D>
void grouped(const float *parts, T *out, int64_t length, int64_t key_heads, int64_t group, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t token = 0; token < length; token++)
        for (int64_t head = 0; head < key_heads; head++)
            for (int i = 0; i < D; i += LANES) {
                vec sum = {};
                for (int64_t g = 0; g < group; g++) sum += load(parts + ((head * group + g) * length + token) * D + i);
                store(out + (token * key_heads + head) * D + i, sum);
            }
}

}  // namespace

extern "C" int64_t room(const Pack *pack) { return room_for<WIDTH>(*pack); }

#define ENTRY(NAME, T)                                                                                                \
    extern "C" void attention_##NAME(const Pack *pack, const T *q, const T *k, const T *v, T *out, float *lse,       \
                                     int64_t length, float *room, int threads) {                                      \
        const int64_t each = room_for<WIDTH>(*pack);                                                                  \
        each_task(*pack, threads, [=](int64_t document, int64_t head, int thread) {                                   \
            forward_one<T, WIDTH>(*pack, q, k, v, out, lse, document, head, length, room + thread * each);           \
        });                                                                                                           \
    }                                                                                                                 \
    extern "C" void attention_back_##NAME(const Pack *pack, const T *q, const T *k, const T *v, const T *grad,       \
                                          const float *lse, T *grad_q, T *grad_k, T *grad_v, float *parts,           \
                                          int64_t length, float *room, int threads) {                                 \
        const int64_t each = room_for<WIDTH>(*pack), all = pack->heads * length * WIDTH;                              \
        each_task(*pack, threads, [=](int64_t document, int64_t head, int thread) {                                   \
            backward_one<T, WIDTH>(*pack, q, k, v, grad, lse, grad_q, parts, parts + all, document, head, length,    \
                                   room + thread * each);                                                             \
        });                                                                                                           \
        const int64_t key_heads = pack->heads / pack->group;                                                          \
        grouped<T, WIDTH>(parts, grad_k, length, key_heads, pack->group, threads);                                    \
        grouped<T, WIDTH>(parts + all, grad_v, length, key_heads, pack->group, threads);                              \
    }

ENTRY(float32, float)
ENTRY(bfloat16, bf16)
