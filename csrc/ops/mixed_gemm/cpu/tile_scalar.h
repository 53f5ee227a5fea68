// Portable C++: what a machine without AVX2 runs, and the plainest statement of the two dots.

inline constexpr int kTileM = mixed_gemm_tile_m(Isa::kScalar);
inline constexpr bool kUsesLargest = false;
inline constexpr int64_t kPrefetchBytes = 0;

template <int kM, bool kHigh, class Prefetch>
void sum_products(const uint8_t* weight, const int8_t* words, int64_t groups, int,
                  const Prefetch& prefetch, uint32_t* out) {
  uint32_t sums[kM][kPackedBlockN] = {};
  for (int64_t group = 0; group < groups; ++group) {
    prefetch(group);
    for (int m = 0; m < kM; ++m) {
      const int8_t* q0 = words + m * kPackedWordBytes;
      const int8_t* q1 = words + (kM + m) * kPackedWordBytes;
      for (int n = 0; n < kPackedBlockN; ++n) {
        int32_t sum = 0;
        for (int j = 0; j < kPackedWordBytes; ++j) {
          const uint8_t byte = weight[4 * n + j];
          const int w0 = kHigh ? byte : byte & 15;
          const int w1 = kHigh ? weight[128 + 4 * n + j] : byte >> 4;
          sum += w0 * q0[j] + w1 * q1[j];
        }
        sums[m][n] += static_cast<uint32_t>(sum);
      }
    }
    weight += group_bytes(kHigh);
    words += kPackedGroupK * kM;
  }
  std::memcpy(out, sums, sizeof(sums));
}
