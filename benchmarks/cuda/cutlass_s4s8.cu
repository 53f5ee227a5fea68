// The product that CUTLASS 4.2 offers for 4-bit weights and 8-bit activations on sm_90a: the
// collective builder's mixed-input main loop, unchanged. `resq bench gemm` compares its time with
// that of mixed_gemm, which does more: 8-bit columns and zero points.
//
//   y[m, n] = bf16(sum_k weight[n, k] * x[m, k] * weight_scale[n] * row_scale[m])
//
// D = W X^T: the narrow operand has to be A, which wgmma reads from registers.
#include <cstdint>

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace {

using cute::_1;
using cute::_128;
using cute::_2;
using cute::Int;
using cute::Shape;
using cute::Stride;

using Weight = cutlass::int4b_t;
using Code = int8_t;
using Out = cutlass::bfloat16_t;

// TMA's alignments, 16 bytes each: K is a multiple of kWeightAlignment, N of kOutAlignment.
constexpr int kWeightAlignment = 32, kCodeAlignment = 16, kOutAlignment = 8;

// Multiplies the sums by one scale per weight row (a row of D), then by one per token (a column).
template <class Tile>
struct Scales {
  template <class Left, class Right, class Result>
  using Times = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::multiplies, Result, float,
                                             cutlass::FloatRoundStyle::round_to_nearest>,
      Left, Right>;
  using OfWeight = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, float, float,
                                                               Stride<_1, cute::_0, int64_t>>;
  using OfToken = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float, float,
                                                              Stride<cute::_0, _1, int64_t>>;
  using Tree = Times<OfToken, Times<OfWeight, cutlass::epilogue::fusion::Sm90AccFetch, float>, Out>;
};

// Tiles of 128 weights by kTokens tokens, two warpgroups; two blocks share the tokens. Stream-K
// splits K where there are fewer tiles than multiprocessors, or a last wave with few of them.
template <int kTokens>
struct Product {
  using Tile = Shape<_128, Int<kTokens>, _128>;
  using Cluster = Shape<_2, _1, _1>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void,
      cutlass::layout::ColumnMajor, kOutAlignment, Out, cutlass::layout::ColumnMajor, kOutAlignment,
      cutlass::epilogue::TmaWarpSpecializedCooperative, typename Scales<Tile>::Tree>::CollectiveOp;
  using MainLoop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Weight, cutlass::layout::RowMajor,
      kWeightAlignment, Code, cutlass::layout::ColumnMajor, kCodeAlignment, int32_t, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<cutlass::gemm::kernel::GemmUniversal<
      Shape<int, int, int, int>, MainLoop, Epilogue, cutlass::gemm::StreamKScheduler>>;
};

// Calls `use` with the configuration for m tokens, as a null pointer to its adapter. The widest
// tile makes the most of a converted weight, but half of it is empty for 128 tokens.
template <class Use>
auto choose(int m, const Use& use) {
  if (m <= 64) return use(static_cast<Product<32>::Gemm*>(nullptr));
  if (m <= 128) return use(static_cast<Product<128>::Gemm*>(nullptr));
  return use(static_cast<Product<256>::Gemm*>(nullptr));
}

struct Call {
  const void *weight, *x;
  const float *weight_scale, *row_scale;
  void* y;
  int m, n, k;

  template <class Gemm>
  typename Gemm::Arguments arguments() const {
    cutlass::KernelHardwareInfo device;
    cudaGetDevice(&device.device_id);
    device.sm_count =
        cutlass::KernelHardwareInfo::query_device_multiprocessor_count(device.device_id);
    typename Gemm::Arguments all{cutlass::gemm::GemmUniversalMode::kGemm, {n, m, k, 1}};
    all.mainloop = {static_cast<const Weight*>(weight),
                    {k, _1{}, 0},
                    static_cast<const Code*>(x),
                    {k, _1{}, 0}};
    all.epilogue.thread = {{row_scale}, {{weight_scale}, {}, {}}, {}};
    all.epilogue.dC = {_1{}, n, 0};
    all.epilogue.ptr_D = static_cast<Out*>(y);
    all.epilogue.dD = {_1{}, n, 0};
    all.hw_info = device;
    return all;
  }
};

}  // namespace

#pragma GCC visibility push(default)

// Bytes of workspace that a call needs.
extern "C" int64_t cutlass_s4s8_workspace(int m, int n, int k) {
  const Call call{nullptr, nullptr, nullptr, nullptr, nullptr, m, n, k};
  return choose(m, [&]<class Gemm>(Gemm*) {
    return static_cast<int64_t>(Gemm::get_workspace_size(call.arguments<Gemm>()));
  });
}

// Launches one product on `stream`; returns 0, or a code that cutlass_s4s8_error explains.
// weight: [n, k] int4, two a byte, the even column in the low bits. x: [m, k] int8.
// weight_scale: [n], row_scale: [m]. y: [m, n] bf16. Every pointer is aligned to 16 bytes.
extern "C" int cutlass_s4s8_launch(const void* weight, const void* x, const float* weight_scale,
                                   const float* row_scale, void* y, int m, int n, int k,
                                   void* workspace, void* stream) {
  const Call call{weight, x, weight_scale, row_scale, y, m, n, k};
  return choose(m, [&]<class Gemm>(Gemm*) {
    const auto arguments = call.arguments<Gemm>();
    cutlass::Status status = Gemm::can_implement(arguments);
    if (status == cutlass::Status::kSuccess) {
      status = Gemm().run(arguments, workspace, static_cast<cudaStream_t>(stream));
    }
    return static_cast<int>(status);
  });
}

extern "C" const char* cutlass_s4s8_error(int code) {
  return cutlassGetStatusString(static_cast<cutlass::Status>(code));
}

#pragma GCC visibility pop
