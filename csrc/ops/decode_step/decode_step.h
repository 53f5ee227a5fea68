// decode_step: decoder_layers for one token of every sequence, by a step that is prepared once.
//
// For sequence b with p = seq_lens[b] tokens so far:
//   cos, sin = row p of the tables; the token's slot is page block_table[b][p / page] and p % page
//   h = out + residual of decoder_layers at length p + 1, rounded to x's type
//   seq_lens[b] = p + 1
// The bits are those of decoder_layers and the sum. What is gained is what torch does for a call of
// it: a list of 570 tensors (30 layers) is taken apart and checked, 15 are allocated.
//
// CPU only: on CUDA a captured graph repeats the launches of a step, without any of that.
#pragma once

#include <cstdint>

namespace resq {

// The slot of a position of a sequence whose pages are `pages`.
inline int64_t slot_of(const int32_t* pages, int64_t position, int64_t page_size) {
  return pages[position / page_size] * page_size + position % page_size;
}

}  // namespace resq
