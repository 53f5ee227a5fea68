// Hadamard matrices of every order that Llama and Qwen2.5 MLPs need, constructed by the rule of
// resq_kernels/hadamard.py: n = m_1 <= m_2 <= ... times 2^a, m_i orders of Paley's constructions.
// tests/core compares the two bit for bit.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "core/host_device.h"

namespace resq {

inline constexpr int64_t kMaxPaleyOrder = 1024;

struct PrimePower {
  int64_t p;  // 0: not a prime power
  int k;
};

inline PrimePower prime_power(int64_t q) {
  if (q < 2) return {0, 0};
  int64_t p = 2;
  while (q % p != 0 && p * p <= q) ++p;
  if (q % p != 0) p = q;
  int k = 0;
  for (; q % p == 0; q /= p) ++k;
  return q == 1 ? PrimePower{p, k} : PrimePower{0, 0};
}

// 1 or 2: which of Paley's constructions gives this order (1 where both do); 0: none.
inline int paley_kind(int64_t order) {
  if (order < 4 || order % 4 != 0) return 0;
  const PrimePower first = prime_power(order - 1);
  if (first.p != 0 && (order - 1) % 4 == 3 && first.k <= 3) return 1;
  const PrimePower second = prime_power(order / 2 - 1);
  return second.p != 0 && (order / 2 - 1) % 4 == 1 && second.k <= 3 ? 2 : 0;
}

// Arithmetic of GF(p^k), k <= 3, on elements 0 .. p^k - 1 read as k digits of base p.
class GaloisField {
 public:
  GaloisField(int64_t p, int k) : p_(p), k_(k), q_(k == 1 ? p : (k == 2 ? p * p : p * p * p)) {
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

  int64_t order() const { return q_; }

  int64_t subtract(int64_t a, int64_t b) const {
    int64_t result = 0;
    for (int64_t weight = 1; weight < q_; weight *= p_) {
      result += (a / weight % p_ - b / weight % p_ + p_) % p_ * weight;
    }
    return result;
  }

  int64_t square(int64_t a) const {
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
  int64_t digit(int64_t a, int i) const {
    for (; i > 0; --i) a /= p_;
    return a % p_;
  }

  int64_t p_;
  int k_;
  int64_t q_;
  int64_t poly_[3] = {};
};

// Row-major square matrix of signs.
struct SignMatrix {
  int64_t size;
  std::vector<int8_t> at;  // [size, size], +1, -1 or 0
};

// The core of Paley's construction of `order`: with Q[a, b] = chi(a - b) over GF(q), construction I
// (q = order - 1) [[0, 1], [-1, Q]], construction II (q = order / 2 - 1) [[0, 1], [1, Q]]. Its
// diagonal is 0. `order` must have a paley_kind.
inline SignMatrix paley_core(int64_t order) {
  const int kind = paley_kind(order);
  const PrimePower power = prime_power(kind == 1 ? order - 1 : order / 2 - 1);
  const GaloisField field(power.p, power.k);
  const int64_t q = field.order(), size = q + 1;
  std::vector<int8_t> chi(q, -1);
  chi[0] = 0;
  for (int64_t a = 1; a < q; ++a) chi[field.square(a)] = 1;
  SignMatrix core{size, std::vector<int8_t>(size * size, 0)};
  for (int64_t i = 0; i < q; ++i) {
    core.at[i + 1] = 1;
    core.at[(i + 1) * size] = kind == 1 ? -1 : 1;
    for (int64_t j = 0; j < q; ++j) {
      core.at[(i + 1) * size + j + 1] = chi[field.subtract(i, j)];
    }
  }
  return core;
}

// core + I: all of a construction I; for construction II see PaleyFactor.
inline SignMatrix paley_core_plus_identity(int64_t order) {
  SignMatrix matrix = paley_core(order);
  for (int64_t i = 0; i < matrix.size; ++i) matrix.at[i * matrix.size + i] = 1;
  return matrix;
}

// The Hadamard matrix of a Paley order: core + I, or for construction II
// core (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]].
inline SignMatrix paley_matrix(int64_t order) {
  if (paley_kind(order) == 1) return paley_core_plus_identity(order);
  const SignMatrix core = paley_core(order);
  SignMatrix matrix{order, std::vector<int8_t>(order * order)};
  for (int64_t i = 0; i < order; ++i) {
    for (int64_t j = 0; j < order; ++j) {
      const int8_t c = core.at[(i / 2) * core.size + j / 2];
      const bool both_odd = i % 2 == 1 && j % 2 == 1;
      matrix.at[i * order + j] = c != 0 ? (both_odd ? -c : c) : (i % 2 + j % 2 == 0 ? 1 : -1);
    }
  }
  return matrix;
}

// The cheapest factorization of n: Paley orders ascending, then the power of two; empty if none.
// Cost is the sum of the Paley orders, ties go to the lexicographically smallest list.
inline std::vector<int64_t> hadamard_factors(int64_t n) {
  struct Search {
    std::vector<int64_t> chosen, best;
    int64_t best_cost = -1;

    void run(int64_t rest, int64_t smallest) {
      if ((rest & (rest - 1)) == 0) {
        std::vector<int64_t> candidate = chosen;
        candidate.push_back(rest);
        int64_t cost = 0;
        for (int64_t order : chosen) cost += order;
        if (best_cost < 0 || cost < best_cost || (cost == best_cost && candidate < best)) {
          best_cost = cost;
          best = candidate;
        }
        return;
      }
      const int64_t last = rest < kMaxPaleyOrder ? rest : kMaxPaleyOrder;
      for (int64_t order = smallest; order <= last; order += 4) {
        if (rest % order != 0 || (order & (order - 1)) == 0 || paley_kind(order) == 0) continue;
        chosen.push_back(order);
        run(rest / order, order);
        chosen.pop_back();
      }
    }
  } search;
  if (n >= 1) search.run(n, 12);
  return search.best;
}

// How the kernels multiply by a Paley factor: on tiles of kPaleyTile columns, with S = core + I.
//   Construction I, one stream: y = S x.
//   Construction II, two streams of half the size: with a_i = x_2i and b_i = x_2i+1,
//     y_2i = (S (a + b))_i - 2 b_i,   y_2i+1 = (S (a - b))_i - 2 a_i.
// S is applied to four inputs at a time: for each group of four the 16 sums +-u0 +-u1 +-u2 +-u3 are
// tabulated, of which every row of S then adds one. That is rows / 4 additions per output instead
// of rows, and every table is reused by all rows.
inline constexpr int64_t kPaleyTile = 16;    // columns: one cache line of float32
inline constexpr int64_t kPaleyTables = 16;  // held at once: 16 KB, half of a first-level cache

struct PaleyFactor {
  int64_t order;
  int64_t streams;  // 1 or 2: the construction
  int64_t rows;     // of S: order / streams
  int64_t groups;   // of four inputs, the last one filled up with zeros
  // [rows, groups]: where the row's sum of the group starts in the floats
  // [kPaleyTables / streams groups, streams, 16 entries, kPaleyTile], for the first stream.
  // Bit t of the entry's number: u_t is subtracted.
  std::vector<uint16_t> table_offsets;

  int64_t groups_at_once() const { return kPaleyTables / streams; }
};

inline PaleyFactor paley_factor(int64_t order) {
  const SignMatrix signs = paley_core_plus_identity(order);
  PaleyFactor factor{order, order / signs.size, signs.size, ceil_div(signs.size, 4), {}};
  factor.table_offsets.resize(factor.rows * factor.groups);
  for (int64_t i = 0; i < factor.rows; ++i) {
    for (int64_t g = 0; g < factor.groups; ++g) {
      int64_t entry = 0;
      for (int64_t j = 4 * g; j < 4 * g + 4 && j < factor.rows; ++j) {
        entry |= (signs.at[i * factor.rows + j] < 0 ? 1 : 0) << (j % 4);
      }
      const int64_t table = g % factor.groups_at_once() * factor.streams;
      factor.table_offsets[i * factor.groups + g] =
          static_cast<uint16_t>((table * 16 + entry) * kPaleyTile);
    }
  }
  return factor;
}

// H = kron(paley[0], paley[1], ..., Sylvester(power)) / sqrt(n).
struct HadamardPlan {
  int64_t n;
  int64_t power;                                          // the inner power of two
  std::vector<std::shared_ptr<const PaleyFactor>> paley;  // outside first
};

// The plan of size n, built at its first use and kept; null where n has no factorization. Safe to
// call from several threads.
inline const HadamardPlan* hadamard_plan(int64_t n) {
  static std::mutex mutex;
  static std::map<int64_t, std::unique_ptr<const HadamardPlan>> plans;
  static std::map<int64_t, std::shared_ptr<const PaleyFactor>> factors;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(n);
  if (found != plans.end()) return found->second.get();
  const std::vector<int64_t> orders = hadamard_factors(n);
  if (orders.empty()) return nullptr;
  auto plan = std::make_unique<HadamardPlan>();
  plan->n = n;
  plan->power = orders.back();
  for (size_t i = 0; i + 1 < orders.size(); ++i) {
    auto& factor = factors[orders[i]];
    if (!factor) {
      factor = std::make_shared<PaleyFactor>(paley_factor(orders[i]));
    }
    plan->paley.push_back(factor);
  }
  return plans.emplace(n, std::move(plan)).first->second.get();
}

}  // namespace resq
