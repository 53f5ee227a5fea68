// Variables of the process's environment.
#pragma once

#include <cstdlib>
#include <string>

namespace resq {

// A variable's value; empty if it is unset.
inline std::string environment_text(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

// Whether a variable is set to something other than "0"; `otherwise` if it is unset or empty.
inline bool environment_switch(const char* name, bool otherwise) {
  const std::string value = environment_text(name);
  return value.empty() ? otherwise : value != "0";
}

}  // namespace resq
