// Which instance of a row kernel runs: by the numbers' type, the chunks a thread holds, and whether
// the row's chunks are aligned.
#pragma once

#include <initializer_list>
#include <iterator>
#include <type_traits>
#include <utility>

#include "core/quantize.h"
#include "cuda/launch.h"
#include "cuda/row_block.cuh"
#include "cuda/with_type.h"

namespace resq::cuda {

// Whether every chunk of every row lies in one part and is aligned, both in the rows that start at
// `rows` and in the codes.
inline bool chunks_aligned(const MixedRows& out, std::initializer_list<const void*> rows) {
  bool aligned = out.k_lo % kChunkColumns == 0 && out.k_hi % kChunkColumns == 0;
  for (const void* pointer : rows) aligned &= reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  return aligned;
}

// Whether the instance that holds kHeld chunks is the one for rows of `held` chunks a thread, which
// it then launches.
template <int kHeld, class T, class Launch>
inline bool launch_if_held(T t, int64_t held, Launch launch) {
  if (held > kHeld) return false;
  launch(t, std::integral_constant<int, kHeld>(), std::true_type());
  return true;
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
      return;
    }
    const bool launched = [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
      return (launch_if_held<kHeldCounts<decltype(t)>[kIndex]>(t, held, launch) || ...);
    }(std::make_index_sequence<std::size(kHeldCounts<decltype(t)>)>());
    if (!launched) launch(t, integral_constant<int, 0>(), kAligned);
  };
  with_type(type, launch_type);
}

}  // namespace resq::cuda
