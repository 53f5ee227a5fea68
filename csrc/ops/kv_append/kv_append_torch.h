// kv_append between torch and the kernels: checks, output, the operator of any device.
#pragma once

#include "ops/kv_append/kv_append.h"
#include "torch/kv_tensors.h"

namespace resq {

// The optional arguments, checked; they own what the parameters of a kernel point at.
struct RopeRotation {
  std::optional<Tensor> cos, sin, rotation;

  template <class Device>
  RopeRotation(const Device& device, const char* op, const Tensor& k,
               const std::optional<Tensor>& cos_in, const std::optional<Tensor>& sin_in,
               const std::optional<Tensor>& rotation_in)
      : cos(cos_in), sin(sin_in), rotation(rotation_in) {
    const int64_t tokens = k.size(0), n_kv = k.size(1), head_dim = k.size(2);
    if (cos.has_value() != sin.has_value()) {
      fail(op, cos ? "sin" : "cos", "a tensor, because the other of cos and sin is given", "None");
    }
    if (cos) {
      check_tensor(op, "cos", *cos, float_dtypes(), {tokens, head_dim});
      check_tensor(op, "sin", *sin, float_dtypes(), {tokens, head_dim});
      check_device(op, "cos", *cos, k);
      check_device(op, "sin", *sin, k);
    }
    if (rotation) {
      check_tensor(op, "key_rotation", *rotation, float_dtypes(), {kAnySize, head_dim, head_dim});
      check_device(op, "key_rotation", *rotation, k);
      if (rotation->size(0) != 1 && rotation->size(0) != n_kv) {
        std::ostringstream expected;
        expected << "1 or " << n_kv << " (the kv heads) matrices";
        fail(op, "key_rotation", expected.str(), describe(*rotation));
      }
    }
    for (std::optional<Tensor>* tensor : {&cos, &sin, &rotation}) {
      if (*tensor) *tensor = device.as_float32(**tensor);
    }
  }

  static FloatArray array(const char* op, const std::optional<Tensor>& tensor) {
    if (!tensor) return {nullptr, FloatType::kFloat32};
    return {tensor->const_data_ptr(), float_type(op, "cos", *tensor)};
  }
  bool shared_rotation() const { return !rotation || rotation->size(0) == 1; }
};

// A call whose arguments are checked, and the tables that it reads.
struct KvAppendCall {
  RopeRotation rope;
  Tensor rotated_q;
  KvAppendParams params;
};

template <class Device>
KvAppendCall prepare_kv_append(const Device& device, const Tensor& k, const Tensor& v,
                               const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                               const std::optional<Tensor>& key_rotation, const Tensor& cache,
                               const Tensor& slot_mapping, int64_t hi_bits,
                               const std::optional<Tensor>& q) {
  const char* op = "kv_append";
  check_token_heads(op, "k", k, float_dtypes(), {kAnySize, kAnySize, kAnySize});
  check_head_dim(op, "k", k);
  check_heads(op, "k", k);
  const int64_t tokens = k.size(0), n_kv = k.size(1), head_dim = k.size(2);
  check_token_heads(op, "v", v, {k.scalar_type()}, {tokens, n_kv, head_dim});
  const RopeRotation rope(device, op, k, cos, sin, key_rotation);
  const int64_t page_size = check_cache(op, cache, n_kv, head_dim);
  check_tensor(op, "slot_mapping", slot_mapping, {ScalarType::Long}, {tokens});
  check_bits(op, "hi_bits", hi_bits);
  if (q) {
    check_token_heads(op, "q", *q, {k.scalar_type()}, {tokens, kAnySize, head_dim});
    if (n_kv == 0 ? q->size(1) != 0 : q->size(1) % n_kv != 0) {
      fail(op, "q", "a multiple of k's " + std::to_string(n_kv) + " heads", describe(*q));
    }
    check_heads(op, "q", *q);
    check_device(op, "q", *q, k);
    device.check_aligned_tokens("q", *q);
  }
  check_device(op, "v", v, k);
  check_device(op, "cache", cache, k);
  check_device(op, "slot_mapping", slot_mapping, k);
  device.check_aligned_tokens("k", k);
  device.check_aligned_tokens("v", v);
  device.check_aligned("cache", cache);
  const int64_t n_q = q ? q->size(1) : 0;
  const Tensor rotated_q =
      allocate(k, q ? std::vector<int64_t>{tokens, n_q, head_dim} : std::vector<int64_t>{0},
               ScalarType::Float);
  const KvAppendParams params{.k = k.const_data_ptr(),
                              .v = v.const_data_ptr(),
                              .q = q ? q->const_data_ptr() : nullptr,
                              .rotated_q = rotated_q.mutable_data_ptr<float>(),
                              .cos = RopeRotation::array(op, rope.cos),
                              .sin = RopeRotation::array(op, rope.sin),
                              .rotation = RopeRotation::array(op, rope.rotation),
                              .slot_mapping = slot_mapping.const_data_ptr<int64_t>(),
                              .cache = cache.mutable_data_ptr<uint8_t>(),
                              .type = float_type(op, "k", k),
                              .tokens = tokens,
                              .n_kv = n_kv,
                              .n_q = n_q,
                              .head_dim = head_dim,
                              .page_size = page_size,
                              .k_stride = token_stride(k),
                              .v_stride = token_stride(v),
                              .q_stride = q ? token_stride(*q) : 0,
                              .slots = cache.size(0) * page_size,
                              .shared_rotation = rope.shared_rotation(),
                              .uniform = hi_bits == 4};
  return {rope, rotated_q, params};
}

// Returns q' float32 [tokens, n_q, head_dim], or nothing [0] without q.
template <class Device>
Tensor kv_append(const Tensor& k, const Tensor& v, const std::optional<Tensor>& cos,
                 const std::optional<Tensor>& sin, const std::optional<Tensor>& key_rotation,
                 const Tensor& cache, const Tensor& slot_mapping, int64_t hi_bits,
                 const std::optional<Tensor>& q) {
  const Device device("kv_append", k);
  const KvAppendCall call =
      prepare_kv_append(device, k, v, cos, sin, key_rotation, cache, slot_mapping, hi_bits, q);
  run(device, call.params);
  return call.rotated_q;
}

}  // namespace resq
