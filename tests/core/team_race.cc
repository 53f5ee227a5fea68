// A program for ThreadSanitizer: ends with 0 if no item was left out, and none done twice.
#include "core_team.h"

int main() {
  int64_t mistakes = 0;
  for (const int64_t threads : {2, 3, 5})
    mistakes += team_mistakes(threads, threads, 2000, threads);
  return mistakes == 0 ? 0 : 1;
}
