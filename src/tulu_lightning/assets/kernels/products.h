// Products of small matrices of floats that lie in the processor's cache, block by block of registers.

#pragma once
#include "vectors.h"

namespace {

constexpr int TALL = 6, WIDE = REGISTERS / TALL;  // rows, and vectors of columns, whose sums are in registers together
constexpr int PANEL = WIDE * LANES;

// c [R, V vectors] = a [R, n] b [n, V vectors], added to what c holds if ADD. Each matrix has its row stride, and a has
// one between its columns, too, so that it can be a transposed one.
template <int R, int V, bool ADD>
inline void block(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_row, int64_t n, float *c,
                  int64_t c_row) {
    vec sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[r][v] = ADD ? load(c + r * c_row + v * LANES) : vec{};
    for (int64_t k = 0; k < n; k++) {
        vec row[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) row[v] = load(b + k * b_row + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            float x = a[r * a_row + k * a_step];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) sum[r][v] += x * row[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store(c + r * c_row + v * LANES, sum[r][v]);
}

// The same for any number of rows.
template <int V, bool ADD>
inline void blocks(const float *a, int64_t a_row, int64_t a_step, int64_t rows, const float *b, int64_t b_row,
                   int64_t n, float *c, int64_t c_row) {
    for (; rows >= TALL; rows -= TALL, a += TALL * a_row, c += TALL * c_row)
        block<TALL, V, ADD>(a, a_row, a_step, b, b_row, n, c, c_row);
    switch (rows) {
        case 5: return block<5, V, ADD>(a, a_row, a_step, b, b_row, n, c, c_row);
        case 4: return block<4, V, ADD>(a, a_row, a_step, b, b_row, n, c, c_row);
        case 3: return block<3, V, ADD>(a, a_row, a_step, b, b_row, n, c, c_row);
        case 2: return block<2, V, ADD>(a, a_row, a_step, b, b_row, n, c, c_row);
        case 1: return block<1, V, ADD>(a, a_row, a_step, b, b_row, n, c, c_row);
    }
}

// The same for D columns, added to what c holds.
template <int D>
inline void add_product(const float *a, int64_t a_row, int64_t a_step, int64_t rows, const float *b, int64_t b_row,
                    int64_t n, float *c, int64_t c_row) {
    static_assert(D % LANES == 0);
    for (int at = 0; at + PANEL <= D; at += PANEL)
        blocks<WIDE, true>(a, a_row, a_step, rows, b + at, b_row, n, c + at, c_row);
    constexpr int REST = D % PANEL;
    if constexpr (REST > 0)
        blocks<REST / LANES, true>(a, a_row, a_step, rows, b + D - REST, b_row, n, c + D - REST, c_row);
}

// c [rows, columns] = a [rows, n] times the first columns, whole vectors, of a panel [n, PANEL].
inline void panel_product(const float *a, int64_t a_row, int64_t rows, const float *panel, int64_t n, int64_t columns,
                          float *c, int64_t c_row) {
    static_assert(WIDE == 4 || WIDE == 2);
    switch (columns / LANES) {
        case 1: return blocks<1, false>(a, a_row, 1, rows, panel, PANEL, n, c, c_row);
        case 2: return blocks<2, false>(a, a_row, 1, rows, panel, PANEL, n, c, c_row);
#if defined(__AVX512F__) || !defined(__AVX__)
        case 3: return blocks<3, false>(a, a_row, 1, rows, panel, PANEL, n, c, c_row);
        case 4: return blocks<4, false>(a, a_row, 1, rows, panel, PANEL, n, c, c_row);
#endif
    }
}

}  // namespace
