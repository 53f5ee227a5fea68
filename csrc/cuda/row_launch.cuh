// Which instance of a row kernel runs: by the numbers' type, the chunks a thread holds, and whether
// the row's chunks are aligned.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "core/quantize.h"
#include "cuda/launch.h"
#include "cuda/row_block.cuh"

namespace resq::cuda {

// Whether every chunk of every row lies in one part and is aligned, both in the rows that start at
// `rows` and in the codes.
inline bool chunks_aligned(const MixedRows& out, std::initializer_list<const void*> rows) {
  bool aligned = out.k_lo % kChunkColumns == 0 && out.k_hi % kChunkColumns == 0;
  for (const void* pointer : rows) aligned &= reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  return aligned;
}

// launch(T{}, held, aligned) with std::integral_constants; null `rows` count as aligned.
template <class Launch>
inline void launch_row_kernel(FloatType type, const MixedRows& out,
                              std::initializer_list<const void*> rows, Launch launch) {
  const int64_t chunks = ceil_div(out.k_lo + out.k_hi, kChunkColumns);
  const int64_t held = ceil_div(chunks, kRowThreads);
  const auto launch_type = [&](auto t) {
    using std::integral_constant;
    constexpr std::true_type kAligned;
    if (!chunks_aligned(out, rows)) {
      launch(t, integral_constant<int, 0>(), std::false_type());
    } else if (held <= 1) {
      launch(t, integral_constant<int, 1>(), kAligned);
    } else if (held <= 2) {
      launch(t, integral_constant<int, 2>(), kAligned);
    } else if (held <= 4) {
      launch(t, integral_constant<int, 4>(), kAligned);
    } else if (held <= 8) {
      launch(t, integral_constant<int, 8>(), kAligned);
    } else if (held <= kMostHeldChunks<decltype(t)>) {
      launch(t, integral_constant<int, kMostHeldChunks<decltype(t)>>(), kAligned);
    } else {
      launch(t, integral_constant<int, 0>(), kAligned);
    }
  };
  switch (type) {
    case FloatType::kFloat32: launch_type(0.0f); break;
    case FloatType::kFloat16: launch_type(Half{}); break;
    case FloatType::kBFloat16: launch_type(BFloat16{}); break;
  }
}

}  // namespace resq::cuda
