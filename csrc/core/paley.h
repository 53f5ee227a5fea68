// Which orders have a Hadamard matrix by Paley's constructions, the fields they are made of, and
// the signs of the matrices for kernels: as compile-time constants, or as a small table.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace resq {

inline constexpr int64_t kMaxPaleyOrder = 1024;

struct PrimePower {
  int64_t p;  // 0: not a prime power
  int k;
};

constexpr PrimePower prime_power(int64_t q) {
  if (q < 2) return {0, 0};
  int64_t p = 2;
  while (q % p != 0 && p * p <= q) ++p;
  if (q % p != 0) p = q;
  int k = 0;
  for (; q % p == 0; q /= p) ++k;
  return q == 1 ? PrimePower{p, k} : PrimePower{0, 0};
}

// 1 or 2: which of Paley's constructions gives this order (1 where both do); 0: none.
constexpr int paley_kind(int64_t order) {
  if (order < 4 || order % 4 != 0) return 0;
  const PrimePower first = prime_power(order - 1);
  if (first.p != 0 && (order - 1) % 4 == 3 && first.k <= 3) return 1;
  const PrimePower second = prime_power(order / 2 - 1);
  return second.p != 0 && (order / 2 - 1) % 4 == 1 && second.k <= 3 ? 2 : 0;
}

// Arithmetic of GF(p^k), k <= 3, on elements 0 .. p^k - 1 read as k digits of base p.
class GaloisField {
 public:
  constexpr GaloisField(int64_t p, int k)
      : p_(p), k_(k), q_(k == 1 ? p : (k == 2 ? p * p : p * p * p)) {
    // x^k = -poly(x): the first monic polynomial without a root, coefficients of x^0 first in
    // lexicographic order, is irreducible for k <= 3.
    for (int64_t index = 0; k > 1; ++index) {
      int64_t rest = index;
      for (int i = k - 1; i >= 0; --i, rest /= p) poly_[i] = rest % p;
      bool has_root = false;
      for (int64_t x = 0; x < p && !has_root; ++x) {
        int64_t value = 1;  // Horner, from the monic leading coefficient
        for (int i = k - 1; i >= 0; --i) value = (value * x + poly_[i]) % p;
        has_root = value == 0;
      }
      if (!has_root) break;
    }
  }

  constexpr int64_t order() const { return q_; }

  constexpr int64_t subtract(int64_t a, int64_t b) const {
    int64_t result = 0;
    for (int64_t weight = 1; weight < q_; weight *= p_) {
      result += (a / weight % p_ - b / weight % p_ + p_) % p_ * weight;
    }
    return result;
  }

  constexpr int64_t square(int64_t a) const {
    int64_t product[5] = {};
    for (int i = 0; i < k_; ++i) {
      for (int j = 0; j < k_; ++j) product[i + j] += digit(a, i) * digit(a, j);
    }
    for (int i = 2 * k_ - 2; i >= k_; --i) {
      for (int j = 0; j < k_; ++j) product[i - k_ + j] -= product[i] % p_ * poly_[j];
    }
    int64_t result = 0;
    for (int i = k_ - 1; i >= 0; --i) result = result * p_ + (product[i] % p_ + p_) % p_;
    return result;
  }

 private:
  constexpr int64_t digit(int64_t a, int i) const {
    for (; i > 0; --i) a /= p_;
    return a % p_;
  }

  int64_t p_;
  int k_;
  int64_t q_;
  int64_t poly_[3] = {};
};

// The signs of S = core + I (see PaleyFactor) as a table for a kernel's parameters: chi of the
// difference of two elements. Their base-p digits are subtracted without a borrow, so
// position(i) - position(j) indexes the table. Of the orders up to 1024, GF(7^3) needs the most
// bits: 13^3.
struct PaleySigns {
  int order, streams, rows;
  int p, q;
  uint32_t negative[(13 * 13 * 13 + 31) / 32];

  // 0 <= a < q
  RESQ_HOST_DEVICE constexpr int position(int a) const {
    int result = 0;
    for (int weight = 1; a > 0; a /= p, weight *= 2 * p - 1) result += a % p * weight;
    return result;
  }

  // Whether S[i, j] = -1, i and j below rows.
  RESQ_HOST_DEVICE constexpr bool subtracts(int i, int j) const {
    if (i == j || i == 0) return false;
    if (j == 0) return streams == 1;
    const int index = position(i - 1) - position(j - 1) + position(q - 1);
    return negative[index / 32] >> (index % 32) & 1;
  }
};

constexpr PaleySigns paley_signs(int64_t order) {
  const int streams = paley_kind(order), rows = static_cast<int>(order) / streams;
  const PrimePower power = prime_power(rows - 1);
  const GaloisField field(power.p, power.k);
  PaleySigns signs{static_cast<int>(order), streams, rows, static_cast<int>(power.p), rows - 1, {}};
  bool square[kMaxPaleyOrder] = {};
  for (int64_t a = 1; a < field.order(); ++a) square[field.square(a)] = true;
  for (int a = 0; a < signs.q; ++a) {
    for (int b = 0; b < signs.q; ++b) {
      if (square[field.subtract(a, b)]) continue;
      const int index = signs.position(a) - signs.position(b) + signs.position(signs.q - 1);
      signs.negative[index / 32] |= 1u << (index % 32);
    }
  }
  return signs;
}

// The same signs as constants: of each group of four inputs and each row, bit t says that input
// 4 g + t is subtracted.
template <int kOrder>
struct PaleyGroups {
  static constexpr int kStreams = paley_kind(kOrder);  // the construction
  static constexpr int kRows = kOrder / kStreams;
  static constexpr int kGroups = (kRows + 3) / 4;
  uint8_t entry[kGroups][kRows];
};

template <int kOrder>
constexpr PaleyGroups<kOrder> paley_groups() {
  const PaleySigns signs = paley_signs(kOrder);
  PaleyGroups<kOrder> groups{};
  for (int i = 0; i < signs.rows; ++i) {
    for (int j = 0; j < signs.rows; ++j) {
      if (signs.subtracts(i, j)) groups.entry[j / 4][i] |= 1 << (j % 4);
    }
  }
  return groups;
}

}  // namespace resq
