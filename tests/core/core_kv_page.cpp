// The arithmetic of a KV page's ranges and codes, and of its place in the cache: pure host
// functions, no CUDA headers.
#include "core_kv_page.h"

#include <pybind11/numpy.h>

#include "core/kv_page.h"
#include "cuda/inverse.h"
#include "ops/kv_attention/kv_attention_cuda.h"

namespace py = pybind11;

void define_kv_page(py::module_& m) {
  m.def("half_below", py::vectorize([](float x) { return resq::half_below<>(x).bits; }));
  m.def("half_above", py::vectorize([](float x) { return resq::half_above<>(x).bits; }));
  m.def("kv_code", py::vectorize([](float x, float offset, float inv_scale, int levels) {
          return resq::kv_code(x, {{}, {}, offset, inv_scale}, levels);
        }));
  m.def("cuda_inverse64", resq::cuda::inverse64);
  m.def("cuda_divide", [](int a, int64_t b) { return resq::cuda::Divisor(b).divide(a); });
  m.def("kv_split_tokens", [](int64_t visible) {
    return resq::cuda::attention::tier_split(resq::cuda::attention::tier_of(visible));
  });
  m.def("kv_split_count", resq::cuda::attention::split_count);
  // Of Llama-3-8B's heads: tokens of q, sequences, pages of 64 tokens of the cache and of a table.
  m.def("kv_state_capacity", [](int64_t tokens, int64_t sequences, int64_t pages, int64_t table) {
    resq::KvAttentionParams params{};
    params.n_q = 32, params.n_kv = 8, params.head_dim = 128;
    params.page_size = 64, params.max_pages = table;
    return resq::cuda::attention::kv_state_capacity({.params = params,
                                                     .seq_lens = nullptr,
                                                     .query_starts = nullptr,
                                                     .tokens = tokens,
                                                     .sequences = sequences,
                                                     .pages = pages});
  });
}
