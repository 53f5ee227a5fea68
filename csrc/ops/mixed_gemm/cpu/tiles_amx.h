// The tile registers of AMX-INT8. Included inside the namespace of an instruction set.
//
// Inline assembly instead of the intrinsics of <amxtileintrin.h>: those are macros that take the
// register as a literal, and in g++ 12 their loads and stores do not declare that they access
// memory.

struct Tiles {
  // Zeroes all tiles.
  static void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
  static void release() { asm volatile("tilerelease"); }

  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  // kSums += kA (signed) x kB (unsigned): int32 sums without saturation.
  template <int kSums, int kA, int kB>
  static void add_products() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kA), "i"(kB));
  }
};
