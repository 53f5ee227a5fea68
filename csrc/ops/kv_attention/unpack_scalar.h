// Portable unpacking of tiles for kv_attention_body.h, straight from the places of core/kv_page.h.

template <int kHeadDim>
struct PlaceTable {
  struct Entry {
    uint16_t byte;
    uint8_t shift, mask;
  };
  Entry k[KvLayout<kHeadDim>::kTileTokens][kHeadDim];
  Entry v[KvLayout<kHeadDim>::kTileTokens][kHeadDim];

  constexpr PlaceTable() : k(), v() {
    for (int token = 0; token < KvLayout<kHeadDim>::kTileTokens; ++token) {
      for (int dim = 0; dim < kHeadDim; ++dim) {
        k[token][dim] = entry(kv_k_place<kHeadDim>(token, dim));
        v[token][dim] = entry(kv_v_place<kHeadDim>(token, dim));
      }
    }
  }
  static constexpr Entry entry(KvPlace p) {
    return {static_cast<uint16_t>(p.byte), static_cast<uint8_t>(p.shift),
            static_cast<uint8_t>(p.wide ? 255 : 15)};
  }
};
template <int kHeadDim>
inline constexpr PlaceTable<kHeadDim> kPlaces{};

template <class Entry>
inline int32_t code_at(const uint8_t* tile, Entry e) {
  return (tile[e.byte] >> e.shift) & e.mask;
}

// keys[j * kKeyBlock + token] = codes of dims 2 j and 2 j + 1.
template <int kHeadDim>
inline void unpack_keys(const uint8_t* tile, int32_t* keys) {
  for (int token = 0; token < KvLayout<kHeadDim>::kTileTokens; ++token) {
    const auto& places = kPlaces<kHeadDim>.k[token];
    for (int j = 0; j < kHeadDim / 2; ++j) {
      keys[j * kKeyBlock + token] = code_at(tile, places[2 * j]) | code_at(tile, places[2 * j + 1])
                                                                       << 16;
    }
  }
}

// values[j * kHeadDim + dim] = codes of tokens 2 j and 2 j + 1.
template <int kHeadDim>
inline void unpack_values(const uint8_t* tile, int32_t* values) {
  for (int j = 0; j < KvLayout<kHeadDim>::kTileTokens / 2; ++j) {
    const auto& even = kPlaces<kHeadDim>.v[2 * j];
    const auto& odd = kPlaces<kHeadDim>.v[2 * j + 1];
    for (int dim = 0; dim < kHeadDim; ++dim) {
      values[j * kHeadDim + dim] = code_at(tile, even[dim]) | code_at(tile, odd[dim]) << 16;
    }
  }
}

// The 8 float16 numbers of each of 8 tokens -> out[number * kKeyBlock + token].
inline void load_metadata(const uint8_t* metadata, float* out) {
  for (int token = 0; token < 8; ++token) {
    for (int field = 0; field < 8; ++field) {
      const uint8_t* bytes = metadata + token * kKvMetadataBytes + 2 * field;
      out[field * kKeyBlock + token] =
          to_float(Half{static_cast<uint16_t>(bytes[0] | bytes[1] << 8)});
    }
  }
}
