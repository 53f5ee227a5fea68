// The one CPU body of kv_dequantize. Included inside the namespace of an instruction set.

template <int kHeadDim>
inline constexpr KvRuns<kHeadDim> kRuns{};

using FourIVec = Vectors<4>::IVec;
using FourVec = Vectors<4>::Vec;

inline FourIVec load_words(const uint8_t* tile, int byte, int step) {
  return FourIVec{load_bits<int32_t>(tile + byte), load_bits<int32_t>(tile + byte + step),
                  load_bits<int32_t>(tile + byte + 2 * step),
                  load_bits<int32_t>(tile + byte + 3 * step)};
}

// Dequantizes row `t` of an octet of tokens. All lanes of a vector shift by the same count: SSE2
// has no other shifts, and 8-wide vectors with a shift per lane were no faster with AVX2 and four
// times slower without.
template <int kHeadDim, bool kKey>
inline void dequantize_row(const uint8_t* tile, const KvRun* runs, int t, const Half* ranges,
                           FloatType type, void* out, int64_t first) {
  const FourVec top = FourVec{} + (type == FloatType::kFloat16 ? kKvLargest : INFINITY);
  alignas(64) float x[kHeadDim];
  for (int run = 0; run < kHeadDim / 8; ++run) {
    const KvRun& r = runs[run];
    const bool high = 8 * run >= KvLayout<kHeadDim>::kLowDims;
    const int levels = high ? kKvHighLevels : kKvLowLevels;
    FourIVec codes[2];
    if constexpr (kKey) {
      const FourIVec words = load_words(tile, r.k(t, 0).word, r.step);
      const FourIVec even = words >> r.k(t, 0).shift & levels;
      const FourIVec odd = words >> r.k(t, 1).shift & levels;
      codes[0] = __builtin_shuffle(even, odd, FourIVec{0, 4, 1, 5});
      codes[1] = __builtin_shuffle(even, odd, FourIVec{2, 6, 3, 7});
    } else {
      for (int half = 0; half < 2; ++half) {
        const KvBits at = r.v(t, 4 * half);
        codes[half] = load_words(tile, at.word, 4 * r.step) >> at.shift & levels;
      }
    }
    const float scale = to_float(ranges[high ? 2 : 0]) / kKvScaleFactor;
    const float offset = to_float(ranges[high ? 3 : 1]);
    for (int half = 0; half < 2; ++half) {
      const FourVec value = __builtin_convertvector(codes[half], FourVec) * scale + offset;
      store_bits(x + 8 * run + 4 * half, value > top ? top : value);  // NaN stays NaN
    }
  }
  store_row(x, kHeadDim, type, out, first);
}

template <int kHeadDim>
inline void dequantize_item(const KvDequantizeParams& p, const KvDequantizeItem& item) {
  using Layout = KvLayout<kHeadDim>;
  const int64_t length = p.seq_lens[item.sequence];
  const int64_t end = std::min<int64_t>(item.first_token + Layout::kTileTokens, p.max_tokens);
  for (int64_t token = item.first_token; token < end; ++token) {
    const int64_t out = ((item.sequence * p.max_tokens + token) * p.n_kv + item.head) * kHeadDim;
    if (token >= length) {
      const int64_t bytes = float_bytes(p.type);
      for (void* rows : {p.k, p.v}) {
        __builtin_memset(static_cast<uint8_t*>(rows) + out * bytes, 0, kHeadDim * bytes);
      }
      continue;
    }
    const int64_t page = p.block_table[item.sequence * p.max_pages + token / p.page_size];
    const int64_t position = token % p.page_size;
    const auto in_tile = static_cast<int>(position % Layout::kTileTokens);
    const uint8_t* chunk =
        p.cache + (page * p.n_kv + item.head) * p.page_size * Layout::kTokenBytes;
    Half ranges[8];  // scale and offset of K low, K high, V low, V high
    static_assert(sizeof(ranges) == kKvMetadataBytes);
    __builtin_memcpy(ranges, chunk + kv_metadata_byte<kHeadDim>(p.page_size, position),
                     sizeof(ranges));
    const auto& runs = kRuns<kHeadDim>;
    const int octet = in_tile / 8, t = in_tile % 8;
    dequantize_row<kHeadDim, true>(chunk + kv_k_tile_byte<kHeadDim>(position), runs.k[octet], t,
                                   ranges, p.type, p.k, out);
    dequantize_row<kHeadDim, false>(chunk + kv_v_tile_byte<kHeadDim>(p.page_size, position),
                                    runs.v[octet], t, ranges + 4, p.type, p.v, out);
  }
}

void kv_dequantize_items(const KvDequantizeParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (p.head_dim == 128) {
      dequantize_item<128>(p, {p, static_cast<uint32_t>(i)});
    } else {
      dequantize_item<64>(p, {p, static_cast<uint32_t>(i)});
    }
  }
}
