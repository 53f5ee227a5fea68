// kv_attention on CPUs: cuts the work into tasks and their splits.
#include <atomic>
#include <cstring>
#include <vector>

#include "ops/kv_attention/kv_attention_torch.h"
#include "torch/cpu_device.h"

#define RESQ_ISA_BODY "ops/kv_attention/kv_attention_body.h"
#include "cpu/foreach_isa.h"

namespace resq {
namespace {

// Checks that query_starts ascends from 0 to at most the rows of q, that every length fits its row
// of the block table, and that every page it uses exists.
void check_batch(const KvAttentionParams& p, const KvAttentionBatch& batch) {
  const auto refuse = [](const char* argument, const std::string& expected, int64_t got,
                         const char* of, int64_t index) {
    std::ostringstream text;
    text << got << " for " << of << " " << index;
    fail("kv_attention", argument, expected, text.str());
  };
  const int64_t room = p.max_pages * p.page_size;
  if (batch.query_starts[0] != 0) refuse("query_starts", "0", batch.query_starts[0], "sequence", 0);
  for (int64_t s = 0; s < batch.sequences; ++s) {
    const int64_t end = batch.query_starts[s + 1], length = batch.seq_lens[s];
    if (end < batch.query_starts[s] || end > batch.tokens) {
      refuse("query_starts",
             "values that do not descend and are at most " + std::to_string(batch.tokens) +
                 " (rows of q)",
             end, "the end of sequence", s);
    }
    if (length < 0 || length > room) {
      refuse("seq_lens",
             "0 to " + std::to_string(room) + " tokens (block_table's pages x page size)", length,
             "sequence", s);
    }
    for (int64_t i = 0; i < ceil_div(length, p.page_size); ++i) {
      const int32_t page = p.block_table[s * p.max_pages + i];
      if (page < 0 || page >= batch.pages) {
        refuse("block_table", "pages from 0 to " + std::to_string(batch.pages - 1), page,
               "a page of sequence", s);
      }
    }
  }
}

// Groups of queries that share the unpacking of a block of keys, the longest of a sequence first.
std::vector<KvAttentionTask> make_tasks(const KvAttentionParams& p, const KvAttentionBatch& batch) {
  const int64_t queries_per_task = std::max<int64_t>(1, kTaskRows / p.group());
  std::vector<KvAttentionTask> tasks;
  for (int64_t s = 0; s < batch.sequences; ++s) {
    const int64_t begin = batch.query_starts[s], count = batch.query_starts[s + 1] - begin;
    for (int64_t block = ceil_div(count, queries_per_task) - 1; block >= 0; --block) {
      const int64_t first = block * queries_per_task;
      for (int64_t head = 0; head < p.n_kv; ++head) {
        tasks.push_back({.sequence = s,
                         .kv_head = head,
                         .first_query = begin + first,
                         .queries = std::min(queries_per_task, count - first),
                         .visible = batch.seq_lens[s] - count + first + 1});
      }
    }
  }
  return tasks;
}

// Calls work(i, workspace) for i in [0, count). Threads fetch the next i as they go, because tasks
// differ in length.
template <class Work>
void for_each_task(int64_t count, int64_t workspace_floats, const Work& work) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  parallel_for(threads, 1, [&](int64_t, int64_t) {
    float* workspace = cpu::thread_row_buffer().floats(workspace_floats);
    for (int64_t i = next++; i < count; i = next++) work(i, workspace);
  });
}

// Above this many bytes of split states, tasks run unsplit instead.
constexpr int64_t kMaxStateBytes = int64_t{64} << 20;

void attend_tasks(const KvAttentionParams& p, const std::vector<KvAttentionTask>& tasks) {
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

}  // namespace

void run(const Cpu& device, const KvAttentionParams& p, const KvAttentionBatch& batch) {
  check_batch(p, batch);
  const int64_t numbers = batch.tokens * p.n_q * p.head_dim;
  if (batch.query_starts[batch.sequences] < batch.tokens) {  // rows of no sequence
    std::memset(p.out, 0, numbers * (p.out_type == FloatType::kFloat32 ? 4 : 2));
  }
  if (numbers == 0) return;
  device.log();
  attend_tasks(p, make_tasks(p, batch));
}

}  // namespace resq

RESQ_IMPL(CPU, m) { m.impl("kv_attention", TORCH_BOX(&resq::kv_attention<resq::Cpu>)); }
