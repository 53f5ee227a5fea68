// Switches of the process's environment.
#pragma once

#include <cstdlib>
#include <string>

namespace resq {

// Whether a variable is set to something other than "0"; `otherwise` if it is unset or empty.
inline bool environment_switch(const char* name, bool otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? std::string(value) != "0" : otherwise;
}

}  // namespace resq
