#include "ops/kv_append/kv_append_torch.h"
#include "torch/cpu_device.h"

#define RESQ_ISA_BODY "ops/kv_append/kv_append_body.h"
#include "cpu/foreach_isa.h"

namespace resq {
namespace {

// Checks that every slot lies inside the cache or is negative.
void check_slots(const KvAppendParams& p) {
  for (int64_t t = 0; t < p.tokens; ++t) {
    if (p.slot_mapping[t] < p.slots) continue;
    std::ostringstream expected, got;
    expected << "slots below " << p.slots << " (pages x page size), or negative to skip the token";
    got << p.slot_mapping[t] << " for token " << t;
    fail("kv_append", "slot_mapping", expected.str(), got.str());
  }
}

// Rows worth a thread of their own: each costs head_dim^2 multiplications or a few hundred
// instructions, so 16 are at least 5 us.
constexpr int64_t kGrainRows = 16;

void for_rows(const KvAppendParams& params, const KvAppendGroups& of,
              void (*run)(const KvAppendParams&, int64_t, int64_t, int64_t)) {
  if (of.rows == 0) return;
  parallel_for(of.groups * of.rows, kGrainRows, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t group = begin / of.rows, first = begin % of.rows;
      const int64_t last = std::min(of.rows, first + end - begin);
      run(params, group, first, last);
      begin += last - first;
    }
  });
}

}  // namespace

void run(const Cpu& device, const KvAppendParams& p) {
  check_slots(p);
  if (p.n_kv == 0) return;
  device.log();
  for_rows(p, KvAppendGroups(p, p.n_kv), RESQ_ISA_CHOOSE(kv_append_rows));
  for_rows(p, KvAppendGroups(p, p.n_q), RESQ_ISA_CHOOSE(kv_rotate_queries));
}

}  // namespace resq

RESQ_IMPL(CPU, m) { m.impl("kv_append", TORCH_BOX(&resq::kv_append<resq::Cpu>)); }
