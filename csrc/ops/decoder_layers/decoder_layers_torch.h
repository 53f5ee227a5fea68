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
  for (int64_t i = at; i < at + kLinearWeights; ++i) {
    if (!layer.optional(i)) continue;
    check_device(op, layer.name(i).c_str(), layer[i], x);
    if (i != at + kBias) device.check_aligned(layer.name(i).c_str(), layer[i]);
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
  device.check_aligned("caches", cache);
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
  check_bits(op, "hi_bits", hi_bits);
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

  // Layers differ in their weights and pages alone. The operators check the first layer's calls,
  // and all layers compute in its memory: to allocate and check 15 tensors a layer took a quarter
  // of a CPU's step of one token (docs/notes/0053).
  const DecoderLayer first(weights, 0);
  const Device norm("rms_norm_quantize", x), product("mixed_gemm", x), append("kv_append", x),
      attend("kv_attention", x), quantize("mixed_quantize", x),
      activate("silu_mul_hadamard_quantize", x);
  const auto options = [&](int64_t rows) {
    return MixedOptions{n_hi[rows], lo_bits, std::nullopt, symmetric, clip[rows]};
  };
  const auto prepare_norm = [&](const Tensor& in, const std::optional<Tensor>& residual,
                                int64_t at) {
    return prepare_rms_norm_quantize(norm, in, residual, first.optional(at), eps,
                                     options(kHiddenRows));
  };
  const auto prepare_product = [&](int64_t at, const MixedOutput& in) {
    return prepare_mixed_gemm(product, in.q_lo, in.q_hi, in.params, first[at + kPackedWeight],
                              first[at + kWeightScale], first[at + kWeightSum],
                              first.optional(at + kBias), x.scalar_type());
  };
  const int64_t n_q = shape.n_q, n_kv = shape.n_kv;
  RmsNormQuantizeCall input_norm = prepare_norm(x, std::nullopt, kInputNorm);
  MixedGemmCall qkv = prepare_product(kQkv, input_norm.out);
  Tensor heads = torch::stable::view(qkv.out, {x.size(0), n_q + 2 * n_kv, shape.head_dim});
  KvAppendCall appended =
      prepare_kv_append(append, torch::stable::narrow(heads, 1, n_q, n_kv),
                        torch::stable::narrow(heads, 1, n_q + n_kv, n_kv), device.as_float32(cos),
                        device.as_float32(sin), first.optional(kKeyRotation), caches[0],
                        slot_mapping, hi_bits, torch::stable::narrow(heads, 1, 0, n_q));
  KvAttentionCall attended =
      prepare_kv_attention(attend, appended.rotated_q, caches[0], block_table, seq_lens,
                           query_starts, scale, x.scalar_type(), n_hi[kAttentionRows] / n_q);
  const MixedQuantizeCall codes =
      prepare_mixed_quantize(quantize, attended.out, options(kAttentionRows));
  MixedGemmCall output = prepare_product(kOutput, codes.out);
  RmsNormQuantizeCall attention_norm = prepare_norm(output.out, x, kAttentionNorm);
  MixedGemmCall gate_up = prepare_product(kGateUp, attention_norm.out);
  const SiluMulHadamardQuantizeCall activated = prepare_silu_mul_hadamard_quantize(
      activate, gate_up.out, hadamard, options(kIntermediateRows), hadamard_block);
  MixedGemmCall down = prepare_product(kDown, activated.out);
  const Tensor other_residual = allocate(x, sizes_of(x), x.scalar_type());

  device.with_team([&] {
    for (int64_t i = 0; i < layers; ++i) {
      const DecoderLayer layer(weights, i);
      const auto run_norm = [&](RmsNormQuantizeParams& params, int64_t at) {
        const std::optional<Tensor>& gain = layer.optional(at);
        params.weight = gain ? gain->const_data_ptr() : nullptr;
        params.weight_type = gain ? float_type(op, "weights", *gain) : FloatType::kFloat32;
        run(norm, params);
      };
      const auto multiply = [&](MixedGemmCall& call, int64_t at) {
        const std::optional<Tensor>& bias = layer.optional(at + kBias);
        call.params.packed_weight = layer[at + kPackedWeight].template const_data_ptr<uint8_t>();
        call.params.weight_scale = layer[at + kWeightScale].template const_data_ptr<float>();
        call.params.weight_sum = layer[at + kWeightSum].template const_data_ptr<int32_t>();
        call.params.bias = bias ? bias->const_data_ptr() : nullptr;
        call.params.bias_type = bias ? float_type(op, "weights", *bias) : FloatType::kFloat32;
        run(product, call.params);
      };
      run_norm(input_norm.params, kInputNorm);
      multiply(qkv, kQkv);
      std::optional<Tensor> rotation = layer.optional(kKeyRotation);
      if (rotation) rotation = device.as_float32(*rotation);
      appended.params.rotation = RopeRotation::array(op, rotation);
      appended.params.shared_rotation = !rotation || rotation->size(0) == 1;
      appended.params.cache = caches[i].template mutable_data_ptr<uint8_t>();
      run(append, appended.params);
      attended.params.cache = caches[i].template const_data_ptr<uint8_t>();
      run(attend, attended.params, attended.batch);
      run(quantize, codes.params);
      multiply(output, kOutput);
      run_norm(attention_norm.params, kAttentionNorm);
      multiply(gate_up, kGateUp);
      run(activate, activated.params);
      multiply(down, kDown);
      // The next layer adds what this one returns to its residual; sums alternate between two
      // tensors.
      input_norm.params.x = down.out.const_data_ptr();
      input_norm.params.residual = attention_norm.new_residual.const_data_ptr();
      input_norm.params.new_residual = other_residual.mutable_data_ptr();
      attention_norm.params.residual = other_residual.const_data_ptr();
    }
  });
  return {down.out, attention_norm.new_residual};
}

}  // namespace resq
