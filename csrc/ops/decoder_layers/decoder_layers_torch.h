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

// The weights of all layers, as `decoder_layers` takes them.
using DecoderWeights = std::vector<std::optional<Tensor>>;

// Those of one layer.
class DecoderLayer {
 public:
  DecoderLayer(const DecoderWeights& weights, int64_t layer)
      : weights_(weights.data() + layer * kDecoderLayerWeights),
        first_(layer * kDecoderLayerWeights) {}

  const std::optional<Tensor>& optional(int64_t at) const { return weights_[at]; }
  const Tensor& operator[](int64_t at) const {
    const std::optional<Tensor>& found = weights_[at];
    if (!found) fail("decoder_layers", name(at), "a tensor", "None");
    return *found;
  }
  // Rows of a linear.
  int64_t rows(int64_t linear) const {
    const Tensor& scale = (*this)[linear + kWeightScale];
    check_tensor("decoder_layers", name(linear + kWeightScale), scale, {ScalarType::Float},
                 {kAnySize, 2});
    return scale.size(0);
  }
  Argument name(int64_t at) const { return {"weights", first_ + at}; }

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
    fail(op, layer.name(kQkv + kWeightScale),
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
    fail(op, layer.name(at + kWeightScale), "float32 [" + std::to_string(rows) + ", 2]",
         describe(layer[at + kWeightScale]));
  }
  check_tensor(op, layer.name(at + kWeightSum), layer[at + kWeightSum], {ScalarType::Int},
               {rows, 2});
  check_tensor(op, layer.name(at + kPackedWeight), layer[at + kPackedWeight], {ScalarType::Byte},
               {device.packed_weight_bytes(rows, columns - n_hi, n_hi)});
  if (layer.optional(at + kBias)) {
    check_tensor(op, layer.name(at + kBias), layer[at + kBias], float_dtypes(), {rows});
  }
  for (int64_t i = at; i < at + kLinearWeights; ++i) {
    if (!layer.optional(i)) continue;
    check_device(op, layer.name(i), layer[i], x);
    if (i != at + kBias) device.check_aligned(layer.name(i), layer[i]);
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
    check_tensor(op, layer.name(at), layer[at], float_dtypes(), {shape.hidden});
    check_device(op, layer.name(at), layer[at], x);
  }
  if (layer.optional(kKeyRotation)) {
    const Tensor& rotation = layer[kKeyRotation];
    const Argument name = layer.name(kKeyRotation);
    const int64_t matrices = rotation.dim() == 3 && rotation.size(0) == 1 ? 1 : shape.n_kv;
    check_tensor(op, name, rotation, float_dtypes(), {matrices, shape.head_dim, shape.head_dim});
    check_device(op, name, rotation, x);
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

// What all layers have in common besides their shape.
struct DecoderOptions {
  double eps, scale;
  std::vector<int64_t> n_hi;
  std::vector<double> clip;
  int64_t lo_bits;
  bool symmetric;
  int64_t hi_bits;
  bool hadamard;
  int64_t hadamard_block;

  MixedOptions rows(int64_t which) const {
    return {n_hi[which], lo_bits, std::nullopt, symmetric, clip[which]};
  }
};

// All arguments, whatever device they are on.
template <class Device>
DecoderShape check_decoder_layers(const Device& device, const Tensor& x, const Tensor& cos,
                                  const Tensor& sin, const std::vector<Tensor>& caches,
                                  const Tensor& slot_mapping, const Tensor& block_table,
                                  const Tensor& seq_lens, const Tensor& query_starts,
                                  const DecoderWeights& weights, const DecoderOptions& options) {
  const char* op = "decoder_layers";
  const auto& [eps, scale, n_hi, clip, lo_bits, symmetric, hi_bits, hadamard, block] = options;
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
    check_mixed_options(op, columns[rows], options.rows(rows));
  }
  checked_transform(op, "weights", shape.intermediate, n_hi[kIntermediateRows], hadamard, block);
  if (n_hi[kAttentionRows] % shape.n_q != 0) {
    fail(op, "n_hi", "columns of attention that " + std::to_string(shape.n_q) + " heads share",
         std::to_string(n_hi[kAttentionRows]));
  }
  for (int64_t i = 0; i < layers; ++i) {
    check_decoder_layer(device, x, caches[i], caches[0], DecoderLayer(weights, i), shape, n_hi);
  }
  return shape;
}

// The device of each operator, which messages and logs name.
template <class Device>
struct DecoderDevices {
  Device norm, product, append, attend, quantize, activate;

  explicit DecoderDevices(const Tensor& x)
      : norm("rms_norm_quantize", x),
        product("mixed_gemm", x),
        append("kv_append", x),
        attend("kv_attention", x),
        quantize("mixed_quantize", x),
        activate("silu_mul_hadamard_quantize", x) {}
};

// A call whose arguments are checked. Layers differ in their weights and pages alone, and all of
// them compute in the memory of the first one's operators: to allocate and check 15 tensors a layer
// took a quarter of a CPU's step of one token (docs/notes/0053). Sums alternate between two
// tensors.
struct DecoderLayersCall {
  RmsNormQuantizeCall input_norm;
  MixedGemmCall qkv;
  KvAppendCall appended;
  KvAttentionCall attended;
  MixedQuantizeCall codes;
  MixedGemmCall output;
  RmsNormQuantizeCall attention_norm;
  MixedGemmCall gate_up;
  SiluMulHadamardQuantizeCall activated;
  MixedGemmCall down;
  Tensor other_residual;
};

template <class Device>
DecoderLayersCall prepare_decoder_layers(const DecoderDevices<Device>& on, const Tensor& x,
                                         const Tensor& cos, const Tensor& sin,
                                         const std::vector<Tensor>& caches,
                                         const Tensor& slot_mapping, const Tensor& block_table,
                                         const Tensor& seq_lens, const Tensor& query_starts,
                                         const DecoderWeights& weights,
                                         const DecoderOptions& options) {
  const Device device("decoder_layers", x);
  const DecoderShape shape =
      check_decoder_layers(device, x, cos, sin, caches, slot_mapping, block_table, seq_lens,
                           query_starts, weights, options);
  const DecoderLayer first(weights, 0);
  const auto prepare_norm = [&](const Tensor& in, const std::optional<Tensor>& residual,
                                int64_t at) {
    return prepare_rms_norm_quantize(on.norm, in, residual, first.optional(at), options.eps,
                                     options.rows(kHiddenRows));
  };
  const auto prepare_product = [&](int64_t at, const MixedOutput& in) {
    return prepare_mixed_gemm(on.product, in.q_lo, in.q_hi, in.params, first[at + kPackedWeight],
                              first[at + kWeightScale], first[at + kWeightSum],
                              first.optional(at + kBias), x.scalar_type());
  };
  const int64_t n_q = shape.n_q, n_kv = shape.n_kv;
  const RmsNormQuantizeCall input_norm = prepare_norm(x, std::nullopt, kInputNorm);
  const MixedGemmCall qkv = prepare_product(kQkv, input_norm.out);
  Tensor heads = torch::stable::view(qkv.out, {x.size(0), n_q + 2 * n_kv, shape.head_dim});
  const KvAppendCall appended =
      prepare_kv_append(on.append, torch::stable::narrow(heads, 1, n_q, n_kv),
                        torch::stable::narrow(heads, 1, n_q + n_kv, n_kv), device.as_float32(cos),
                        device.as_float32(sin), first.optional(kKeyRotation), caches[0],
                        slot_mapping, options.hi_bits, torch::stable::narrow(heads, 1, 0, n_q));
  const KvAttentionCall attended = prepare_kv_attention(
      on.attend, appended.rotated_q, caches[0], block_table, seq_lens, query_starts, options.scale,
      x.scalar_type(), options.n_hi[kAttentionRows] / n_q);
  const MixedQuantizeCall codes =
      prepare_mixed_quantize(on.quantize, attended.out, options.rows(kAttentionRows));
  const MixedGemmCall output = prepare_product(kOutput, codes.out);
  const RmsNormQuantizeCall attention_norm = prepare_norm(output.out, x, kAttentionNorm);
  const MixedGemmCall gate_up = prepare_product(kGateUp, attention_norm.out);
  const SiluMulHadamardQuantizeCall activated =
      prepare_silu_mul_hadamard_quantize(on.activate, gate_up.out, options.hadamard,
                                         options.rows(kIntermediateRows), options.hadamard_block);
  const MixedGemmCall down = prepare_product(kDown, activated.out);
  const Tensor other_residual = allocate(x, sizes_of(x), x.scalar_type());
  return {input_norm,     qkv,     appended,  attended, codes,         output,
          attention_norm, gate_up, activated, down,     other_residual};
}

// The last layer's MLP is in call.down.out, the residual that it is to be added to in
// call.attention_norm.new_residual.
template <class Device>
void run(const DecoderDevices<Device>& on, DecoderLayersCall& call,
         const std::vector<Tensor>& caches, const DecoderWeights& weights) {
  const char* op = "decoder_layers";
  const auto run_norm = [&](RmsNormQuantizeParams& params, const DecoderLayer& layer, int64_t at) {
    const std::optional<Tensor>& gain = layer.optional(at);
    params.weight = gain ? gain->const_data_ptr() : nullptr;
    params.weight_type = gain ? float_type(op, "weights", *gain) : FloatType::kFloat32;
    run(on.norm, params);
  };
  const auto multiply = [&](MixedGemmCall& product, const DecoderLayer& layer, int64_t at) {
    const std::optional<Tensor>& bias = layer.optional(at + kBias);
    MixedGemmParams& params = product.params;
    params.packed_weight = layer[at + kPackedWeight].template const_data_ptr<uint8_t>();
    params.weight_scale = layer[at + kWeightScale].template const_data_ptr<float>();
    params.weight_sum = layer[at + kWeightSum].template const_data_ptr<int32_t>();
    params.bias = bias ? bias->const_data_ptr() : nullptr;
    params.bias_type = bias ? float_type(op, "weights", *bias) : FloatType::kFloat32;
    run(on.product, params);
  };
  RmsNormQuantizeParams &before = call.input_norm.params, &between = call.attention_norm.params;
  before.x = call.input_norm.x.const_data_ptr();
  before.residual = nullptr;
  between.residual = call.attention_norm.residual.const_data_ptr();
  on.norm.with_team([&] {
    for (int64_t i = 0; i < static_cast<int64_t>(caches.size()); ++i) {
      const DecoderLayer layer(weights, i);
      run_norm(before, layer, kInputNorm);
      multiply(call.qkv, layer, kQkv);
      std::optional<Tensor> rotation = layer.optional(kKeyRotation);
      if (rotation) rotation = on.append.as_float32(*rotation);
      call.appended.params.rotation = RopeRotation::array(op, rotation);
      call.appended.params.shared_rotation = !rotation || rotation->size(0) == 1;
      call.appended.params.cache = caches[i].template mutable_data_ptr<uint8_t>();
      run(on.append, call.appended.params);
      call.attended.params.cache = caches[i].template const_data_ptr<uint8_t>();
      run(on.attend, call.attended.params, call.attended.batch);
      run(on.quantize, call.codes.params);
      multiply(call.output, layer, kOutput);
      run_norm(between, layer, kAttentionNorm);
      multiply(call.gate_up, layer, kGateUp);
      run(on.activate, call.activated.params);
      multiply(call.down, layer, kDown);
      // The next layer adds what this one returns to its residual.
      before.x = call.down.out.const_data_ptr();
      before.residual = call.attention_norm.new_residual.const_data_ptr();
      before.new_residual = call.other_residual.mutable_data_ptr();
      between.residual = call.other_residual.const_data_ptr();
    }
  });
}

// Returns the last layer's MLP and the residual that it is to be added to, both like x.
template <class Device>
std::tuple<Tensor, Tensor> decoder_layers(
    const Tensor& x, const Tensor& cos, const Tensor& sin, const std::vector<Tensor>& caches,
    const Tensor& slot_mapping, const Tensor& block_table, const Tensor& seq_lens,
    const Tensor& query_starts, const DecoderWeights& weights, double eps, double scale,
    const std::vector<int64_t>& n_hi, const std::vector<double>& clip, int64_t lo_bits,
    bool symmetric, int64_t hi_bits, bool hadamard, int64_t hadamard_block) {
  const DecoderDevices<Device> on(x);
  const DecoderOptions options{eps,       scale,   n_hi,     clip,          lo_bits,
                               symmetric, hi_bits, hadamard, hadamard_block};
  DecoderLayersCall call = prepare_decoder_layers(
      on, x, cos, sin, caches, slot_mapping, block_table, seq_lens, query_starts, weights, options);
  run(on, call, caches, weights);
  return {call.down.out, call.attention_norm.new_residual};
}

}  // namespace resq
