// decode_step on CPUs: a prepared step is an object that a tensor owns.
#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <numeric>
#include <unordered_map>

#include "ops/decode_step/decode_step.h"
#include "ops/decoder_layers/decoder_layers_cpu_torch.h"

namespace resq {

namespace {

// sums[i] = x[i] + y[i] in float32, rounded to T.
template <class T>
void add(const void* x, const void* y, void* sums, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float sum = to_float(static_cast<const T*>(x)[i]) + to_float(static_cast<const T*>(y)[i]);
    T& to = static_cast<T*>(sums)[i];
    if constexpr (std::is_same_v<T, Half>) {
      to = to_half(sum);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      to = to_bfloat16(sum);
    } else {
      to = sum;
    }
  }
}

// What a step reads and writes, and the calls of its operators.
class DecodeStep {
 public:
  DecodeStep(const Tensor& x, const Tensor& cos, const Tensor& sin, std::vector<Tensor> caches,
             const Tensor& block_table, DecoderWeights weights, const DecoderOptions& options)
      : caches_(std::move(caches)),
        weights_(std::move(weights)),
        table_cos_(cos),
        table_sin_(sin),
        block_table_(block_table),
        x_(allocate(x, sizes_of(x), x.scalar_type())),
        cos_(rows(x, cos)),
        sin_(rows(x, sin)),
        slots_(allocate(x, {x.size(0)}, ScalarType::Long)),
        seq_lens_(allocate(x, {x.size(0)}, ScalarType::Int)),
        query_starts_(allocate(x, {x.size(0) + 1}, ScalarType::Int)),
        on_(x_),
        call_(prepare_decoder_layers(on_, x_, cos_, sin_, caches_, slots_, block_table_, seq_lens_,
                                     query_starts_, weights_, options)),
        type_(float_type(kOp, "x", x_)),
        page_size_(call_.appended.params.page_size),
        limit_(std::min(cos.size(0), block_table.size(1) * page_size_)) {
    std::iota(query_starts_.mutable_data_ptr<int32_t>(),
              query_starts_.mutable_data_ptr<int32_t>() + x.size(0) + 1, 0);
  }

  Tensor run_once(const Tensor& x, const Tensor& seq_lens) {
    check_tensor(kOp, "x", x, {x_.scalar_type()}, sizes_of(x_));
    check_tensor(kOp, "seq_lens", seq_lens, {ScalarType::Int}, {x_.size(0)});
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    place(seq_lens.const_data_ptr<int32_t>());
    // Not memcpy, which may not be given the null pointers of no sequence.
    std::copy_n(static_cast<const char*>(x.const_data_ptr()), x_.numel() * x_.element_size(),
                static_cast<char*>(x_.mutable_data_ptr()));
    run(on_, call_, caches_, weights_);
    const Tensor out = allocate(x_, sizes_of(x_), x_.scalar_type());
    const auto sum = type_ == FloatType::kFloat32   ? add<float>
                     : type_ == FloatType::kFloat16 ? add<Half>
                                                    : add<BFloat16>;
    sum(call_.down.out.const_data_ptr(), call_.attention_norm.new_residual.const_data_ptr(),
        out.mutable_data_ptr(), x_.numel());
    std::copy_n(seq_lens_.const_data_ptr<int32_t>(), x_.size(0),
                seq_lens.mutable_data_ptr<int32_t>());
    return out;
  }

 private:
  static constexpr const char* kOp = "decode_step";

  // Memory for a row of a table of RoPE for every row of x.
  static Tensor rows(const Tensor& x, const Tensor& table) {
    return allocate(x, {x.size(0), table.size(1)}, ScalarType::Float);
  }

  // Everything that depends on the lengths, after all of them have been looked at.
  void place(const int32_t* lengths) {
    const int64_t head_dim = cos_.size(1), max_pages = block_table_.size(1);
    const int32_t* table = block_table_.const_data_ptr<int32_t>();
    const float* from[] = {table_cos_.const_data_ptr<float>(), table_sin_.const_data_ptr<float>()};
    float* to[] = {cos_.mutable_data_ptr<float>(), sin_.mutable_data_ptr<float>()};
    for (int64_t b = 0; b < x_.size(0); ++b) {
      const int64_t length = lengths[b];
      if (length < 0 || length >= limit_) {
        fail(
            kOp, Argument("seq_lens", b),
            "0 to " + std::to_string(limit_ - 1) + " (rows of cos, and the pages' columns, less 1)",
            std::to_string(length));
      }
      if (const int32_t page = table[b * max_pages + length / page_size_]; page < 0) {
        fail(kOp, "block_table", "a page for every token", std::to_string(page));
      }
    }
    for (int64_t b = 0; b < x_.size(0); ++b) {
      const int64_t length = lengths[b];
      seq_lens_.mutable_data_ptr<int32_t>()[b] = static_cast<int32_t>(length + 1);
      slots_.mutable_data_ptr<int64_t>()[b] = slot_of(table + b * max_pages, length, page_size_);
      for (int part : {0, 1}) {
        std::copy_n(from[part] + length * head_dim, head_dim, to[part] + b * head_dim);
      }
    }
  }

  const std::vector<Tensor> caches_;
  const DecoderWeights weights_;
  const Tensor table_cos_, table_sin_, block_table_;
  const Tensor x_, cos_, sin_, slots_, seq_lens_, query_starts_;
  const DecoderDevices<Cpu> on_;
  DecoderLayersCall call_;
  const FloatType type_;
  const int64_t page_size_, limit_;
  std::mutex mutex_;
};

// The steps that exist, by the first byte of the tensor that owns them: no other tensor is taken
// for one.
class DecodeSteps {
 public:
  static DecodeSteps& all() {
    static DecodeSteps* steps = new DecodeSteps;  // tensors may outlive static objects
    return *steps;
  }

  // A tensor with which `step` ends.
  Tensor keep(const Tensor& like, std::shared_ptr<DecodeStep> step) {
    const void* place = step.get();
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      steps_[place] = std::move(step);
    }
    const std::array<int64_t, 1> one{1};
    return torch::stable::from_blob(const_cast<void*>(place), one, one, like.device(),
                                    ScalarType::Byte, [](void* data) { all().drop(data); });
  }

  std::shared_ptr<DecodeStep> find(const Tensor& step) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = steps_.find(step.numel() == 1 ? step.const_data_ptr() : nullptr);
    if (found == steps_.end()) {
      fail("decode_step", "step", "what prepare_decode_step has returned, not a copy",
           describe(step));
    }
    return found->second;
  }

 private:
  void drop(const void* place) {
    std::shared_ptr<DecodeStep> last;  // ends without the lock: it releases tensors
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = steps_.find(place);
    last = std::move(found->second);
    steps_.erase(found);
  }

  std::mutex mutex_;
  std::unordered_map<const void*, std::shared_ptr<DecodeStep>> steps_;
};

Tensor prepare_decode_step(const Tensor& x, const Tensor& cos, const Tensor& sin,
                           const std::vector<Tensor>& caches, const Tensor& block_table,
                           const DecoderWeights& weights, double eps, double scale,
                           const std::vector<int64_t>& n_hi, const std::vector<double>& clip,
                           int64_t lo_bits, bool symmetric, int64_t hi_bits, bool hadamard,
                           int64_t hadamard_block) {
  const char* op = "prepare_decode_step";
  check_tensor(op, "x", x, float_dtypes(), {kAnySize, kAnySize});
  check_tensor(op, "cos", cos, {ScalarType::Float}, {kAnySize, kAnySize});
  check_tensor(op, "sin", sin, {ScalarType::Float}, sizes_of(cos));
  check_tensor(op, "block_table", block_table, {ScalarType::Int}, {x.size(0), kAnySize});
  const DecoderOptions options{eps,       scale,   n_hi,     clip,          lo_bits,
                               symmetric, hi_bits, hadamard, hadamard_block};
  return DecodeSteps::all().keep(
      x, std::make_shared<DecodeStep>(x, cos, sin, caches, block_table, weights, options));
}

Tensor decode_step(const Tensor& step, const Tensor& x, const Tensor& seq_lens) {
  return DecodeSteps::all().find(step)->run_once(x, seq_lens);
}

}  // namespace
}  // namespace resq

RESQ_IMPL(CPU, m) {
  m.impl("prepare_decode_step", TORCH_BOX(&resq::prepare_decode_step));
  m.impl("decode_step", TORCH_BOX(&resq::decode_step));
}
