// Switches of the process's environment.
#pragma once

#include <cstdlib>
#include <string>

namespace resq {

// Whether a variable is set to something else than "0"; `otherwise` where it is not set or empty.
inline bool environment_switch(const char* name, bool otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? std::string(value) != "0" : otherwise;
}

}  // namespace resq
