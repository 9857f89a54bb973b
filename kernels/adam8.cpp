// AdamW with two moments in 16 bits on a CPU: what _twin in adam8.py means, a block of 256 weights at a time.
//
// A block stays in L1 from its first read to its last write, in loops of 256 floats that GCC and Clang make vectors of;
// short ones, for a processor looks ahead over few instructions, and long chains leave it idle. Operations come in the
// twin's order and are rounded one by one (-ffp-contract=off); fused are only those that are exact either way, and the
// polynomials. Blocks are independent: which thread steps which changes nothing.

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
constexpr int CHUNK = 16;           // blocks a thread takes at once
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

struct Tensors {  // the arguments of update_
    char* weight;
    int8_t* residual;  // or null
    const char* grad;
    int16_t* codes;
    int32_t* scales;
    const float* unscale;
    const Step* numbers;
    Record* record;
    uint64_t stream;
    int64_t n;
    int64_t weights, grads;  // Storage
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

inline float unbend(float places, float full) {
    float gap = full - std::fabs(places);
    return places / (gap + gap);  // MIDDLE is a half
}

// As bits.lanes: Philox 4x32-10, its words in 64-bit lanes, of which the low half counts.
void lanes(uint64_t first_group, const Record& at, uint64_t stream, uint16_t* random) {
    constexpr uint64_t low = 0xFFFFFFFF;
    uint64_t words[BLOCK / 8][2];
    for (int group = 0; group < BLOCK / 8; group++) {
        uint64_t x0 = first_group + group, x1 = uint32_t(at.step), x2 = at.tensor, x3 = stream;
        uint32_t k0 = uint32_t(at.seed), k1 = uint32_t(at.seed >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; round++) {
            uint64_t p0 = (x0 & low) * 0xD2511F53u, p1 = (x2 & low) * 0xCD9E8D57u;
            x0 = (p1 >> 32) ^ x1 ^ k0, x1 = p1;
            x2 = (p0 >> 32) ^ x3 ^ k1, x3 = p0;
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        words[group][0] = (x0 & low) | x1 << 32, words[group][1] = (x2 & low) | x3 << 32;
    }
    std::memcpy(random, words, sizeof words);  // the low half of a word comes first
}

template <class T>
void read(const void* from, int64_t count, T* to) {  // and fill up with zeros
    if (count == BLOCK) return void(std::memcpy(to, from, BLOCK * sizeof(T)));
    std::fill(to, to + BLOCK, T(0));
    std::memcpy(to, from, count * sizeof(T));
}

template <class T>
void write(const T* from, int64_t count, void* to) {
    std::memcpy(to, from, count == BLOCK ? BLOCK * sizeof(T) : count * sizeof(T));
}

void widen(const char* tensor, int64_t storage, int64_t first, int64_t count, float* to) {
    uint16_t x[BLOCK];
    if (storage == FP32) return read(tensor + 4 * first, count, to);
    read(tensor + 2 * first, count, x);
    if (storage == BF16)
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
void narrow(const float* w, const uint16_t* random, const Tensors& t, int64_t first, int64_t count) {
    uint16_t x[BLOCK];
    int8_t rest[BLOCK];
    if (t.weights == FP32) return write(w, count, t.weight + 4 * first);
    if (t.residual) {
        for (int i = 0; i < BLOCK; i++) {
            int32_t upper = int32_t(as<uint32_t>(w[i]) + (random[i] & 0xFF)) >> 8, nearest = (upper + 0x80) >> 8;
            x[i] = uint16_t(nearest), rest[i] = int8_t(upper - nearest * 256);
        }
        write(rest, count, t.residual + first);
    } else if (t.weights == BF16)
        for (int i = 0; i < BLOCK; i++) x[i] = uint16_t((as<uint32_t>(w[i]) + random[i]) >> 16);
    else
        for (int i = 0; i < BLOCK; i++) {
            uint32_t pattern = as<uint32_t>(w[i]), size = pattern & 0x7FFFFFFF, cut = random[i] & 0x1FFF;
            uint32_t normal = ((size + cut) >> 13) - (112 << 10);
            normal = normal < 0x7C00 ? normal : size > INFINITE ? 0x7E00 : 0x7C00;
            int32_t small = int32_t(as<float>(size) * 0x1p24f + float(int32_t(cut)) * 0x1p-13f);
            x[i] = uint16_t((size < 113 << 23 ? uint32_t(small) : normal) | (pattern >> 16 & 0x8000));
        }
    write(x, count, t.weight + 2 * first);
}

// One step of a block; false, and nothing done, where a gradient is not finite.
bool step_block(const Tensors& t, const Step& step, int64_t block) {
    alignas(64) float g[BLOCK], w[BLOCK], m[BLOCK], v[BLOCK], inverse[BLOCK];
    alignas(64) float levels[BLOCK], places[BLOCK], roots[BLOCK];
    alignas(64) uint16_t random[BLOCK], codes[BLOCK];
    alignas(64) int8_t rest[BLOCK];
    const int64_t first = block * BLOCK, count = std::min<int64_t>(t.n - first, BLOCK);

    // the moments
    widen(t.grad, t.grads, first, count, g);
    read(t.codes + first, count, codes);
    if (*t.unscale != 1)
        for (int i = 0; i < BLOCK; i++) g[i] *= *t.unscale;
    const int scale = t.scales[block];
    const Format old(scale & 15);
    const float old_half_step = power(-1 - old.e), old_lowest = float((scale >> 4) - old.last) * old_half_step;
    for (int i = 0; i < BLOCK; i++) {
        float root = exp2_of(fused(float(codes[i] >> old.place_bits), old_half_step, old_lowest));
        float u = unbend(float((codes[i] & (2 * old.half - 1)) - old.half), old.full);
        m[i] = u * root * step.keep_scaled + g[i] * step.add_scaled;
        v[i] = root * root * step.keep_v + g[i] * g[i] * step.add_v;
        inverse[i] = 1 / (std::sqrt(v[i]) + step.root_eps);
    }
    std::fill(v + count, v + BLOCK, 0.0f);

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

    // the levels of v, rounded stochastically, above ROUND
    lanes(first / 8, *t.record, t.stream, random);
    const float level_0 = ROUND, last_level = ROUND + float(form.last);
    for (int i = 0; i < BLOCK; i++) {
        float exact = fused(log2_of(v[i]), steps, -(lowest + 1.5f));
        exact = as<uint32_t>(v[i]) < FAINTEST ? -INFINITY : exact;
        float one_to_two = as<float>((random[i] * 40503u & 0xFFFF) << 7 | 0x3F800040);
        levels[i] = std::min(std::max(exact + one_to_two + ROUND, level_0), last_level);
    }

    // the places of u = m / root, and the codes
    const float zero = ROUND + float(form.half), end = float(form.half - 1), below = (lowest - ROUND) * half_step;
    for (int i = 0; i < BLOCK; i++) {
        roots[i] = exp2_of(fused(levels[i], half_step, below));
        float twice = m[i] + m[i];
        float bent = no_larger(twice / (std::fabs(twice) + roots[i]) * form.full, end) + zero;
        places[i] = bent - zero;
        codes[i] = uint16_t((as<uint32_t>(levels[i]) << form.place_bits) + as<uint32_t>(bent));
    }

    // the update
    widen(t.weight, t.weights, first, count, w);
    if (t.residual) {
        read(t.residual + first, count, rest);
        for (int i = 0; i < BLOCK; i++) w[i] = as<float>(as<uint32_t>(w[i]) + uint32_t(rest[i] * 256));
    }
    for (int i = 0; i < BLOCK; i++) {
        float error = unbend(places[i], form.full) * roots[i] - m[i];
        float moved = m[i] * step.moves;
        float reach = std::max(std::fabs(moved * inverse[i]) * TRUST, LIMIT);
        float update = no_larger((moved - error * step.foresee) * inverse[i], reach);
        w[i] = w[i] * step.decay - update * step.lr;
    }
    narrow(w, random, t, first, count);
    write(codes, count, t.codes + first);
    t.scales[block] = int32_t(highest) * 16 | kind;
    return true;
}

}  // namespace

// With the threads that torch has already: they wait for work where a pool of our own would have to be woken, or would
// find torch's spinning in its place.
extern "C" void adam8_step(const Tensors* t, int32_t threads) {
    const Step step = *t->numbers;
    const int64_t blocks = (t->n + BLOCK - 1) / BLOCK;
    int32_t skipped = 0;
#pragma omp parallel for if (blocks >= WORTH_THREADS) num_threads(threads) schedule(dynamic, CHUNK) \
    reduction(+ : skipped)
    for (int64_t block = 0; block < blocks; block++) skipped += !step_block(*t, step, block);
    t->record->skipped += skipped;
}

// The random bits of some blocks, for steps that are not made here.
extern "C" void adam8_lanes(uint64_t group, const Record* at, uint64_t stream, uint16_t* random, int64_t blocks) {
    for (int64_t b = 0; b < blocks; b++) lanes(group + b * (BLOCK / 8), *at, stream, random + b * BLOCK);
}
