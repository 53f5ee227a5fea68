// Values that are computed once per key, by whichever thread asks first. A computation that throws
// stores nothing: the next caller tries again.
#pragma once

#include <map>
#include <mutex>

namespace resq::cuda {

template <class Key, class Value>
class OncePer {
 public:
  template <class Make>
  const Value& get(const Key& key, Make make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = values_.find(key);
    if (found == values_.end()) found = values_.emplace(key, make()).first;
    return found->second;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Value> values_;  // whose elements stay where they are
};

}  // namespace resq::cuda
