// How rows of an operation travel and come out; both platforms mean the same bytes by it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/layout.h"

namespace jax_nixlep {

enum class TokenType : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

constexpr size_t TokenBytes(TokenType type) { return type == TokenType::kFloat32 ? 4 : 2; }

// How rows travel.
enum class Wire : int32_t { kSame = 0, kBf16 = 1, kFp8 = 2 };
// What an fp8 scale is stored as.
enum class ScaleFormat : int32_t { kFloat32 = 0, kUe8m0 = 1 };

// e4m3's largest value, and the least that the largest of a block counts as: the scale of zeros is finite.
inline constexpr float kFp8Max = 448.0f, kAmaxFloor = 1e-4f;

// A ue8m0 scale as float32: a power of two or NaN. Given scales may be any byte; those that are made here never need
// the two ends.
constexpr uint32_t Ue8m0Bits(uint8_t exponent) {
  return exponent == 0 ? 0x00400000u : exponent == 255 ? 0x7FC00000u : uint32_t(exponent) << 23;
}

struct Fp8Options {
  ScaleFormat format = ScaleFormat::kFloat32;
  bool round_scale = false;
};

struct RowFormat {
  TokenType type = TokenType::kFloat32;
  Wire wire = Wire::kSame;
  Fp8Options fp8{};
  bool dequantize = true;  // fp8 only: rows come out as `type`; otherwise as e4m3 values and scales
  int64_t hidden = 0;      // 0: no rows travel, only weights or scalars

  size_t num_scales() const { return wire == Wire::kFp8 ? size_t(hidden) / kQuantBlock : 0; }
  size_t scale_bytes() const { return num_scales() * (fp8.format == ScaleFormat::kUe8m0 ? 1 : sizeof(float)); }
  size_t value_bytes() const {
    return size_t(hidden) * (wire == Wire::kSame ? TokenBytes(type) : wire == Wire::kBf16 ? 2 : 1);
  }
  size_t wire_bytes() const { return value_bytes() + scale_bytes(); }
  size_t row_bytes() const {  // of the result
    return wire == Wire::kFp8 && !dequantize ? size_t(hidden) : size_t(hidden) * TokenBytes(type);
  }

  // What both sides must agree on before they touch each other's bytes. `second_table`: the message has one.
  uint32_t Digest(bool second_table) const {
    const uint32_t travels = wire == Wire::kSame ? uint32_t(type) : 0;  // the narrower wires are the same for all types
    uint32_t words[] = {travels,          uint32_t(wire),        uint32_t(fp8.format), uint32_t(fp8.round_scale),
                        uint32_t(hidden), uint32_t(second_table)};
    uint32_t hash = 2166136261u;  // FNV-1a
    for (uint32_t word : words) hash = (hash ^ word) * 16777619u;
    return hash ^ hash >> 24;
  }
};

}  // namespace jax_nixlep
