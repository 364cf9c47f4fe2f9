// Rows of numbers on the CPU: conversions, scaled sums and fp8 quantisation, one function per inner loop.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "runtime/format.h"

namespace jax_nixlep {

struct bfloat16 {
  uint16_t bits;
};
using float16 = _Float16;

inline float ToFloat(float x) { return x; }
inline float ToFloat(float16 x) { return float(x); }
inline float ToFloat(bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

template <typename T>
inline T FromFloat(float x) {
  return T(x);
}
template <>
inline bfloat16 FromFloat<bfloat16>(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  const uint32_t quiet_nan = (u >> 16) | 0x40;
  return {uint16_t((u & 0x7FFFFFFF) > 0x7F800000 ? quiet_nan : rounded)};
}

// For float, bfloat16, float16, of which the two types of a conversion must be equal or one be bfloat16. `n` counts
// values. out = 0 + weights[0] * rows[0] + weights[1] * rows[1] ..., in float32 and in this order, each product rounded
// first.
template <typename From, typename To>
void WeightedSum(To* out, const std::byte* const* rows, const float* weights, int num_rows, size_t n);
template <typename From, typename To>
void Convert(To* out, const From* x, size_t n);
// e4m3 values and one scale per kQuantBlock of them (float32, or the exponent byte of a power of two).
// Formulas of NVIDIA NIXL-EP: amax floored at 1e-4, scale 448 / amax, optionally rounded up to a power of two.
template <typename T>
void Quantize(uint8_t* values, std::byte* scales, const T* x, size_t n, Fp8Options options);
template <typename T>
void Dequantize(T* out, const uint8_t* values, const std::byte* scales, size_t n, Fp8Options options);

}  // namespace jax_nixlep
