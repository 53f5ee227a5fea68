// kv_attention on CPUs: cuts the work into tasks, picks the instruction set, registers the op.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <vector>

#include "ops/kv_attention/kv_attention_args.h"
#include "torch/cpu_call.h"

#define RESQ_ISA_BODY "ops/kv_attention/kv_attention_body.h"
#include "cpu/foreach_isa.h"

namespace resq {
namespace {

// Blocks of queries that share the unpacking of a block of keys, the longest of a sequence first.
std::vector<KvAttentionTask> make_tasks(const KvAttentionParams& p,
                                        const KvAttentionLengths& lengths) {
  const int64_t queries_per_task = std::max<int64_t>(1, kTaskRows / p.group());
  std::vector<KvAttentionTask> tasks;
  for (int64_t s = 0; s < lengths.sequences; ++s) {
    const int64_t begin = lengths.query_starts[s], count = lengths.query_starts[s + 1] - begin;
    for (int64_t block = ceil_div(count, queries_per_task) - 1; block >= 0; --block) {
      const int64_t first = block * queries_per_task;
      for (int64_t head = 0; head < p.n_kv; ++head) {
        tasks.push_back({.sequence = s,
                         .kv_head = head,
                         .first_query = begin + first,
                         .queries = std::min(queries_per_task, count - first),
                         .visible = lengths.seq_lens[s] - count + first + 1});
      }
    }
  }
  return tasks;
}

// Calls work(i, workspace) for i in [0, count). Threads fetch the next i: tasks differ in length.
template <class Work>
void for_each_task(int64_t count, int64_t workspace_floats, const Work& work) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    float* workspace = cpu::thread_row_buffer().floats(workspace_floats);
    for (int64_t i = next++; i < count; i = next++) work(i, workspace);
  });
}

// More than this many bytes of split states, and tasks run whole instead.
constexpr int64_t kMaxStateBytes = int64_t{64} << 20;

void run(const KvAttentionParams& p, const std::vector<KvAttentionTask>& tasks) {
  int64_t most_rows = 0, states = 0;
  struct Split {
    int64_t task, split, state;
  };
  std::vector<Split> splits;
  for (size_t i = 0; i < tasks.size(); ++i) {
    const int64_t rows = tasks[i].queries * p.group();
    most_rows = std::max(most_rows, rows);
    for (int64_t split = 0; split < tasks[i].splits(); ++split, states += rows) {
      splits.push_back({static_cast<int64_t>(i), split, states});
    }
  }
  const int64_t count = tasks.size(), threads = torch::stable::get_num_threads();
  const int64_t workspace = kv_workspace_floats(p.head_dim, most_rows);
  const int64_t state_floats = kv_state_floats(p.head_dim);
  const bool few_tasks = count < 4 * threads && std::ssize(splits) > count;
  if (threads == 1 || !few_tasks ||
      states * state_floats * static_cast<int64_t>(sizeof(float)) > kMaxStateBytes) {
    const auto attend = RESQ_ISA_CHOOSE(attend);
    for_each_task(count, workspace, [&](int64_t i, float* memory) { attend(p, tasks[i], memory); });
    return;
  }
  const auto attend_split = RESQ_ISA_CHOOSE(attend_split);
  const auto merge_splits = RESQ_ISA_CHOOSE(merge_splits);
  std::vector<float> state(states * state_floats);
  for_each_task(splits.size(), workspace, [&](int64_t i, float* memory) {
    const Split& s = splits[i];
    attend_split(p, tasks[s.task], s.split, state.data() + s.state * state_floats, memory);
  });
  std::vector<int64_t> first_state(tasks.size());
  for (size_t i = splits.size(); i-- > 0;) first_state[splits[i].task] = splits[i].state;
  for_each_task(count, workspace, [&](int64_t i, float* memory) {
    merge_splits(p, tasks[i], state.data() + first_state[i] * state_floats, memory);
  });
}

Tensor kv_attention(const Tensor& q, const Tensor& cache, const Tensor& block_table,
                    const Tensor& seq_lens, const Tensor& query_starts, double scale,
                    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                    const std::optional<Tensor>& key_rotation, std::optional<ScalarType> out_dtype,
                    std::optional<int64_t> high_dims) {
  const KvAttentionCall call =
      kv_attention_call(q, cache, block_table, seq_lens, query_starts, scale, cos, sin,
                        key_rotation, out_dtype, high_dims, RopeForm::kFloat32);
  const KvAttentionLengths lengths =
      kv_attention_lengths(call, block_table, seq_lens, query_starts, cache.size(0));
  const int64_t answered = lengths.sequences > 0 ? lengths.query_starts[lengths.sequences] : 0;
  if (answered < q.size(0)) {
    Tensor out = call.out;
    torch::stable::zero_(out);
  }
  if (q.numel() == 0) return call.out;
  log_cpu_kernel("kv_attention");
  run(call.params, make_tasks(call.params, lengths));
  return call.out;
}

}  // namespace
}  // namespace resq

STABLE_TORCH_LIBRARY_IMPL(resq, CPU, m) { m.impl("kv_attention", TORCH_BOX(&resq::kv_attention)); }
