// The one CPU body of gptq_block.
// Included inside the namespace of an instruction set.

// Rows at once: sums of one column are chains of additions, of which so many run side by side.
constexpr int kGptqVecs = 4, kGptqRows = kGptqVecs * kLanes;

// Rows [first, first + count) of a block, count <= kGptqRows. `feedback` is transposed.
inline void gptq_rows(const GptqBlockParams& p, const float* feedback, int64_t first,
                      int64_t count) {
  alignas(64) float errors[kGptqColumns][kGptqRows], in[kGptqRows] = {}, scales[kGptqRows];
  alignas(64) float exact[kGptqRows];
  int8_t codes[kGptqRows];
  std::fill_n(scales, kGptqRows, 1.0f);
  std::copy_n(p.scale + first, count, scales);
  const Vec lowest = set1(-p.half), highest = set1(p.half - 1.0f);
  for (int64_t j = 0; j < p.columns; ++j) {
    const int64_t at = j * p.rows + first;
    Vec targets[kGptqVecs];
    std::copy_n(p.targets + at, count, in);
    for (int v = 0; v < kGptqVecs; ++v) targets[v] = load(in + v * kLanes);
    for (int64_t i = 0; i < j; ++i) {
      const Vec factor = set1(feedback[j * p.columns + i]);
      for (int v = 0; v < kGptqVecs; ++v) {
        targets[v] = targets[v] + factor * load(errors[i] + v * kLanes);
      }
    }
    std::copy_n(p.weight + at, count, in);
    for (int v = 0; v < kGptqVecs; ++v) {
      const Vec scale = load(scales + v * kLanes), x = targets[v] / scale;
      // Of a NaN the lowest. Sets differ in the sign that they give a zero: + 0 takes it off.
      const Vec code = round(min(highest, max(x, lowest))) + Vec{};
      store(exact + v * kLanes, x);
      store(codes + v * kLanes, code);
      store(errors[j] + v * kLanes, load(in + v * kLanes) - code * scale);
    }
    std::copy_n(codes, count, p.codes + at);
    std::copy_n(exact, count, p.exact + at);
    std::copy_n(errors[j], count, p.errors + at);
  }
}

void gptq_block_rows(const GptqBlockParams& p, int64_t begin, int64_t end) {
  alignas(64) float feedback[kGptqColumns * kGptqColumns];
  for (int64_t i = 0; i < p.columns; ++i) {
    for (int64_t j = 0; j < p.columns; ++j) {
      feedback[j * p.columns + i] = p.feedback[i * p.columns + j];
    }
  }
  for (int64_t first = begin; first < end; first += kGptqRows) {
    gptq_rows(p, feedback, first, std::min<int64_t>(kGptqRows, end - first));
  }
}
