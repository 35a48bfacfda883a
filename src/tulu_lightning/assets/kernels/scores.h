// Rows of scores: which keys some queries see, and how scores become weights.

#pragma once
#include <algorithm>
#include <vector>

#include "products.h"

namespace {

constexpr int64_t QUERIES = 48;  // that go together

struct Segment {
    int64_t start, end, parent;  // tokens of the pack; index of a segment, or -1
    int64_t column;              // where its keys begin in the document's panels, a multiple of 64
};

struct Pack {
    int64_t documents, heads, group;  // group: query heads to a key head
    const Segment *segment;
    const int64_t *document;  // first segment and the one after the last, of each
    int64_t columns, tokens;  // most of one document, columns in multiples of 64
    int64_t q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head;  // strides
    float scale;
};

// Rows of floats: where they are, or a copy where they are narrower.
struct Rows {
    const float *at;
    int64_t step;
};
template <int D> inline Rows rows_of(const float *from, int64_t step, int64_t, float *) { return {from, step}; }
template <int D> inline Rows rows_of(const bf16 *from, int64_t step, int64_t count, float *room) {
    for (int64_t row = 0; row < count; row++)
        for (int i = 0; i < D; i += LANES) store(room + row * D + i, load(from + row * step + i));
    return {room, D};
}

// Rows as columns of panels, which begin at a multiple of PANEL; zeros fill the last vector.
template <int D> inline void turned(Rows rows, int64_t count, float *panels) {
    for (int64_t first = 0; first < count; first += LANES) {
        float *to = panels + first / PANEL * PANEL * D + first % PANEL;
        for (int i = 0; i < D; i += LANES) {
            vec square[LANES];
            for (int j = 0; j < LANES; j++)
                square[j] = first + j < count ? load(rows.at + (first + j) * rows.step + i) : vec{};
            transpose(square);
            for (int j = 0; j < LANES; j++) store(to + (i + j) * PANEL, square[j]);
        }
    }
}

inline int64_t whole(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// Keys that some queries see: `count` of one segment, whose scores begin at `at` in a row of scores.
struct Range {
    int64_t segment, count, at;
};

// What a chain of segments shows to `queries` tokens of the last one, from its `first` on; returns the length of a row.
inline int64_t ranges_of(const Segment *segment, int64_t index, int64_t upto, std::vector<Range> &ranges) {
    ranges.clear();
    for (int64_t each = index; each >= 0; each = segment[each].parent)
        ranges.push_back({each, (each == index ? upto : segment[each].end) - segment[each].start, 0});
    std::reverse(ranges.begin(), ranges.end());
    int64_t at = 0;
    for (Range &range : ranges) {
        range.at = at;
        at += whole(range.count);
    }
    return at;
}

inline vec numbered() {
    vec lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = float(i);
    return lanes;
}

// The largest of the first `seen` scores times a factor.
inline float largest(const float *score, int64_t seen, float scale) {
    vec most = vec{} - INFINITY;
    int64_t i = 0;
    for (; i + LANES <= seen; i += LANES) {
        vec x = load(score + i) * scale;
        most = x > most ? x : most;
    }
    if (i < seen) {
        vec x = load(score + i) * scale;
        x = numbered() < float(seen - i) ? x : vec{} - INFINITY;
        most = x > most ? x : most;
    }
    return largest(most);
}

// The first `seen` scores become e^(score * scale - off), and those up to `count` zero; returns the sum.
inline vec weights(float *score, int64_t seen, int64_t count, float scale, float off) {
    vec sum = {};
    int64_t i = 0;
    for (; i + LANES <= seen; i += LANES) {
        vec weight = exp_of(load(score + i) * scale - off);
        store(score + i, weight);
        sum += weight;
    }
    if (i < seen) {
        vec weight = exp_of(load(score + i) * scale - off);
        weight = numbered() < float(seen - i) ? weight : vec{};
        store(score + i, weight);
        sum += weight;
        i += LANES;
    }
    for (; i < count; i += LANES) store(score + i, vec{});
    return sum;
}

}  // namespace
