// embedding on CPUs. A token's row takes a few microseconds of scalar code and the pass that
// follows milliseconds, so there is one variant.
#include "core/packed_weight.h"
#include "ops/embedding/embedding_torch.h"
#include "torch/cpu_device.h"

namespace resq {
namespace {

void convert(float value, float* to) { *to = value; }
void convert(float value, Half* to) { *to = to_half(value); }
void convert(float value, BFloat16* to) { *to = to_bfloat16(value); }

template <class T>
void row(const EmbeddingParams& p, int64_t index) {
  const int64_t id = p.ids[index], n = id % kPackedBlockN;
  const uint8_t* block = p.packed_weight + id / kPackedBlockN * packed_block_bytes(p.k_lo, p.k_hi);
  const float* scale = p.weight_scale + 2 * id;
  T* y = static_cast<T*>(p.y) + index * p.columns();
  for (int64_t k = 0; k < p.k_lo; ++k) {
    const int shift = packed_lo_is_high_nibble(k) ? 4 : 0;
    const int stored = block[packed_lo_byte(n, k)] >> shift & 15;
    convert(scale[0] * static_cast<float>(stored - kPackedOffsetLo), y + k);
  }
  for (int64_t k = 0; k < p.k_hi; ++k) {
    const int stored = block[packed_hi_byte(p.k_lo, n, k)];
    convert(scale[1] * static_cast<float>(stored - kPackedOffsetHi), y + p.k_lo + k);
  }
}

auto row_of(FloatType type) {
  switch (type) {
    case FloatType::kFloat32: return row<float>;
    case FloatType::kFloat16: return row<Half>;
    default: return row<BFloat16>;
  }
}

}  // namespace

void run(const Cpu& device, const EmbeddingParams& p) {
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.ids[i] >= 0 && p.ids[i] < p.n) continue;
    fail("embedding", "ids", "0 to " + std::to_string(p.n - 1), std::to_string(p.ids[i]));
  }
  device.log(cpu::Isa::kScalar);
  parallel_for(p.count, rows_per_thread(p.columns()), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) row_of(p.type)(p, index);
  });
}

}  // namespace resq

RESQ_IMPL(CPU, m) { m.impl("embedding", TORCH_BOX(&resq::embedding<resq::Cpu>)); }
