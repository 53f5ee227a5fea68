// Scratch memory of one thread, kept between calls: a decode step allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace resq::cpu {

class RowBuffer {
 public:
  // At least `count` floats, aligned to a cache line; the contents are those of the last use.
  float* floats(int64_t count) {
    if (count > capacity_) {
      data_.reset(static_cast<float*>(
          ::operator new[](static_cast<size_t>(count) * sizeof(float), kAlignment)));
      capacity_ = count;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, kAlignment); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t capacity_ = 0;
};

// The calling thread's own buffer; every kernel of a thread shares it, one after the other.
inline RowBuffer& thread_row_buffer() {
  thread_local RowBuffer buffer;
  return buffer;
}

}  // namespace resq::cpu
