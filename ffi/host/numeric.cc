#include "host/numeric.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "runtime/layout.h"

// One binary for every x86-64: the loops are compiled for its levels and the best version is chosen when the library is
// loaded. (Names of processors, as arch=haswell, would match only those processors.) Sanitizers cannot run that early.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && !defined(JAX_NIXLEP_SANITIZE)
#define JN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define JN_CLONES
#endif
#define JN_INLINE __attribute__((always_inline)) inline

namespace jax_nixlep {
namespace {

// All rows at once for as many values as fit registers; num_rows > 0.
constexpr size_t kSumBlock = 64;
template <typename From, typename To>
JN_INLINE void SumBlock(To* out, const std::byte* const* rows, const float* weights, int num_rows, size_t begin,
                        size_t n) {
  float sum[kSumBlock];
  const auto product = [&](int r, size_t i) {
    return weights[r] * ToFloat(reinterpret_cast<const From*>(rows[r])[begin + i]);
  };
  for (size_t i = 0; i < n; ++i) sum[i] = 0.0f + product(0, i);  // not -0
#pragma GCC unroll 1  // or the loops change places, and the inner one is no longer vectorised
  for (int r = 1; r < num_rows; ++r) {
    for (size_t i = 0; i < n; ++i) sum[i] += product(r, i);
  }
  for (size_t i = 0; i < n; ++i) out[begin + i] = FromFloat<To>(sum[i]);
}
template <typename From, typename To>
JN_INLINE void WeightedSumLoop(To* out, const std::byte* const* rows, const float* weights, int num_rows, size_t n) {
  if (num_rows == 0) {
    std::fill_n(out, n, FromFloat<To>(0));
    return;
  }
  size_t begin = 0;
  for (; begin + kSumBlock <= n; begin += kSumBlock) {
    SumBlock<From>(out, rows, weights, num_rows, begin, kSumBlock);
  }
  SumBlock<From>(out, rows, weights, num_rows, begin, n - begin);
}
template <typename From, typename To>
JN_INLINE void ConvertLoop(To* out, const From* x, size_t n) {
  for (size_t i = 0; i < n; ++i) out[i] = FromFloat<To>(ToFloat(x[i]));
}

// Rounds to nearest even, saturates; NaN stays NaN.
JN_INLINE uint8_t ToE4m3(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t sign = u >> 24 & 0x80;
  const float magnitude = std::min(std::fabs(x), kFp8Max);
  const uint32_t m = std::bit_cast<uint32_t>(magnitude);
  // Normal numbers drop 20 mantissa bits; below 2^-6 the grid is 2^-9, which adding 2^14 rounds to.
  const uint32_t normal = ((m + 0x7FFFF + (m >> 20 & 1)) >> 20) - (120u << 3);
  const uint32_t subnormal = std::bit_cast<uint32_t>(magnitude + 16384.0f) - std::bit_cast<uint32_t>(16384.0f);
  const uint32_t code = magnitude < 0.015625f ? subnormal : normal;
  return uint8_t(x != x ? 0x7F : sign | code);
}

constexpr float FromE4m3(uint8_t code) {
  const uint32_t exponent = code >> 3 & 0xF, mantissa = code & 7;
  float magnitude = 0;
  if (exponent == 15 && mantissa == 7) {
    magnitude = std::bit_cast<float>(0x7FC00000u);
  } else if (exponent) {
    magnitude = std::bit_cast<float>((exponent + 120) << 23 | mantissa << 20);
  } else {
    magnitude = float(mantissa) / 512;
  }
  return code & 0x80 ? -magnitude : magnitude;
}

constexpr auto kE4m3 = [] {
  std::array<float, 256> table{};
  for (int i = 0; i < 256; ++i) table[i] = FromE4m3(uint8_t(i));
  return table;
}();

template <typename T>
JN_INLINE void QuantizeLoop(uint8_t* values, std::byte* scales, const T* x, size_t n, Fp8Options options) {
  for (size_t block = 0; block < n / kQuantBlock; ++block, x += kQuantBlock, values += kQuantBlock) {
    float amax = kAmaxFloor;
    for (int i = 0; i < kQuantBlock; ++i) {
      const float magnitude = std::fabs(ToFloat(x[i]));
      amax = magnitude > amax ? magnitude : amax;
    }
    float scale = kFp8Max / amax, inverse = amax * (1 / kFp8Max);
    if (options.round_scale) {
      const uint32_t bits = std::bit_cast<uint32_t>(inverse);
      const uint32_t exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0);
      inverse = std::bit_cast<float>(exponent << 23);
      scale = std::bit_cast<float>((254 - exponent) << 23);
    }
    for (int i = 0; i < kQuantBlock; ++i) values[i] = ToE4m3(ToFloat(x[i]) * scale);
    if (options.format == ScaleFormat::kUe8m0) {
      scales[block] = std::byte(std::bit_cast<uint32_t>(inverse) >> 23);
    } else {
      std::memcpy(scales + block * sizeof(float), &inverse, sizeof(float));
    }
  }
}

template <typename T>
JN_INLINE void DequantizeLoop(T* out, const uint8_t* values, const std::byte* scales, size_t n, Fp8Options options) {
  for (size_t block = 0; block < n / kQuantBlock; ++block, out += kQuantBlock, values += kQuantBlock) {
    float scale;
    if (options.format == ScaleFormat::kUe8m0) {
      scale = std::bit_cast<float>(Ue8m0Bits(uint8_t(scales[block])));
    } else {
      std::memcpy(&scale, scales + block * sizeof(float), sizeof(float));
    }
    for (int i = 0; i < kQuantBlock; ++i) out[i] = FromFloat<T>(kE4m3[values[i]] * scale);
  }
}

}  // namespace

#define JN_DEFINE(T)                                                                                                \
  template <>                                                                                                       \
  JN_CLONES void Quantize(uint8_t* values, std::byte* scales, const T* x, size_t n, Fp8Options options) {           \
    QuantizeLoop(values, scales, x, n, options);                                                                    \
  }                                                                                                                 \
  template <>                                                                                                       \
  JN_CLONES void Dequantize(T* out, const uint8_t* values, const std::byte* scales, size_t n, Fp8Options options) { \
    DequantizeLoop(out, values, scales, n, options);                                                                \
  }
JN_DEFINE(float)
JN_DEFINE(bfloat16)
JN_DEFINE(float16)
#undef JN_DEFINE

#define JN_SUM(From, To)                                                                                           \
  template <>                                                                                                      \
  JN_CLONES void WeightedSum<From, To>(To * out, const std::byte* const* rows, const float* weights, int num_rows, \
                                       size_t n) {                                                                 \
    WeightedSumLoop<From>(out, rows, weights, num_rows, n);                                                        \
  }
#define JN_CONVERT(From, To)                                 \
  JN_SUM(From, To)                                           \
  template <>                                                \
  JN_CLONES void Convert(To* out, const From* x, size_t n) { \
    ConvertLoop(out, x, n);                                  \
  }
JN_SUM(float, float)
JN_SUM(bfloat16, bfloat16)
JN_SUM(float16, float16)
JN_CONVERT(float, bfloat16)
JN_CONVERT(bfloat16, float)
JN_CONVERT(float16, bfloat16)
JN_CONVERT(bfloat16, float16)
#undef JN_SUM
#undef JN_CONVERT

}  // namespace jax_nixlep
