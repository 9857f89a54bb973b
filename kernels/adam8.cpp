// AdamW with two moments in 16 bits on a CPU: what _twin in adam8.py means, a block of 256 weights at a time.
//
// A block stays in L1 from its first read to its last write, in loops of 256 floats that GCC and Clang make vectors of;
// short ones, for a processor looks ahead over few instructions, and long chains leave it idle. Sums and products are
// rounded one by one (-ffp-contract=off); fused are only those that are exact either way, and the polynomials. What the
// twin divides five times a weight is divided twice here, for a division takes as long as ten products: m stays a
// fraction. Blocks are independent: which thread steps which changes nothing.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// As in moment_code.py and adam8.py.
constexpr int BLOCK = 256, NARROW = 3, COARSEST = 3, LEVELS = 1023, HALF = 32, FULL = 33;
constexpr float LIMIT = 1.5f, TRUST = 0.9f;
constexpr uint32_t FAINTEST = 0x00800000, INFINITE = 0x7F800000;  // patterns of 2^-126 and infinity

constexpr float ROUND = 1.5f * (1 << 23);  // added, it leaves the nearest whole number in the low bits of the pattern
constexpr int CHUNK = 64;           // blocks a thread takes at once: enough for the memory to run ahead of it
constexpr int WORTH_THREADS = 512;  // blocks: a quarter of a millisecond; less is not worth waiting for a thread whose
                                    // core another process has

enum Storage : int32_t { BF16, FP16, FP32 };

struct Step {  // as in adam8_step.py
    float lr, decay, root_eps, ratio, keep_m, add_m, keep_scaled, add_scaled, keep_v, add_v, moves, foresee;
};

struct Record {  // of a tensor, as in adam8.py
    uint64_t seed, step, tensor;
    int64_t skipped;
};

struct Tensors {  // the arguments of update_ in adam8.py, as native.py packs them
    char* weight;
    int8_t* residual;  // or null
    int16_t* codes;
    int32_t* scales;
    const Step* numbers;
    Record* record;
    uint64_t stream;
    int64_t n, weights;  // Storage
    const char* grad;
    const float* unscale;
    int64_t grads;  // Storage
};

// What one loop over a block leaves for another. Were two of them 4 KiB apart, loads from one would wait for stores to the
// other: a processor compares only the low bits of addresses at first.
struct Floats {
    alignas(64) float at[BLOCK + 80];
    float& operator[](int i) { return at[i]; }
    const float& operator[](int i) const { return at[i]; }
};

template <class To, class From>
inline To as(From x) {
    static_assert(sizeof(To) == sizeof(From), "a pattern is read as another type");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

inline float no_larger(float x, float size) { return std::copysign(std::min(std::fabs(x), size), x); }

inline float power(int e) { return as<float>(uint32_t(127 + e) << 23); }

// log2 of a normal x > 0, to 2^-26 or the last place: a minimax polynomial between the roots of 1/2 and 2.
inline float log2_of(float x) {
    constexpr uint32_t root_half = 0x3F3504F3;
    uint32_t from = as<uint32_t>(x) - root_half;
    float y = as<float>((from & 0x7FFFFF) + root_half) - 1;
    float p = 0.12542774f;
    p = fused(p, y, -0.2102897f);
    p = fused(p, y, 0.21736577f);
    p = fused(p, y, -0.2385212f);
    p = fused(p, y, 0.28765875f);
    p = fused(p, y, -0.36072114f);
    p = fused(p, y, 0.48092243f);
    p = fused(p, y, -0.72134715f);
    p = fused(p, y, 1.4426949f);
    return fused(p, y, float(int32_t(from) >> 23));
}

// 2^x to the last place, where that is a normal number.
inline float exp2_of(float x) {
    float whole = x + ROUND, y = x - (whole - ROUND);
    float p = 0.00015353599f;
    p = fused(p, y, 0.0013398852f);
    p = fused(p, y, 0.009618436f);
    p = fused(p, y, 0.055503324f);
    p = fused(p, y, 0.24022648f);
    p = fused(p, y, 0.6931472f);
    return as<float>(as<uint32_t>(fused(p, y, 1)) + (as<uint32_t>(whole) << 23));
}

struct Format {  // how a block's codes are to be read
    int e, last, place_bits, half;
    float full;
    explicit Format(int kind) {
        int narrow = kind >= NARROW;
        e = kind + COARSEST - narrow, last = LEVELS >> narrow, place_bits = 6 + narrow, half = HALF << narrow;
        full = float(FULL << narrow);
    }
};

// As bits.lanes: Philox 4x32-10, its words in 64-bit lanes, of which the low half counts.
void lanes(uint64_t first_group, const Record& at, uint64_t stream, uint16_t* random) {
    constexpr int GROUPS = BLOCK / 8;
    constexpr uint64_t low = 0xFFFFFFFF;
    uint64_t x0[GROUPS], x1[GROUPS], x2[GROUPS], x3[GROUPS], words[GROUPS][2];
    for (int i = 0; i < GROUPS; i++) {
        x0[i] = first_group + i, x1[i] = uint32_t(at.step), x2[i] = at.tensor, x3[i] = stream;
    }
    uint32_t k0 = uint32_t(at.seed), k1 = uint32_t(at.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < GROUPS; i++) {
            uint64_t p0 = (x0[i] & low) * 0xD2511F53u, p1 = (x2[i] & low) * 0xCD9E8D57u;
            x0[i] = (p1 >> 32) ^ x1[i] ^ k0, x1[i] = p1;
            x2[i] = (p0 >> 32) ^ x3[i] ^ k1, x3[i] = p0;
        }
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < GROUPS; i++) {
        words[i][0] = (x0[i] & low) | x1[i] << 32, words[i][1] = (x2[i] & low) | x3[i] << 32;
    }
    std::memcpy(random, words, sizeof words);  // the low half of a word comes first
}

inline int64_t blocks_of(const Tensors& t) { return (t.n + BLOCK - 1) / BLOCK; }

inline int64_t bytes(int64_t storage) { return storage == FP32 ? 4 : 2; }

void widen(const char* from, int64_t storage, Floats& to) {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(from);
    if (storage == FP32)
        std::memcpy(to.at, from, sizeof(float[BLOCK]));
    else if (storage == BF16)
        for (int i = 0; i < BLOCK; i++) to[i] = as<float>(uint32_t(x[i]) << 16);
    else
        for (int i = 0; i < BLOCK; i++) {
            uint32_t size = uint32_t(x[i] & 0x7FFF) << 13, sign = uint32_t(x[i] & 0x8000) << 16;
            uint32_t normal = size + (size < 0x7C00 << 13 ? 112 << 23 : 224 << 23);  // infinity and NaN stay so
            float small = as<float>(size + (113 << 23)) - 0x1p-14f;
            to[i] = as<float>((size < 1 << 23 ? as<uint32_t>(small) : normal) | sign);
        }
}

// Round stochastically into the weights' storage, as the functions of bits.py do.
void narrow(const Floats& w, const uint16_t* random, int64_t storage, char* to, int8_t* residual) {
    uint16_t* x = reinterpret_cast<uint16_t*>(to);
    if (storage == FP32)
        std::memcpy(to, w.at, sizeof(float[BLOCK]));
    else if (residual)
        for (int i = 0; i < BLOCK; i++) {
            int32_t upper = int32_t(as<uint32_t>(w[i]) + (random[i] & 0xFF)) >> 8, nearest = (upper + 0x80) >> 8;
            x[i] = uint16_t(nearest), residual[i] = int8_t(upper - nearest * 256);
        }
    else if (storage == BF16)
        for (int i = 0; i < BLOCK; i++) x[i] = uint16_t((as<uint32_t>(w[i]) + random[i]) >> 16);
    else
        for (int i = 0; i < BLOCK; i++) {
            uint32_t pattern = as<uint32_t>(w[i]), size = pattern & 0x7FFFFFFF, cut = random[i] & 0x1FFF;
            uint32_t normal = ((size + cut) >> 13) - (112 << 10);
            normal = normal < 0x7C00 ? normal : size > INFINITE ? 0x7E00 : 0x7C00;
            int32_t small = int32_t(as<float>(size) * 0x1p24f + float(int32_t(cut)) * 0x1p-13f);
            x[i] = uint16_t((size < 113 << 23 ? uint32_t(small) : normal) | (pattern >> 16 & 0x8000));
        }
}

struct Block {  // its number, how many of its weights there are, and where they and what belongs to them lie
    int64_t number, count;
    char* weight;
    int8_t* residual;  // or null
    const char* grad;
    int16_t* codes;
};

// One step of a block; false, and nothing done, where a gradient is not finite.
bool step_block(const Tensors& t, const Step& step, const Block& block) {
    Floats g, w, over, under, v, roots, divisor, logs, gaps, errors;
    alignas(64) int32_t levels[BLOCK];
    alignas(64) uint16_t random[BLOCK];
    int16_t* const codes = block.codes;

    // the moments: m = over / under
    widen(block.grad, t.grads, g);
    if (*t.unscale != 1)
        for (int i = 0; i < BLOCK; i++) g[i] *= *t.unscale;
    const int scale = t.scales[block.number];
    const Format old(scale & 15);
    const float old_half_step = power(-1 - old.e), old_lowest = float((scale >> 4) - old.last) * old_half_step;
    for (int i = 0; i < BLOCK; i++)
        roots[i] = exp2_of(fused(float(uint16_t(codes[i]) >> old.place_bits), old_half_step, old_lowest));
    for (int i = 0; i < BLOCK; i++) {
        float place = float((codes[i] & (2 * old.half - 1)) - old.half), gap = old.full - std::fabs(place);
        under[i] = gap + gap;  // u = place / under: MIDDLE is a half
        over[i] = place * roots[i] * step.keep_scaled + g[i] * step.add_scaled * under[i];
        v[i] = roots[i] * roots[i] * step.keep_v + g[i] * g[i] * step.add_v;
        divisor[i] = (std::sqrt(v[i]) + step.root_eps) * under[i];
    }
    std::fill(v.at + block.count, v.at + BLOCK, 0.0f);

    // Floats from zero up are ordered as their patterns are, with infinity and NaN above; the difference that runs below
    // zero becomes the largest of all.
    uint32_t largest = 0, least = ~0u;
    for (int i = 0; i < BLOCK; i++) {
        largest = std::max(largest, as<uint32_t>(v[i]));
        least = std::min(least, as<uint32_t>(v[i]) - FAINTEST);
    }
    if (largest >= INFINITE) return false;
    const float top = log2_of(as<float>(std::max(largest, FAINTEST)));
    const float spread = top - log2_of(as<float>(std::max(least + FAINTEST, FAINTEST)));
    const int kind = (spread <= 1021 / 16.0f) + (spread <= 1021 / 32.0f) + (spread <= 509 / 32.0f) +
                     (spread <= 509 / 64.0f);
    const Format form(kind);
    const float steps = power(form.e), half_step = power(-1 - form.e), highest = std::ceil(top * steps);
    const float lowest = highest - float(form.last);

    // the levels of v, rounded stochastically, above ROUND: as patterns, which are ordered and end as the levels do
    lanes(block.number * (BLOCK / 8), *t.record, t.stream, random);
    for (int i = 0; i < BLOCK; i++) logs[i] = log2_of(v[i]);
    const int32_t level_0 = as<int32_t>(ROUND), last_level = level_0 + form.last;
    for (int i = 0; i < BLOCK; i++) {
        float exact = fused(logs[i], steps, -(lowest + 1.5f));
        float one_to_two = as<float>((random[i] * (40503u << 7) & 0x7FFF80) | 0x3F800040);
        int32_t level = as<int32_t>(exact + one_to_two + ROUND);
        level = std::min(std::max(level, level_0), last_level);
        levels[i] = as<uint32_t>(v[i]) < FAINTEST ? level_0 : level;
    }

    // the places of u = m / root, the codes, and what they hold more of m than there is: errors / (gaps * under)
    const float zero = ROUND + float(form.half), end = float(form.half - 1), below = (lowest - ROUND) * half_step;
    for (int i = 0; i < BLOCK; i++) roots[i] = exp2_of(fused(as<float>(levels[i]), half_step, below));
    for (int i = 0; i < BLOCK; i++) {
        float twice = over[i] + over[i], sum = std::fabs(twice) + roots[i] * under[i];
        float exact = twice / sum * form.full;
        float bent = no_larger(exact, end) + zero, place = bent - zero;
        float gap = form.full - std::fabs(place);
        gaps[i] = gap + gap;
        errors[i] = (place - exact) * sum;
        codes[i] = int16_t((uint32_t(levels[i]) << form.place_bits) + as<uint32_t>(bent));
    }

    // the update
    widen(block.weight, t.weights, w);
    if (block.residual)
        for (int i = 0; i < BLOCK; i++) w[i] = as<float>(as<uint32_t>(w[i]) + uint32_t(block.residual[i] * 256));
    for (int i = 0; i < BLOCK; i++) {
        float moved = over[i] * step.moves * gaps[i], inverse = 1 / (divisor[i] * gaps[i]);
        float reach = std::max(std::fabs(moved * inverse) * TRUST, LIMIT);
        float update = no_larger((moved - errors[i] * step.foresee) * inverse, reach);
        w[i] = w[i] * step.decay - update * step.lr;
    }
    narrow(w, random, t.weights, block.weight, block.residual);
    t.scales[block.number] = int32_t(highest) * 16 | kind;
    return true;
}

// Step the block of this number. A last one that is not full is stepped in a copy that zeros fill up.
bool step_number(const Tensors& t, const Step& step, int64_t number) {
    const int64_t first = number * BLOCK, count = std::min<int64_t>(t.n - first, BLOCK);
    const int64_t wide = bytes(t.weights);
    Block block{number, count, t.weight + first * wide, t.residual ? t.residual + first : nullptr,
                t.grad + first * bytes(t.grads), t.codes + first};
    if (count == BLOCK) return step_block(t, step, block);
    alignas(64) char weight[4 * BLOCK]{}, grad[4 * BLOCK]{};
    int8_t residual[BLOCK]{};
    int16_t codes[BLOCK]{};
    Block copy{number, count, weight, t.residual ? residual : nullptr, grad, codes};
    std::memcpy(weight, block.weight, count * wide);
    std::memcpy(grad, block.grad, count * bytes(t.grads));
    std::memcpy(codes, block.codes, count * sizeof *codes);
    if (t.residual) std::memcpy(residual, block.residual, count);
    if (!step_block(t, step, copy)) return false;
    std::memcpy(block.weight, weight, count * wide);
    std::memcpy(block.codes, codes, count * sizeof *codes);
    if (t.residual) std::memcpy(block.residual, residual, count);
    return true;
}

}  // namespace

// One step of some tensors, with the threads that torch has already: they wait for work where a pool of our own would have
// to be woken, or would find torch's spinning in its place. A thread that finds nothing left to do in a tensor goes on to
// the next.
extern "C" void adam8_step(const Tensors* tensors, int64_t count, int32_t threads) {
    int64_t all = 0;
    for (int64_t i = 0; i < count; i++) all += blocks_of(tensors[i]);
#pragma omp parallel if (all >= WORTH_THREADS) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        const Tensors& t = tensors[i];
        const Step step = *t.numbers;
        const int64_t blocks = blocks_of(t);
        int64_t skipped = 0;
#pragma omp for schedule(dynamic, CHUNK) nowait
        for (int64_t block = 0; block < blocks; block++) skipped += !step_number(t, step, block);
        if (skipped) {
#pragma omp atomic
            t.record->skipped += skipped;
        }
    }
}

// The random bits of some blocks, for steps that are not made here.
extern "C" void adam8_lanes(uint64_t group, const Record* at, uint64_t stream, uint16_t* random, int64_t blocks) {
    for (int64_t b = 0; b < blocks; b++) lanes(group + b * (BLOCK / 8), *at, stream, random + b * BLOCK);
}
