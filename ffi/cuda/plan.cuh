// The routing plan: which row each choice gets.
#pragma once

#include "cuda/device.cuh"

namespace jax_nixlep::cuda {

// `picked` has a word for each chunk of each source rank and expert, from PicksOf. `before` counts the rows of the
// expert in earlier chunks. The row of a token is then
//   base[expert] + before[chunk][expert] + popcount(picked[chunk][expert] below the token's bit).
struct Plan {
  int rank_chunks, chunks, stride;  // of one rank, of all; words of a chunk
  uint32_t* picked;
  int32_t *before, *demand, *kept, *base;

  __device__ Plan(const Geometry& g, std::byte* memory) {
    rank_chunks = g.rank_chunks;
    chunks = g.max_ranks * rank_chunks;
    stride = PlanStride(g);
    picked = reinterpret_cast<uint32_t*>(memory);
    before = reinterpret_cast<int32_t*>(picked + uint64_t(chunks) * stride);
    demand = before + uint64_t(chunks) * stride;
    kept = demand + stride + 1;  // `demand` and `base` end with their sum
    base = kept + stride;
  }
};

// Of the values of this lane and those before it.
__device__ inline int PrefixSum(int value) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, value, step);
    if (threadIdx.x % kWarp >= step) value += other;
  }
  return value;
}

// What the senders picked, gathered by `blocks` blocks.
__device__ inline void GatherPicks(const Op& op, const Params& p, const Plan& plan, int first_block, int blocks) {
  const int words = plan.chunks * p.g.experts_per_rank;
  for (int i = first_block * blockDim.x + threadIdx.x; i < words; i += blocks * blockDim.x) {
    const int chunk = p.experts.Quotient(i), e = i - chunk * p.g.experts_per_rank;
    const int r = p.rank_chunks.Quotient(chunk), own = chunk - r * plan.rank_chunks;
    const auto* picks = reinterpret_cast<const uint32_t*>(TablesOf(op, p, r) + p.g.picks);
    const bool sent = op.live[r] && own * kChunk < op.tokens[r];
    plan.picked[uint64_t(chunk) * plan.stride + e] = sent ? picks[own * p.g.experts_per_rank + e] : 0;
  }
}

// Makes the kept rows fit: the largest equal limit that does; what is left over goes, one row each, to the first
// experts above it. One warp.
__device__ __noinline__ inline void LimitRows(const int32_t* demand, int32_t* kept, int32_t* base, int num_experts,
                                              int num_rows) {
  const int lane = threadIdx.x % kWarp;
  auto total = [&](int most) {
    int sum = 0;
    for (int e = lane; e < num_experts; e += kWarp) sum += min(demand[e], most);
    return __reduce_add_sync(kAllLanes, sum);
  };
  int limit = 0, high = num_rows + 1;
  while (high - limit > 1) {
    const int middle = limit + (high - limit) / 2;
    (total(middle) <= num_rows ? limit : high) = middle;
  }
  const int left = num_rows - total(limit);
  int next = 0, extras = 0;
  for (int e0 = 0; e0 < num_experts; e0 += kWarp) {
    const int e = e0 + lane, wanted = e < num_experts ? demand[e] : 0;
    const unsigned above = __ballot_sync(kAllLanes, wanted > limit);
    const int before = extras + __popc(above & ((1u << lane) - 1));
    const int rows = wanted > limit ? limit + (before < left) : wanted;
    const int sum = PrefixSum(rows);
    if (e < num_experts) kept[e] = rows, base[e] = next + sum - rows;
    extras += __popc(above);
    next += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
  if (lane == 0) base[num_experts] = next;
}

// Counts and limits. One block; a lane has an expert, with kAtOnce chunks of it in flight: many if memory is far.
template <int kAtOnce>
__device__ void FinishPlan(const Params& p, const Plan& plan, int64_t num_rows) {
  const int lane = threadIdx.x % kWarp, E = p.g.experts_per_rank;
  for (int e = threadIdx.x; e < E; e += blockDim.x) {
    int running = 0;
    for (int c0 = 0; c0 < plan.chunks; c0 += kAtOnce) {
      uint32_t picked[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        picked[i] = c0 + i < plan.chunks ? plan.picked[uint64_t(c0 + i) * plan.stride + e] : 0;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (c0 + i < plan.chunks) plan.before[uint64_t(c0 + i) * plan.stride + e] = running;
        running += __popc(picked[i]);
      }
    }
    plan.demand[e] = running;
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    int next = 0;
    for (int e0 = 0; e0 < E; e0 += kWarp) {
      const int e = e0 + lane, wanted = e < E ? plan.demand[e] : 0;
      const int sum = PrefixSum(wanted);
      if (e < E) plan.kept[e] = wanted, plan.base[e] = next + sum - wanted;
      next += __shfl_sync(kAllLanes, sum, kWarp - 1);
    }
    if (lane == 0) plan.demand[E] = plan.base[E] = next;
    if (next > num_rows) LimitRows(plan.demand, plan.kept, plan.base, E, int(num_rows));
  }
  __syncthreads();
}

__device__ inline int UsedRows(const Params& p, const Plan& plan) { return plan.base[p.g.experts_per_rank]; }

}  // namespace jax_nixlep::cuda
