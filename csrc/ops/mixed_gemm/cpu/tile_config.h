// The 64 bytes of LDTILECFG (AMX, palette 1: eight tiles of at most 16 rows of 64 bytes).
#pragma once

#include <cstdint>

namespace resq::cpu {

struct TileConfig {
  uint8_t palette;
  uint8_t start_row;  // of an interrupted load or store; 0
  uint8_t reserved[14];
  uint16_t row_bytes[16];  // by tile; palette 1 has eight
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// All eight tiles the same size.
constexpr TileConfig tile_config(uint8_t rows, uint16_t row_bytes) {
  TileConfig config = {};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = row_bytes;
    config.rows[tile] = rows;
  }
  return config;
}

}  // namespace resq::cpu
