// The numbers of a granule, which is one 16-byte vector of tokens, or the same values on the wire.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <type_traits>

#include "cuda/access.cuh"

namespace jax_nixlep::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;
struct e4m3 {
  uint8_t bits;
};

template <typename T>
inline constexpr int kValues = 16 / int(sizeof(T));  // in a granule
template <typename T, typename W>
inline constexpr int kWordsOf = int(kValues<T> * sizeof(W) / 4);
template <typename T, typename W>
using Granule = Words<kWordsOf<T, W>>;  // of tokens of type T, stored as W

template <typename W, int kWords, int kCount>
__device__ inline void Unpack(float (&out)[kCount], const Words<kWords>& in) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const uint32_t w = in.w[i];
    if constexpr (sizeof(W) == 4) {
      out[i] = __uint_as_float(w);
    } else if constexpr (std::is_same_v<W, bf16>) {
      out[2 * i] = __uint_as_float(w << 16);
      out[2 * i + 1] = __uint_as_float(w & 0xFFFF0000u);
    } else if constexpr (std::is_same_v<W, f16>) {
      out[2 * i] = __half2float(__ushort_as_half(uint16_t(w)));
      out[2 * i + 1] = __half2float(__ushort_as_half(uint16_t(w >> 16)));
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        out[4 * i + j] = __half2float(__half(__nv_cvt_fp8_to_halfraw(uint8_t(w >> 8 * j), __NV_E4M3)));
      }
    }
  }
}

template <typename W, int kWords, int kCount>
__device__ inline void Pack(Words<kWords>& out, const float (&in)[kCount]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if constexpr (sizeof(W) == 4) {
      out.w[i] = __float_as_uint(in[i]);
    } else if constexpr (std::is_same_v<W, bf16>) {
      out.w[i] = uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(in[2 * i]))) |
                 uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(in[2 * i + 1]))) << 16;
    } else if constexpr (std::is_same_v<W, f16>) {
      out.w[i] = uint32_t(__half_as_ushort(__float2half_rn(in[2 * i]))) |
                 uint32_t(__half_as_ushort(__float2half_rn(in[2 * i + 1]))) << 16;
    } else {
      out.w[i] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        out.w[i] |= uint32_t(__nv_cvt_float_to_fp8(in[4 * i + j], __NV_SATFINITE, __NV_E4M3)) << 8 * j;
      }
    }
  }
}

}  // namespace jax_nixlep::cuda
