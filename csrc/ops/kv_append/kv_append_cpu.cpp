// kv_append on CPUs: checks, threads, the choice of the instruction set, the registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "ops/kv_append/kv_append_args.h"
#include "torch/cpu_call.h"

#define RESQ_ISA_BODY "ops/kv_append/kv_append_body.h"
#include "cpu/foreach_isa.h"

namespace resq {
namespace {

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

void for_rows(const KvAppendParams& params, const KvAppendGroups& of,
              void (*run)(const KvAppendParams&, int64_t, int64_t, int64_t)) {
  if (of.rows == 0) return;
  torch::stable::parallel_for(0, of.groups * of.rows, kGrainRows, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t group = begin / of.rows, first = begin % of.rows;
      const int64_t last = std::min(of.rows, first + end - begin);
      run(params, group, first, last);
      begin += last - first;
    }
  });
}

Tensor kv_append(const Tensor& k, const Tensor& v, const std::optional<Tensor>& cos,
                 const std::optional<Tensor>& sin, const std::optional<Tensor>& key_rotation,
                 Tensor cache, const Tensor& slot_mapping, int64_t hi_bits,
                 const std::optional<Tensor>& q) {
  const KvAppendCall call = kv_append_call(k, v, cos, sin, key_rotation, cache, slot_mapping,
                                           hi_bits, q, RopeForm::kFloat32);
  check_slots(slot_mapping, call.params.slots);
  const KvAppendParams& params = call.params;
  if (params.n_kv == 0) return call.rotated_q;
  log_cpu_kernel("kv_append");
  for_rows(params, KvAppendGroups(params, params.n_kv), RESQ_ISA_CHOOSE(kv_append_rows));
  for_rows(params, KvAppendGroups(params, params.n_q), RESQ_ISA_CHOOSE(kv_rotate_queries));
  return call.rotated_q;
}

}  // namespace
}  // namespace resq

STABLE_TORCH_LIBRARY_IMPL(resq, CPU, m) { m.impl("kv_append", TORCH_BOX(&resq::kv_append)); }
