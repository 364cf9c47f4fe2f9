// How a granule of tokens of type T becomes bytes of the wire, and back.
#pragma once

#include "cuda/device.cuh"
#include "cuda/numbers.cuh"

namespace jax_nixlep::cuda {

struct CopyCodec {
  static constexpr bool kRaw = true;
  using Loaded = Words<4>;
  __device__ static void Encode(const Params&, std::byte* row, int granule, const Words<4>& in, bool valid) {
    if (valid) Store(row + granule * 16, in);
  }
  __device__ static Loaded Load(const Params&, const std::byte* row, int granule) {
    return LoadOnce<4>(row + granule * 16);
  }
  __device__ static Words<4> Decode(const Loaded& in) { return in; }
};

template <typename T>
struct Bf16Codec {
  static constexpr bool kRaw = false;
  using Loaded = Granule<T, bf16>;
  __device__ static void Encode(const Params&, std::byte* row, int granule, const Words<4>& in, bool valid) {
    float x[kValues<T>];
    Unpack<T>(x, in);
    Loaded out;
    Pack<bf16>(out, x);
    if (valid) Store(row + granule * sizeof(Loaded), out);
  }
  __device__ static Loaded Load(const Params&, const std::byte* row, int granule) {
    return LoadOnce<kWordsOf<T, bf16>>(row + granule * sizeof(Loaded));
  }
  __device__ static Words<4> Decode(const Loaded& in) {
    float x[kValues<T>];
    Unpack<bf16>(x, in);
    Words<4> out;
    Pack<T>(out, x);
    return out;
  }
};

template <typename T>
struct Fp8Codec {
  static constexpr bool kRaw = false;
  static constexpr int kLanes = kQuantBlock / kValues<T>;  // lanes that share a scale
  using Values = Granule<T, e4m3>;
  struct Loaded {
    Values values;
    float scale;
  };
  // Lanes of a warp hold neighbouring granules; a row is whole quantisation blocks.
  __device__ static void Encode(const Params& p, std::byte* row, int granule, const Words<4>& in, bool valid) {
    float x[kValues<T>];
    Unpack<T>(x, in);
    float amax = kAmaxFloor;
#pragma unroll
    for (int i = 0; i < kValues<T>; ++i) amax = fmaxf(amax, fabsf(x[i]));
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, step));
    float scale = __fdiv_rn(kFp8Max, amax), inverse = __fmul_rn(amax, 1 / kFp8Max);
    if (p.round_scale) {
      const uint32_t bits = __float_as_uint(inverse);
      const uint32_t exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0);
      inverse = __uint_as_float(exponent << 23);
      scale = __uint_as_float((254 - exponent) << 23);
    }
#pragma unroll
    for (int i = 0; i < kValues<T>; ++i) x[i] = __fmul_rn(x[i], scale);
    Values out;
    Pack<e4m3>(out, x);
    if (!valid) return;
    Store(row + granule * sizeof(Values), out);
    if (granule % kLanes) return;
    std::byte* scales = row + p.value_bytes;
    const int block = granule / kLanes;
    if (p.ue8m0) {
      scales[block] = std::byte(__float_as_uint(inverse) >> 23);
    } else {
      reinterpret_cast<float*>(scales)[block] = inverse;
    }
  }
  __device__ static Loaded Load(const Params& p, const std::byte* row, int granule) {
    const std::byte* scales = row + p.value_bytes;
    const int block = granule / kLanes;
    const float scale =
        p.ue8m0 ? __uint_as_float(Ue8m0Bits(uint8_t(scales[block]))) : reinterpret_cast<const float*>(scales)[block];
    return {LoadOnce<kWordsOf<T, e4m3>>(row + granule * sizeof(Values)), scale};
  }
  __device__ static Words<4> Decode(const Loaded& in) {
    float x[kValues<T>];
    Unpack<e4m3>(x, in.values);
#pragma unroll
    for (int i = 0; i < kValues<T>; ++i) x[i] = __fmul_rn(x[i], in.scale);
    Words<4> out;
    Pack<T>(out, x);
    return out;
  }
};

// Calls function(codec) for tokens of the format.
template <typename Function>
void WithCodec(const RowFormat& f, bool encode, Function function) {
  if (f.wire == Wire::kSame || (f.wire == Wire::kFp8 && !encode && !f.dequantize)) return function(CopyCodec{});
  if (f.wire == Wire::kBf16) {
    if (f.type == TokenType::kFloat32) return function(Bf16Codec<float>{});
    if (f.type == TokenType::kFloat16) return function(Bf16Codec<f16>{});
    return function(CopyCodec{});
  }
  if (f.type == TokenType::kFloat32) return function(Fp8Codec<float>{});
  if (f.type == TokenType::kFloat16) return function(Fp8Codec<f16>{});
  return function(Fp8Codec<bf16>{});
}

}  // namespace jax_nixlep::cuda
