// Which CUDA kernel a device and a shape run, for the tests: pure host functions, no CUDA headers.
#include "core_cuda_choice.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <exception>
#include <functional>
#include <iterator>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/arch.h"
#include "cuda/launch.h"
#include "cuda/once.h"
#include "ops/mixed_gemm/mixed_gemm_choice.h"
#include "ops/mixed_gemm/mixed_gemm_legal.h"
#include "ops/mixed_gemm/weight_prefetch.h"

namespace py = pybind11;

namespace {

std::vector<resq::cuda::MixedGemmTile> tiles(resq::cuda::MixedGemmKernel kernel) {
  using namespace resq::cuda;
  switch (kernel) {
    case MixedGemmKernel::kSmallM: return {std::begin(kSmallMTiles), std::end(kSmallMTiles)};
    case MixedGemmKernel::kSm80: return {std::begin(kSm80Tiles), std::end(kSm80Tiles)};
    default: return {std::begin(kSm90Tiles), std::end(kSm90Tiles)};
  }
}

// The M that a launcher of sm90 is instantiated for where the chosen tile has `m`.
int dispatched_m(int m) {
  int ran = 0;
  resq::cuda::with_tile<resq::cuda::kSm90Tiles>({m, 128, 1}, [&]<int kTileM>() { ran += kTileM; });
  return ran;
}

// First byte and bytes that each split of small_m prefetches of 64 rows of the weight.
std::vector<std::pair<int64_t, int64_t>> prefetched_spans(int64_t k_lo, int64_t k_hi, int splits,
                                                          int most_steps) {
  using namespace resq::cuda;
  const SplitK split_k =
      resq::cuda::split_k({1, 64, k_lo, k_hi, false}, MixedGemmKernel::kSmallM, splits);
  std::vector<std::pair<int64_t, int64_t>> spans;
  for (int split = 0; split < splits; ++split) {
    const ByteSpan span = prefetched_span(split_k, split, most_steps);
    spans.emplace_back(span.first, span.bytes);
  }
  return spans;
}

// What OncePer gives for the keys 0, 0, 1, 0 one after the other; -1 where `compute` throws.
std::vector<int> asked_once(const std::function<int(int)>& compute) {
  resq::cuda::OncePer<int, int> values;
  std::vector<int> got;
  for (const int key : {0, 0, 1, 0}) {
    try {
      got.push_back(values.get(key, [&] { return compute(key); }));
    } catch (const std::exception&) {
      got.push_back(-1);
    }
  }
  return got;
}

}  // namespace

void define_cuda_choice(py::module_& m) {
  using namespace resq::cuda;
  py::enum_<Family>(m, "CudaFamily")
      .value("UNSUPPORTED", Family::kUnsupported)
      .value("PORTABLE", Family::kPortable)
      .value("SM80", Family::kSm80)
      .value("SM90", Family::kSm90);
  py::enum_<MixedGemmKernel>(m, "MixedGemmKernel")
      .value("SMALL_M", MixedGemmKernel::kSmallM)
      .value("SM80", MixedGemmKernel::kSm80)
      .value("SM90", MixedGemmKernel::kSm90);
  py::class_<MixedGemmTile>(m, "MixedGemmTile")
      .def_readonly("m", &MixedGemmTile::m)
      .def_readonly("n", &MixedGemmTile::n)
      .def_readonly("min_blocks", &MixedGemmTile::min_blocks)
      .def_readonly("cluster_m", &MixedGemmTile::cluster_m)
      .def_readonly("cluster_n", &MixedGemmTile::cluster_n)
      .def_readonly("row_n", &MixedGemmTile::row_n)
      .def_readonly("most_splits", &MixedGemmTile::most_splits);
  py::class_<MixedGemmChoice>(m, "MixedGemmChoice")
      .def_readonly("kernel", &MixedGemmChoice::kernel)
      .def_readonly("tile", &MixedGemmChoice::tile)
      .def_property_readonly("splits", [](const MixedGemmChoice& c) { return c.split_k.splits; })
      .def_readonly("workspace_bytes", &MixedGemmChoice::workspace_bytes)
      .def("__str__", describe);
  py::class_<MixedGemmTuning>(m, "MixedGemmTuning")
      .def(py::init())
      .def_readwrite("memory_bytes", &MixedGemmTuning::memory_bytes)
      .def_readwrite("l2_bytes", &MixedGemmTuning::l2_bytes)
      .def_readwrite("mma_share", &MixedGemmTuning::mma_share)
      .def_readwrite("start", &MixedGemmTuning::start)
      .def_readwrite("small_m_start", &MixedGemmTuning::small_m_start)
      .def_readwrite("second_launch", &MixedGemmTuning::second_launch)
      .def_readwrite("sm90_exchange", &MixedGemmTuning::sm90_exchange);
  m.def("mixed_gemm_chip", [](int major, int minor, int sms, int memory_bits) {
    const MixedGemmChip* chip = mixed_gemm_chip({major, minor, sms, 0, memory_bits, 0});
    return chip ? chip->name : "";
  });
  m.def("mixed_gemm_tuning", [](int major, int minor, int sms, int memory_bits) {
    return mixed_gemm_tuning({major, minor, sms, 0, memory_bits, 0});
  });
  m.def("mixed_gemm_tiles", tiles);
  m.attr("SPLIT_CLUSTER_N") = kSplitClusterN;
  m.def("clusters_at_once", clusters_at_once);
  m.def("tile_clocks", [](int64_t rows, int64_t n, int64_t k_lo, int64_t k_hi, bool packed,
                          MixedGemmKernel kernel, const MixedGemmTile& tile, int splits,
                          const MixedGemmTuning& tuning) {
    const TileClocks c = tile_clocks({rows, n, k_lo, k_hi, packed}, kernel, tile, splits, tuning);
    return std::tuple(c.memory, c.second_level, c.shared, c.tensor_cores);
  });
  m.def(
      "mixed_gemm_time", [](int64_t rows, int64_t n, int64_t k_lo, int64_t k_hi, bool packed,
                            const MixedGemmChoice& choice, int sms, const MixedGemmTuning& tuning) {
        const MixedGemmTime time = mixed_gemm_time({rows, n, k_lo, k_hi, packed}, choice.kernel,
                                                   choice.tile, choice.split_k.splits, sms, tuning);
        return std::pair(time.clocks, limit_name(time.limit));
      });
  m.def("dispatched_m", dispatched_m);
  m.def("cuda_family", family);
  m.def("select_percent", select_percent);
  m.attr("DRIVERS_CARVEOUT") = kDriversCarveout;
  m.attr("PREFETCH_PERCENT") = kPrefetchPercent;
  m.def("prefetched_steps", prefetched_steps);
  m.def("prefetched_spans", prefetched_spans);
  m.def("asked_once", asked_once);
  m.def("weight_layout", weight_layout);
  m.def("packs_activations", packs_activations);
  m.def(
      "mixed_gemm_choice",
      [](int64_t rows, int64_t n, int64_t k_lo, int64_t k_hi, bool packed, Family family, int sms,
         const MixedGemmTuning& tuning) {
        return mixed_gemm_choice({rows, n, k_lo, k_hi, packed}, family, sms, tuning);
      },
      py::arg("rows"), py::arg("n"), py::arg("k_lo"), py::arg("k_hi"), py::arg("packed"),
      py::arg("family"), py::arg("sms"), py::arg("tuning") = MixedGemmTuning());
  m.def("legal_choices",
        [](int64_t rows, int64_t n, int64_t k_lo, int64_t k_hi, bool packed, Family family) {
          return legal_choices({rows, n, k_lo, k_hi, packed}, family);
        });
  m.def("legal_choice", [](const std::string& name, int64_t rows, int64_t n, int64_t k_lo,
                           int64_t k_hi, bool packed, Family family) {
    return legal_choice(name, {rows, n, k_lo, k_hi, packed}, family);
  });
  m.def("describe_legal",
        [](int64_t rows, int64_t n, int64_t k_lo, int64_t k_hi, bool packed, Family family) {
          return describe_legal({rows, n, k_lo, k_hi, packed}, family);
        });
}
