// Products of a few rows by a matrix in bfloat16 with AMX: tiles of 16 x 32 numbers that the processor multiplies whole.
//
// A decoding step reads every matrix for a few dozen rows, so what counts is how fast memory is read. The matrix is laid
// out as it is read, one tile after another: 32 inputs of 16 outputs, pairs of inputs side by side, 1 KB. Sums are fp32
// and rounded once. rollout/tiles.py compiles this file, tries it against PyTorch, and says what each argument is.
//
// A library that multiplies by tiles too (oneDNN) remembers how it has set them: they are put back as they were.

#include <cstdint>

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__linux__)
#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

namespace {

constexpr int64_t SIDE = 16, DEEP = 32, TILE = SIDE * DEEP;  // outputs, inputs and numbers of a tile
constexpr int64_t AHEAD = 2048;                              // bytes between what is multiplied and what memory is asked for
constexpr int64_t PERMISSION = 0x1023, TILE_DATA = 18;       // of Linux: ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA

struct Setting {
    uint8_t palette, start, zero[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

// Eight tiles of 16 rows and 64 bytes, for as long as it lives.
class Tiles {
    Setting before;

  public:
    Tiles() {
        _tile_storeconfig(&before);
        Setting now = {};
        now.palette = 1;
        for (int i = 0; i < 8; i++) now.bytes[i] = 64, now.rows[i] = SIDE;
        _tile_loadconfig(&now);
    }
    ~Tiles() {
        if (before.palette)
            _tile_loadconfig(&before);
        else
            _tile_release();
    }
};

// Sums of 16 rows, or of 32, and 32 outputs, whose tiles begin at `left` and `right`; the first to read them asks for more.
template <bool TWO, bool FIRST>
inline void multiply(const uint16_t *x, int64_t inputs, const char *left, const char *right, float (*sums)[SIDE][SIDE]) {
    _tile_zero(0);
    _tile_zero(1);
    if (TWO) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < inputs; k += DEEP, left += 2 * TILE, right += 2 * TILE) {
        if (FIRST) {
#pragma GCC unroll 16
            for (int line = 0; line < 16; line++) {
                _mm_prefetch(left + AHEAD + 64 * line, _MM_HINT_T0);
                _mm_prefetch(right + AHEAD + 64 * line, _MM_HINT_T0);
            }
        }
        _tile_loadd(4, x + k, 2 * inputs);
        _tile_loadd(6, left, 64);
        _tile_loadd(7, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (TWO) {
            _tile_loadd(5, x + SIDE * inputs + k, 2 * inputs);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if (TWO) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }
}

inline __m512 wide(const uint16_t *from) {
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Sums of up to 32 rows from `first` on become rows of the output.
inline void finish(float (*sums)[SIDE][SIDE], int64_t first, int64_t rows, int64_t pair, int64_t outputs, const uint16_t *bias,
                   const uint16_t *other, uint16_t *out) {
    for (int64_t row = first; row < rows && row < first + 2 * SIDE; row++)
        for (int64_t half = 0; half < 2; half++) {
            const int64_t column = (2 * pair + half) * SIDE, at = row * outputs + column;
            __m512 sum = _mm512_load_ps(sums[(row - first) / SIDE * 2 + half][(row - first) % SIDE]);
            if (bias) sum = _mm512_add_ps(sum, wide(bias + column));
            if (other) sum = _mm512_add_ps(sum, wide(other + at));
            __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum));
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + at), rounded);
        }
}

}  // namespace

extern "C" {

// Whether the system lets this process use tiles; it has to be asked once.
int tiles_ready() { return syscall(SYS_arch_prctl, PERMISSION, TILE_DATA) == 0; }

// The matrix [outputs, inputs] as tiles, or back; outputs are a multiple of 16, inputs of 32.
void tiles_pack(const uint16_t *plain, uint16_t *packed, int64_t outputs, int64_t inputs, int back, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < outputs / SIDE; block++) {
        for (int64_t k = 0; k < inputs; k++)
            for (int64_t n = 0; n < SIDE; n++) {
                int64_t at = (block * SIDE + n) * inputs + k;
                int64_t in = (block * (inputs / DEEP) + k / DEEP) * TILE + (k % DEEP / 2) * 2 * SIDE + 2 * n + k % 2;
                if (back)
                    const_cast<uint16_t *>(plain)[at] = packed[in];
                else
                    packed[in] = plain[at];
            }
    }
}

// out = x W^T + bias + other; the last two may be missing. Outputs are a multiple of 32.
void tiles_product(const uint16_t *x, const uint16_t *packed, const uint16_t *bias, const uint16_t *other, uint16_t *out,
                   int64_t rows, int64_t outputs, int64_t inputs, int threads) {
    std::vector<uint16_t> filled;  // a tile reads 16 rows
    if (rows % SIDE) {
        filled.assign((rows + SIDE - 1) / SIDE * SIDE * inputs, 0);
        for (int64_t i = 0; i < rows * inputs; i++) filled[i] = x[i];
        x = filled.data();
    }
    const int64_t pairs = outputs / (2 * SIDE), line = inputs * SIDE;
#pragma omp parallel num_threads(threads)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        Tiles tiles;
        alignas(64) float sums[4][SIDE][SIDE];
        for (int64_t pair = pairs * me / all; pair < pairs * (me + 1) / all; pair++) {
            const char *left = reinterpret_cast<const char *>(packed + 2 * pair * line);
            const char *right = reinterpret_cast<const char *>(packed + (2 * pair + 1) * line);
            for (int64_t first = 0; first < rows; first += 2 * SIDE) {
                const uint16_t *from = x + first * inputs;
                if (rows - first <= SIDE)
                    multiply<false, true>(from, inputs, left, right, sums);
                else if (first)
                    multiply<true, false>(from, inputs, left, right, sums);
                else
                    multiply<true, true>(from, inputs, left, right, sums);
                finish(sums, first, rows, pair, outputs, bias, other, out);
            }
        }
    }
}
}
#else
extern "C" int tiles_ready() { return 0; }
#endif
