// Hadamard matrices of every order that Llama and Qwen2.5 MLPs need, constructed by the rule of
// resq_kernels/hadamard.py: n = m_1 <= m_2 <= ... times 2^a, m_i orders of Paley's constructions.
// tests/core compares the two bit for bit.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "core/host_device.h"
#include "core/paley.h"

namespace resq {

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
          best = std::move(candidate);
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
// tabulated, and every row of S adds one of them. That is rows / 4 additions per output instead of
// rows, and all rows reuse each table.
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
