// The host's side of a launch.
#pragma once

#include <algorithm>

#include "cuda/device.cuh"

namespace jax_nixlep::cuda {

inline Params MakeParams(const Launch& l, int granules_at_once) {
  const RowFormat& f = l.format;
  const bool raw = f.wire == Wire::kSame || (f.wire == Wire::kFp8 && !f.dequantize);
  Params p{};
  p.control = l.control;
  p.region = l.region;
  p.g = l.geometry;
  p.tag = l.tag;
  p.ticket = l.ticket;
  p.order = l.order;
  p.granules = int32_t((raw ? f.row_bytes() : size_t(f.hidden) * TokenBytes(f.type)) / 16);
  p.segments = Divisor(uint32_t(std::max(1, (p.granules + kWarp * granules_at_once - 1) / (kWarp * granules_at_once))));
  p.ranks = Divisor(uint32_t(l.geometry.max_ranks));
  p.tokens = Divisor(uint32_t(l.geometry.max_tokens));
  p.experts = Divisor(uint32_t(l.geometry.experts_per_rank));
  p.rank_chunks = Divisor(uint32_t(l.geometry.rank_chunks));
  p.columns = Divisor(uint32_t(l.geometry.max_ranks * ((l.geometry.experts_per_rank + kWarp - 1) / kWarp)));
  p.value_bytes = int32_t(f.value_bytes());
  p.scale_bytes = int32_t(f.scale_bytes());
  p.wire_bytes = int32_t(f.wire_bytes());
  p.row_bytes = int32_t(f.row_bytes());
  p.ue8m0 = f.fp8.format == ScaleFormat::kUe8m0;
  p.round_scale = f.fp8.round_scale;
  return p;
}

inline int Blocks(int64_t units, int per_block, int most) {
  return int(std::clamp<int64_t>((units + per_block - 1) / per_block, 1, most));
}

// Preload of kernels.h, for the kernels of one file each.
cudaError_t PreloadTokens();
cudaError_t PreloadSums();
// To ask for a kernel's attributes loads it.
template <typename... Args>
cudaError_t LoadKernel(void (*kernel)(Args...)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

}  // namespace jax_nixlep::cuda
