// decoder_layers between torch and the operators of a layer: checks, the operator of any device.
#pragma once

#include <tuple>

#include "ops/decoder_layers/decoder_layers.h"
#include "ops/kv_append/kv_append_torch.h"
#include "ops/kv_attention/kv_attention_torch.h"
#include "ops/mixed_gemm/mixed_gemm_torch.h"
#include "ops/mixed_quantize/mixed_quantize_torch.h"
#include "ops/rms_norm_quantize/rms_norm_quantize_torch.h"
#include "ops/silu_mul_hadamard_quantize/silu_mul_hadamard_quantize_torch.h"

namespace resq {

// The weights of one layer, as `decoder_layers` takes them.
class DecoderLayer {
 public:
  DecoderLayer(const std::vector<std::optional<Tensor>>& weights, int64_t layer)
      : weights_(weights.data() + layer * kDecoderLayerWeights),
        first_(layer * kDecoderLayerWeights) {}

  const std::optional<Tensor>& optional(int64_t at) const { return weights_[at]; }
  const Tensor& operator[](int64_t at) const {
    const std::optional<Tensor>& found = weights_[at];
    if (!found) fail("decoder_layers", name(at).c_str(), "a tensor", "None");
    return *found;
  }
  // Rows of a linear.
  int64_t rows(int64_t linear) const {
    const Tensor& scale = (*this)[linear + kWeightScale];
    check_tensor("decoder_layers", name(linear + kWeightScale).c_str(), scale, {ScalarType::Float},
                 {kAnySize, 2});
    return scale.size(0);
  }
  std::string name(int64_t at) const { return "weights[" + std::to_string(first_ + at) + "]"; }

 private:
  const std::optional<Tensor>* weights_;
  int64_t first_;
};

// What the layers of a call have in common.
struct DecoderShape {
  int64_t hidden, head_dim, n_q, n_kv, intermediate;
};

// Of the first layer; check_decoder_layer compares the others with it.
inline DecoderShape decoder_shape(const Tensor& x, const Tensor& cos, const Tensor& cache,
                                  const DecoderLayer& layer) {
  const char* op = "decoder_layers";
  check_tensor(op, "x", x, float_dtypes(), {kAnySize, kAnySize});
  check_tensor(op, "cos", cos, float_dtypes(), {x.size(0), kAnySize});
  if (cache.dim() != 3) fail(op, "caches[0]", "3 dimensions", describe(cache));
  const int64_t head_dim = cos.size(1), n_kv = cache.size(1);
  const int64_t n_q = (head_dim == 0 ? 0 : layer.rows(kQkv) / head_dim) - 2 * n_kv;
  if (n_q <= 0) {
    fail(op, layer.name(kQkv + kWeightScale).c_str(),
         "rows of queries before those of " + std::to_string(n_kv) + " keys and values of " +
             std::to_string(head_dim),
         describe(layer[kQkv + kWeightScale]));
  }
  return {x.size(1), head_dim, n_q, n_kv, layer.rows(kGateUp) / 2};
}

// The tensors that all layers share, which the first layer's operators check one after another.
inline void check_decoder_batch(const Tensor& x, const Tensor& cos, const Tensor& sin,
                                const Tensor& slot_mapping, const Tensor& block_table,
                                const Tensor& seq_lens, const Tensor& query_starts) {
  const char* op = "decoder_layers";
  check_tensor(op, "sin", sin, float_dtypes(), sizes_of(cos));
  check_tensor(op, "slot_mapping", slot_mapping, {ScalarType::Long}, {x.size(0)});
  check_sequences(op, block_table, seq_lens, query_starts);
  const struct {
    const char* name;
    const Tensor& tensor;
  } shared[] = {{"cos", cos},
                {"sin", sin},
                {"slot_mapping", slot_mapping},
                {"block_table", block_table},
                {"seq_lens", seq_lens},
                {"query_starts", query_starts}};
  for (const auto& [name, tensor] : shared) check_device(op, name, tensor, x);
}

// A linear of `rows` x `columns`, the last `n_hi` of them in INT8.
template <class Device>
void check_decoder_linear(const Device& device, const Tensor& x, const DecoderLayer& layer,
                          int64_t at, int64_t rows, int64_t columns, int64_t n_hi) {
  const char* op = "decoder_layers";
  if (layer.rows(at) != rows) {
    fail(op, layer.name(at + kWeightScale).c_str(), "float32 [" + std::to_string(rows) + ", 2]",
         describe(layer[at + kWeightScale]));
  }
  check_tensor(op, layer.name(at + kWeightSum).c_str(), layer[at + kWeightSum], {ScalarType::Int},
               {rows, 2});
  check_tensor(op, layer.name(at + kPackedWeight).c_str(), layer[at + kPackedWeight],
               {ScalarType::Byte}, {device.packed_weight_bytes(rows, columns - n_hi, n_hi)});
  if (layer.optional(at + kBias)) {
    check_tensor(op, layer.name(at + kBias).c_str(), layer[at + kBias], float_dtypes(), {rows});
  }
  for (int64_t i = 0; i < kLinearWeights; ++i) {
    if (layer.optional(at + i)) check_device(op, layer.name(at + i).c_str(), layer[at + i], x);
  }
}

// All that could stop a layer after the layers before it have written their caches.
template <class Device>
void check_decoder_layer(const Device& device, const Tensor& x, const Tensor& cache,
                         const Tensor& first_cache, const DecoderLayer& layer,
                         const DecoderShape& shape, const std::vector<int64_t>& n_hi) {
  const char* op = "decoder_layers";
  check_tensor(op, "caches", cache, {ScalarType::Byte}, sizes_of(first_cache));
  check_device(op, "caches", cache, x);
  for (int64_t at : {kInputNorm, kAttentionNorm}) {
    if (!layer.optional(at)) continue;
    check_tensor(op, layer.name(at).c_str(), layer[at], float_dtypes(), {shape.hidden});
    check_device(op, layer.name(at).c_str(), layer[at], x);
  }
  if (layer.optional(kKeyRotation)) {
    const Tensor& rotation = layer[kKeyRotation];
    const std::string name = layer.name(kKeyRotation);
    const int64_t matrices = rotation.dim() == 3 && rotation.size(0) == 1 ? 1 : shape.n_kv;
    check_tensor(op, name.c_str(), rotation, float_dtypes(),
                 {matrices, shape.head_dim, shape.head_dim});
    check_device(op, name.c_str(), rotation, x);
  }
  const int64_t attended = shape.n_q * shape.head_dim;
  const auto check = [&](int64_t at, int64_t rows, int64_t columns, int64_t read) {
    check_decoder_linear(device, x, layer, at, rows, columns, n_hi[read]);
  };
  check(kQkv, attended + 2 * shape.n_kv * shape.head_dim, shape.hidden, kHiddenRows);
  check(kOutput, shape.hidden, attended, kAttentionRows);
  check(kGateUp, 2 * shape.intermediate, shape.hidden, kHiddenRows);
  check(kDown, shape.hidden, shape.intermediate, kIntermediateRows);
}

// Returns the last layer's MLP and the residual that it is to be added to, both like x.
template <class Device>
std::tuple<Tensor, Tensor> decoder_layers(
    const Tensor& x, const Tensor& cos, const Tensor& sin, const std::vector<Tensor>& caches,
    const Tensor& slot_mapping, const Tensor& block_table, const Tensor& seq_lens,
    const Tensor& query_starts, const std::vector<std::optional<Tensor>>& weights, double eps,
    double scale, const std::vector<int64_t>& n_hi, const std::vector<double>& clip,
    int64_t lo_bits, bool symmetric, int64_t hi_bits, bool hadamard, int64_t hadamard_block) {
  const char* op = "decoder_layers";
  const Device device(op, x);
  const int64_t layers = static_cast<int64_t>(caches.size());
  if (layers == 0) fail(op, "caches", "one for every layer, at least one", "none");
  if (static_cast<int64_t>(weights.size()) != layers * kDecoderLayerWeights) {
    fail(
        op, "weights",
        std::to_string(kDecoderLayerWeights) + " for each of " + std::to_string(layers) + " layers",
        std::to_string(weights.size()));
  }
  if (n_hi.size() != kDecoderRows || clip.size() != kDecoderRows) {
    fail(op, "n_hi, clip", "3 each: of hidden, attention and intermediate rows",
         std::to_string(n_hi.size()) + " and " + std::to_string(clip.size()));
  }
  const DecoderShape shape = decoder_shape(x, cos, caches[0], DecoderLayer(weights, 0));
  check_decoder_batch(x, cos, sin, slot_mapping, block_table, seq_lens, query_starts);
  check_hi_bits(op, hi_bits);
  const int64_t columns[] = {shape.hidden, shape.n_q * shape.head_dim, shape.intermediate};
  for (int64_t rows = 0; rows < kDecoderRows; ++rows) {
    check_mixed_options(op, columns[rows], {n_hi[rows], lo_bits, {}, symmetric, clip[rows]});
  }
  checked_transform(op, "weights", shape.intermediate, n_hi[kIntermediateRows], hadamard,
                    hadamard_block);
  if (n_hi[kAttentionRows] % shape.n_q != 0) {
    fail(op, "n_hi", "columns of attention that " + std::to_string(shape.n_q) + " heads share",
         std::to_string(n_hi[kAttentionRows]));
  }
  for (int64_t i = 0; i < layers; ++i) {
    check_decoder_layer(device, x, caches[i], caches[0], DecoderLayer(weights, i), shape, n_hi);
  }

  const ScalarType dtype = x.scalar_type();
  const std::vector<int64_t> heads{x.size(0), shape.n_q + 2 * shape.n_kv, shape.head_dim};
  const Tensor own_cos = device.as_float32(cos), own_sin = device.as_float32(sin);
  using Quantized = std::tuple<Tensor, Tensor, Tensor>;
  Tensor out = x;
  std::optional<Tensor> residual;
  for (int64_t i = 0; i < layers; ++i) {
    const DecoderLayer layer(weights, i);
    const auto norm = [&](int64_t at) {
      auto [lo, hi, params, sum] =
          rms_norm_quantize<Device>(out, residual, layer.optional(at), eps, n_hi[kHiddenRows],
                                    lo_bits, std::nullopt, symmetric, clip[kHiddenRows]);
      residual = residual ? sum : out;  // an operator that adds nothing returns nothing
      return Quantized(lo, hi, params);
    };
    const auto multiply = [&](int64_t at, const Quantized& input) {
      return mixed_gemm<Device>(std::get<0>(input), std::get<1>(input), std::get<2>(input),
                                layer[at + kPackedWeight], layer[at + kWeightScale],
                                layer[at + kWeightSum], layer.optional(at + kBias), dtype);
    };
    Tensor qkv = torch::stable::view(multiply(kQkv, norm(kInputNorm)), heads);
    const Tensor q = torch::stable::narrow(qkv, 1, 0, shape.n_q);
    const Tensor k = torch::stable::narrow(qkv, 1, shape.n_q, shape.n_kv);
    const Tensor v = torch::stable::narrow(qkv, 1, shape.n_q + shape.n_kv, shape.n_kv);
    const Tensor rotated = kv_append<Device>(k, v, own_cos, own_sin, layer.optional(kKeyRotation),
                                             caches[i], slot_mapping, hi_bits, q);
    const Tensor attended =
        kv_attention<Device>(rotated, caches[i], block_table, seq_lens, query_starts, scale, dtype,
                             n_hi[kAttentionRows] / shape.n_q);
    out = multiply(kOutput, mixed_quantize<Device>(attended, n_hi[kAttentionRows], lo_bits,
                                                   std::nullopt, symmetric, clip[kAttentionRows]));
    const Tensor gate_up = multiply(kGateUp, norm(kAttentionNorm));
    out = multiply(kDown, silu_mul_hadamard_quantize<Device>(
                              gate_up, hadamard, n_hi[kIntermediateRows], lo_bits, std::nullopt,
                              symmetric, clip[kIntermediateRows], hadamard_block));
  }
  return {out, residual.value_or(x)};  // there is a layer, so there is one
}

}  // namespace resq
