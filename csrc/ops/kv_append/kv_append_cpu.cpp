// kv_append on CPUs: checks, threads, the choice of the instruction set, the registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/isa.h"
#include "ops/kv_append/kv_append_args.h"

namespace resq {
namespace {

auto variant() {
  switch (cpu::vector_isa()) {
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
  const KvAppendCall call = kv_append_call(k, v, cos, sin, key_rotation, cache, slot_mapping,
                                           hi_bits, RopeForm::kFloat32);
  const KvAppendParams& params = call.params;
  check_slots(slot_mapping, params.slots);
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
