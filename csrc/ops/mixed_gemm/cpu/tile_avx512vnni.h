// AVX-512 VNNI: vpdpbusd multiplies four unsigned weight codes by four signed activation codes and
// adds them to an int32 without saturation.

// 12 rows x 2 vectors of sums, 2 vectors of weights as loaded, 2 of codes, the nibble mask and a
// word: 30 of the 32 registers.
inline constexpr int kTileM = mixed_gemm_tile_m(Isa::kAvx512Vnni);
inline constexpr bool kUsesLargest = false;

// Hardware prefetchers stop at the end of a page of 4 KB. Zen 5, one row: 10 to 20 % faster with 3
// or 4 KB, slower again from 8 KB on (docs/notes/0024).
inline constexpr int64_t kPrefetchBytes = 3072;

// Every loop over sums is unrolled by pragma: g++ 12 otherwise decides too late that the array can
// live in registers, and stores all sums to the stack in every step (135 instead of 210 G products
// a second with 12 rows).
template <int kM>
class Tile {
 public:
  Tile() {
#pragma GCC unroll 2
    for (int chain = 0; chain < kChains; ++chain) {
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) sums_[chain][m][v] = _mm512_setzero_si512();
      }
    }
  }

  // Columns 0-3 of the group for all rows, then columns 4-7: with the codes of both halves in
  // registers at once, 12 rows do not fit.
  template <bool kHigh>
  void add_group(const uint8_t* weight, const int8_t* words) {
    const __m512i nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i codes[2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        if constexpr (kHigh) {
          codes[v] = _mm512_loadu_si512(weight + (2 * half + v) * 64);
        } else {
          const __m512i bytes = _mm512_loadu_si512(weight + v * 64);
          codes[v] = _mm512_and_si512(half ? _mm512_srli_epi16(bytes, 4) : bytes, nibble);
        }
      }
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) {
        int32_t bits;
        std::memcpy(&bits, words + (half * kM + m) * kPackedWordBytes, sizeof(bits));
        const __m512i word = _mm512_set1_epi32(bits);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          __m512i& sum = sums_[half % kChains][m][v];
          sum = _mm512_dpbusd_epi32(sum, codes[v], word);
        }
      }
    }
  }

  void store(uint32_t* out) const {
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        __m512i sum = sums_[0][m][v];
        if constexpr (kChains == 2) sum = _mm512_add_epi32(sum, sums_[1][m][v]);
        _mm512_storeu_si512(out + m * kPackedBlockN + 16 * v, sum);
      }
    }
  }

 private:
  // vpdpbusd has a latency of 4 cycles: one row needs two chains of sums to issue one a cycle.
  static constexpr int kChains = kM == 1 ? 2 : 1;
  __m512i sums_[kChains][kM][2];
};

template <int kM, bool kHigh, class Prefetch>
inline void sum_products(const uint8_t* weight, const int8_t* words, int64_t groups, int,
                         const Prefetch& prefetch, uint32_t* out) {
  Tile<kM> tile;
  for (int64_t group = 0; group < groups; ++group) {
    prefetch(group);
    tile.template add_group<kHigh>(weight, words);
    weight += group_bytes(kHigh);
    words += kPackedGroupK * kM;
  }
  tile.store(out);
}
