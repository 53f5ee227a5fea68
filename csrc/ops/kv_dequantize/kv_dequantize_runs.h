// Where the codes of eight neighbouring dims of a token lie in a tile, in so few numbers that a
// lane can keep them. The places of core/kv_page.h are regular inside eight tokens and eight dims,
// which kv_runs_agree proves. Computing them place by place cost a GPU 900 instructions for 16
// numbers instead of 140.
#pragma once

#include "core/kv_page.h"

namespace resq {

// A code is (32-bit word at byte `word` of the tile >> shift) & levels.
struct KvBits {
  int word, shift;
};
RESQ_HOST_DEVICE constexpr KvBits kv_bits(KvPlace place) {
  return {place.byte / 4 * 4, place.byte % 4 * 8 + place.shift};
}

// Code j = 0..7 of token t = 0..7. In K neighbouring dims share a word and neighbouring tokens are
// four lanes apart; in V it is the other way round.
struct alignas(8) KvRun {
  uint16_t word[2];
  uint8_t shift[2];
  uint8_t step;  // bytes between the words of neighbouring lanes
  uint8_t odd;   // V: shift of odd tokens beyond that of even ones

  RESQ_HOST_DEVICE constexpr KvBits k(int t, int j) const {
    return {word[0] + (4 * t + j / 2) * step, shift[j % 2]};
  }
  RESQ_HOST_DEVICE constexpr KvBits v(int t, int j) const {
    return {word[j / 4] + (j % 4 * 4 + t / 2) * step, shift[j / 4] + t % 2 * odd};
  }
};

template <int kHeadDim>
struct KvRuns {
  static constexpr int kOctets = KvLayout<kHeadDim>::kTileTokens / 8, kRuns = kHeadDim / 8;
  KvRun k[kOctets][kRuns] = {};
  KvRun v[kOctets][kRuns] = {};

  constexpr KvRuns() {
    for (int octet = 0; octet < kOctets; ++octet) {
      for (int run = 0; run < kRuns; ++run) {
        const auto key = [&](int j) {
          return kv_bits(kv_k_place<kHeadDim>(8 * octet, 8 * run + j));
        };
        k[octet][run] = make(key(0), key(1), key(2), 0);
        const auto value = [&](int t, int j) {
          return kv_bits(kv_v_place<kHeadDim>(8 * octet + t, 8 * run + j));
        };
        v[octet][run] =
            make(value(0, 0), value(0, 4), value(2, 0), value(1, 0).shift - value(0, 0).shift);
      }
    }
  }

  static constexpr KvRun make(KvBits first, KvBits second, KvBits next_lane, int odd) {
    return {{static_cast<uint16_t>(first.word), static_cast<uint16_t>(second.word)},
            {static_cast<uint8_t>(first.shift), static_cast<uint8_t>(second.shift)},
            static_cast<uint8_t>(next_lane.word - first.word),
            static_cast<uint8_t>(odd)};
  }
};

template <int kHeadDim>
constexpr bool kv_runs_agree() {
  constexpr KvRuns<kHeadDim> runs;
  const auto same = [](KvBits a, KvBits b) { return a.word == b.word && a.shift == b.shift; };
  for (int token = 0; token < KvLayout<kHeadDim>::kTileTokens; ++token) {
    for (int dim = 0; dim < kHeadDim; ++dim) {
      const KvRun& k = runs.k[token / 8][dim / 8];
      const KvRun& v = runs.v[token / 8][dim / 8];
      if (!same(k.k(token % 8, dim % 8), kv_bits(kv_k_place<kHeadDim>(token, dim)))) return false;
      if (!same(v.v(token % 8, dim % 8), kv_bits(kv_v_place<kHeadDim>(token, dim)))) return false;
    }
  }
  return true;
}
static_assert(kv_runs_agree<64>() && kv_runs_agree<128>());

}  // namespace resq
