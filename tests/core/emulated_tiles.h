// The tile registers of AMX-INT8 in plain C++, as the instruction set reference defines them: what
// csrc/ops/mixed_gemm/cpu/tiles_amx.h does with instructions. What the processor refuses throws.
// Included inside a namespace.

class Tiles {
 public:
  // LDTILECFG, read byte by byte as the reference lays it out.
  static void configure(const TileConfig& config) {
    uint8_t bytes[64];
    std::memcpy(bytes, &config, sizeof(bytes));
    if (bytes[0] != 1) refuse("ldtilecfg: palette");
    if (bytes[1] != 0) refuse("ldtilecfg: start row");
    for (int i = 2; i < 16; ++i) {
      if (bytes[i] != 0) refuse("ldtilecfg: reserved bytes");
    }
    for (int i = 8; i < 16; ++i) {
      if (bytes[16 + 2 * i] | bytes[17 + 2 * i] | bytes[48 + i]) refuse("ldtilecfg: tile 8 to 15");
    }
    for (int i = 0; i < 8; ++i) {
      const int row_bytes = bytes[16 + 2 * i] + 256 * bytes[17 + 2 * i], rows = bytes[48 + i];
      if (row_bytes > 64 || rows > 16) refuse("ldtilecfg: size of a tile");
      if ((row_bytes == 0) != (rows == 0)) refuse("ldtilecfg: a tile without rows or columns");
      registers()[i] = {.rows = rows, .row_bytes = row_bytes};
    }
  }
  static void release() {
    for (Register& tile : registers()) tile = {};
  }

  template <int kTile>
  static void zero() {
    Register& tile = at(kTile);
    tile = {.rows = tile.rows, .row_bytes = tile.row_bytes};
  }
  // TILELOADD: rows and bytes beyond the configured ones become zero.
  template <int kTile>
  static void load(const void* from, int64_t stride) {
    zero<kTile>();
    Register& tile = at(kTile);
    for (int r = 0; r < tile.rows; ++r) {
      std::memcpy(tile.at[r], static_cast<const uint8_t*>(from) + r * stride, tile.row_bytes);
    }
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    const Register& tile = at(kTile);
    for (int r = 0; r < tile.rows; ++r) {
      std::memcpy(static_cast<uint8_t*>(to) + r * stride, tile.at[r], tile.row_bytes);
    }
  }
  // TDPBSUD: bytes of kA signed, bytes of kB unsigned, int32 sums modulo 2^32. Word k of a row of A
  // is multiplied by row k of B.
  template <int kSums, int kA, int kB>
  static void add_products() {
    Register& sums = at(kSums);
    const Register &a = at(kA), &b = at(kB);
    if (kSums == kA || kSums == kB || kA == kB) refuse("tdpbsud: one register twice");
    if (sums.row_bytes % 4 || a.row_bytes % 4 || b.row_bytes % 4) refuse("tdpbsud: words");
    if (sums.rows != a.rows || sums.row_bytes != b.row_bytes || a.row_bytes / 4 != b.rows) {
      refuse("tdpbsud: sizes of the tiles");
    }
    for (int m = 0; m < sums.rows; ++m) {
      for (int n = 0; n < sums.row_bytes / 4; ++n) {
        uint32_t sum;
        std::memcpy(&sum, sums.at[m] + 4 * n, sizeof(sum));
        for (int k = 0; k < a.row_bytes; ++k) {
          const auto code = static_cast<int8_t>(a.at[m][k]);
          sum += static_cast<uint32_t>(code * b.at[k / 4][4 * n + k % 4]);
        }
        std::memcpy(sums.at[m] + 4 * n, &sum, sizeof(sum));
      }
    }
  }

 private:
  struct Register {
    int rows = 0, row_bytes = 0;
    uint8_t at[16][64] = {};
  };
  static Register (&registers())[8] {
    thread_local Register registers[8];
    return registers;
  }
  static Register& at(int tile) {
    if (registers()[tile].rows == 0) refuse("a tile that is not configured");
    return registers()[tile];
  }
  [[noreturn]] static void refuse(const char* what) { throw std::logic_error(what); }
};
