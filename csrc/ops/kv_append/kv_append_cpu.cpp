// kv_append on CPUs: checks, threads, the choice of the instruction set, the registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/isa.h"
#include "ops/kv_append/kv_append.h"
#include "torch/kv_tensors.h"

namespace resq {
namespace {

auto variant() {
  switch (cpu::current_isa()) {
#if defined(__x86_64__)
    case cpu::Isa::kAvx512Vnni: return avx512vnni::kv_append_rows;
    case cpu::Isa::kAvx2: return avx2::kv_append_rows;
#endif
    default: return scalar::kv_append_rows;
  }
}

// Every slot lies inside the cache, or is negative.
void check_slots(const Tensor& slot_mapping, int64_t slots) {
  const int64_t* slot = slot_mapping.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < slot_mapping.size(0); ++t) {
    if (slot[t] < slots) continue;
    std::ostringstream expected, got;
    expected << "slots below " << slots << " (pages x page size), or negative to skip the token";
    got << slot[t] << " for token " << t;
    fail("kv_append", "slot_mapping", expected.str(), got.str());
  }
}

// Rows worth a thread of their own: each costs head_dim^2 multiplications or a few hundred
// instructions, so 16 are at least 5 us.
constexpr int64_t kGrainRows = 16;

void kv_append(const Tensor& k, const Tensor& v, const std::optional<Tensor>& cos,
               const std::optional<Tensor>& sin, const std::optional<Tensor>& key_rotation,
               Tensor cache, const Tensor& slot_mapping, int64_t hi_bits) {
  const char* op = "kv_append";
  check_heads(op, "k", k);
  const int64_t tokens = k.size(0), n_kv = k.size(1), head_dim = k.size(2);
  check_tensor(op, "v", v, {k.scalar_type()}, {tokens, n_kv, head_dim});
  const RopeRotation rope(op, cos, sin, key_rotation, tokens, n_kv, head_dim);
  const int64_t page_size = check_cache(op, cache, n_kv, head_dim);
  check_tensor(op, "slot_mapping", slot_mapping, {ScalarType::Long}, {tokens});
  if (hi_bits != 4 && hi_bits != 8) fail(op, "hi_bits", "4 or 8", std::to_string(hi_bits));
  check_slots(slot_mapping, cache.size(0) * page_size);

  const KvAppendParams params{.k = k.const_data_ptr(),
                              .v = v.const_data_ptr(),
                              .cos = RopeRotation::data(rope.cos),
                              .sin = RopeRotation::data(rope.sin),
                              .rotation = RopeRotation::data(rope.rotation),
                              .slot_mapping = slot_mapping.const_data_ptr<int64_t>(),
                              .cache = cache.mutable_data_ptr<uint8_t>(),
                              .type = float_type(op, "k", k),
                              .tokens = tokens,
                              .n_kv = n_kv,
                              .head_dim = head_dim,
                              .page_size = page_size,
                              .shared_rotation = rope.shared_rotation(),
                              .uniform = hi_bits == 4};
  const KvAppendGroups groups(params);
  if (groups.rows == 0 || groups.groups == 0) return;
  torch::stable::parallel_for(
      0, groups.groups * groups.rows, kGrainRows, [&](int64_t begin, int64_t end) {
        while (begin < end) {
          const int64_t group = begin / groups.rows, first = begin % groups.rows;
          const int64_t last = std::min(groups.rows, first + end - begin);
          variant()(params, group, first, last);
          begin += last - first;
        }
      });
}

}  // namespace
}  // namespace resq

STABLE_TORCH_LIBRARY_IMPL(resq, CPU, m) { m.impl("kv_append", TORCH_BOX(&resq::kv_append)); }
