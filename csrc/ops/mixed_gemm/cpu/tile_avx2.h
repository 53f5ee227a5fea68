// AVX2: vpmaddubsw multiplies unsigned nibbles of weights by signed activation codes and adds pairs
// of products in 16 bits. The sums stay in 16 bits for as many groups as they fit, since to widen
// them after every step would take half as many instructions again. An 8-bit weight code is two
// nibbles, each of which has sums of its own: 16 d_high + d_low.

inline constexpr int kTileM = mixed_gemm_tile_m(Isa::kAvx2);
inline constexpr bool kUsesLargest = true;
inline constexpr int64_t kPrefetchBytes = 0;

// Groups of 8 of K that a 16-bit sum holds: a step of 4 of K adds a pair of products, each at most
// 15 times the largest activation code, and a group has two steps.
constexpr int64_t exact_groups(int largest) { return 0x7fff / (2 * 2 * 15 * std::max(largest, 1)); }
static_assert(exact_groups(128) == 4 && exact_groups(8) == 68);

// Calls f with constants 0 to kCount - 1. Loops, even unrolled by pragma, leave g++ 12 with the
// sums on the stack, from where each step loads them and stores them back.
template <int kCount, class F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
  [&]<int... kI>(std::integer_sequence<int, kI...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, kI>()), ...);
  }(std::make_integer_sequence<int, kCount>());
}

// The instructions of a step are inline assembly, whose order g++ keeps. It would compute all
// products before the sums, and keep the mask, and has no registers for that.
// The attribute repeats the pragma for clang-tidy.
#define RESQ_AVX2 [[gnu::target("avx2"), gnu::always_inline]] inline
RESQ_AVX2 __m256i nibble_mask() {
  alignas(32) static constexpr uint64_t kMask[4] = {~0ull / 17, ~0ull / 17, ~0ull / 17, ~0ull / 17};
  __m256i mask;
  asm volatile("vmovdqa %1, %0" : "=x"(mask) : "m"(kMask));
  return mask;
}
// Products of unsigned codes and the signed ones of a word, added in pairs of 16 bits.
RESQ_AVX2 __m256i multiply(__m256i codes, __m256i word) {
  __m256i product;
  asm volatile("vpmaddubsw %1, %2, %0" : "=x"(product) : "x"(word), "x"(codes));
  return product;
}
RESQ_AVX2 __m256i add(__m256i sum, __m256i product) {
  asm volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(product));
  return sum;
}
#undef RESQ_AVX2

// Products of kM rows x kVectors x 8 of N: 4 of K, with one nibble of the weights at `bytes`.
// `sums` of 16 bits, weights, a word and a product or the mask are the 16 registers that there are.
template <int kM, int kVectors, bool kUpper, bool kFirst>
[[gnu::always_inline]] inline void add_step(const uint8_t* bytes, const int8_t* words,
                                            __m256i (&sums)[kM * kVectors]) {
  const __m256i mask = nibble_mask();
  __m256i codes[kVectors];
  unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes) + v);
    codes[v] = _mm256_and_si256(kUpper ? _mm256_srli_epi16(both, 4) : both, mask);
  });
  unrolled<kM>([&](auto m) __attribute__((always_inline)) {
    const __m256i word = _mm256_set1_epi32(load_bits<int32_t>(words + m * kPackedWordBytes));
    unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
      constexpr int kI = m * kVectors + v;
      const __m256i product = multiply(codes[v], word);
      sums[kI] = kFirst ? product : add(sums[kI], product);
    });
  });
}

// Adds the products of kM rows x kVectors x 8 of N to `sums`, of which `out` is the first: of a
// part of 4 bits, or of nibble kNibble of a part of 8. Groups are as many as 16 bits hold.
template <int kM, bool kHigh, int kNibble, int kVectors, class Prefetch>
inline void add_products(const uint8_t* weight, const int8_t* words, int64_t groups,
                         const Prefetch& prefetch, __m256i* out) {
  constexpr int64_t kHalf = kHigh ? kPackedWordBytes * kPackedBlockN : 0;
  constexpr bool kUpper = kHigh && kNibble == 1;
  constexpr int64_t kWords = kM * kPackedWordBytes;
  __m256i sums[kM * kVectors];
  prefetch(0);
  add_step<kM, kVectors, kUpper, true>(weight, words, sums);
  for (int64_t group = 1;; ++group) {
    add_step<kM, kVectors, kHigh ? kUpper : true, false>(weight + kHalf, words + kWords, sums);
    if (group == groups) break;
    weight += group_bytes(kHigh);
    words += 2 * kWords;
    prefetch(group);
    add_step<kM, kVectors, kUpper, false>(weight, words, sums);
  }
  const __m256i factor = _mm256_set1_epi16(kNibble ? 16 : 1);
  unrolled<kM * kVectors>([&](auto i) __attribute__((always_inline)) {
    __m256i& sum = out[i / kVectors * 4 + i % kVectors];
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(sums[i], factor));
  });
}

template <int kM, bool kHigh, class Prefetch>
inline void sum_products(const uint8_t* weight, const int8_t* words, int64_t groups, int largest,
                         const Prefetch& prefetch, uint32_t* out) {
  constexpr int kVectors = kM <= 2 ? 4 : 2;  // of 8 of N at once
  __m256i sums[kM * 4] = {};
  const int64_t most = exact_groups(largest);
  for (int64_t group = 0; group < groups; group += most) {
    const int64_t count = std::min(groups - group, most);
    const auto fetch = [&](int64_t i) { prefetch(group + i); };
    const auto nothing = [](int64_t) {};
    add_products<kM, kHigh, 0, kVectors>(weight, words, count, fetch, sums);
    if constexpr (kHigh) add_products<kM, true, 1, kVectors>(weight, words, count, nothing, sums);
    if constexpr (kVectors == 2) {
      const uint8_t* right = weight + 64;
      add_products<kM, kHigh, 0, 2>(right, words, count, nothing, sums + 2);
      if constexpr (kHigh) add_products<kM, true, 1, 2>(right, words, count, nothing, sums + 2);
    }
    weight += count * group_bytes(kHigh);
    words += count * kPackedGroupK * kM;
  }
  std::memcpy(out, sums, sizeof(sums));
}
