#include "ops/kv_dequantize/kv_dequantize_runs.h"
#include "ops/kv_dequantize/kv_dequantize_torch.h"
#include "torch/cpu_device.h"

#define RESQ_ISA_BODY "ops/kv_dequantize/kv_dequantize_body.h"
#include "cpu/foreach_isa.h"

namespace resq {
namespace {

// Checks that every length fits max_tokens and its row of the block table, and that every page it
// uses exists.
void check_lengths(const KvDequantizeParams& p) {
  const auto refuse = [](const char* argument, const std::string& expected, int64_t got,
                         const char* of, int64_t sequence) {
    fail("kv_dequantize", argument, expected,
         std::to_string(got) + " for " + of + std::to_string(sequence));
  };
  const int64_t room = std::min(p.max_tokens, p.max_pages * p.page_size);
  for (int64_t s = 0; s < p.sequences; ++s) {
    const int64_t length = p.seq_lens[s];
    if (length < 0 || length > room) {
      refuse("seq_lens",
             "0 to " + std::to_string(room) +
                 " tokens (the smaller of max_tokens and block_table's pages x page size)",
             length, "sequence ", s);
    }
    for (int64_t i = 0; i * p.page_size < length; ++i) {
      const int32_t page = p.block_table[s * p.max_pages + i];
      if (page < 0 || page >= p.pages) {
        refuse("block_table", "pages from 0 to " + std::to_string(p.pages - 1), page,
               "a page of sequence ", s);
      }
    }
  }
}

}  // namespace

void run(const Cpu& device, const KvDequantizeParams& p) {
  check_lengths(p);
  if (p.n_kv == 0) return;
  device.log();
  const auto kernel = RESQ_ISA_CHOOSE(kv_dequantize_items);
  constexpr int64_t kGrainItems = 4;  // an item is 4096 numbers, about 2 us with AVX2
  parallel_for(p.items(), kGrainItems, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace resq

RESQ_IMPL(CPU, m) { m.impl("kv_dequantize", TORCH_BOX(&resq::kv_dequantize<resq::Cpu>)); }
