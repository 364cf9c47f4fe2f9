#include <algorithm>
#include <climits>
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace jax_nixlep::cuda {
namespace {

constexpr int kAhead = 2;                 // tokens that a block has in flight
constexpr int kUnroll = 4;                // granules of a row that a lane has in flight
constexpr int64_t kSmallBytes = 1 << 20;  // may be read in vain
constexpr int kMoveThreads = 512, kSumThreads = 256;

// --- Codecs: how a granule of tokens of type T becomes bytes of the wire, and back. ---

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

// --- Sending tokens: every token is written once, into the message that all peers read. ---

// Which tokens of each chunk go to each expert: a word, for the expert's rank, in which a repeated id counts once. So
// peers need not look through all choices to find theirs.
__device__ void SendPicks(const Op& op, const Params& p, const SendTokensArgs& a) {
  static_assert(kChunk == kWarp);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int K = p.g.top_k, E = p.g.experts_per_rank, rank_columns = (E + kWarp - 1) / kWarp;
  const int num_units = ChunksOf(a.num_tokens) * int(p.columns.value);
  // From the last block on: the first ones send the other tables.
  for (int unit = warp * gridDim.x + gridDim.x - 1 - blockIdx.x; unit < num_units; unit += gridDim.x * warps) {
    const int chunk = p.columns.Quotient(unit), column = unit - chunk * int(p.columns.value);
    const int r = rank_columns == 1 ? column : column / rank_columns, first = (column - r * rank_columns) * kWarp;
    const int t = chunk * kChunk + lane, count = min(kWarp, E - first);
    if (!op.live[r]) continue;
    uint32_t chosen = 0, picks = 0;
    if (t < a.num_tokens) {
      const int32_t* ids = a.ids + uint64_t(t) * K;
      auto choose = [&](uint32_t id) {
        const uint32_t expert = id - uint32_t(r * E + first);
        if (expert < uint32_t(count)) chosen |= 1u << expert;
      };
      if (K % 4 == 0) {
#pragma unroll 2
        for (int k = 0; k < K; k += 4) {
          const Words<4> four = LoadOnce<4>(reinterpret_cast<const std::byte*>(ids + k));
#pragma unroll
          for (int i = 0; i < 4; ++i) choose(four.w[i]);
        }
      } else {
        for (int k = 0; k < K; ++k) choose(ids[k]);
      }
    }
#pragma unroll 4
    for (int e = 0; e < count; ++e) {
      const uint32_t tokens = __ballot_sync(kAllLanes, chosen >> e & 1);
      if (lane == e) picks = tokens;
    }
    std::byte* to = op.pointer[r] ? op.inbox(p.g, op.pointer[r], op.rank) : op.outbox(p.g, op.region, r);
    if (lane < count) reinterpret_cast<uint32_t*>(to + p.g.picks)[chunk * E + first + lane] = picks;
  }
}

template <typename Codec>
__global__ void __launch_bounds__(1024)
    SendTokensKernel(const __grid_constant__ Params p, const __grid_constant__ SendTokensArgs a) {
  __shared__ Op op;
  const int G = p.granules, K = p.g.top_k, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  DeviceState& state = p.control->state;
  // The first tokens and the choices are on their way while the state is read.
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  Words<4> ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int t = blockIdx.x + i * gridDim.x;
    if (t < a.num_tokens && threadIdx.x < G) ahead[i] = LoadOnce<4>(a.x + (uint64_t(t) * G + threadIdx.x) * 16);
  }
  const int choices = a.num_tokens * K;
  const int32_t first_id = thread < choices ? a.ids[thread] : -1;
  const float first_weight = thread < choices && a.weights ? a.weights[thread] : 0;
  const uint64_t begun_ns = Now();
  Begin(op, p, /*sending=*/true);
  const uint32_t head = PassHead(p);
  AwaitBank(op, p);
  if (op.bad) {
    if (a.clean_ids) {
      Fill(a.clean_ids, uint64_t(a.num_tokens) * K * sizeof(int32_t), 0xFFFFFFFFu);
      if (blockIdx.x == 0 && threadIdx.x == 0) *a.invalid_ids = 0;
    }
    return EndSend(op, p, head, begun_ns);
  }
  std::byte* message = op.outbox(p.g, op.region, op.rank);
  auto* sent_ids = reinterpret_cast<int32_t*>(message);
  auto* sent_weights = reinterpret_cast<float*>(message + p.g.second);
  const int num_slots = p.g.max_ranks * p.g.experts_per_rank;

  // Tables are brought, not fetched: the receiving half begins with them.
  for (int i = thread; i < choices; i += threads) {
    int32_t id = i == thread ? first_id : a.ids[i];
    const float weight = i == thread ? first_weight : a.weights ? a.weights[i] : 0;
    if (a.clean_ids) {
      const bool slot = id >= 0 && id < num_slots;
      if (!slot && id != -1) atomicAdd(&state.invalid_now, 1u);
      id = slot ? id : -1;
      a.clean_ids[i] = id;
    }
    for (int r = 0; r < p.g.max_ranks; ++r) {
      if (!op.pointer[r] || !op.live[r]) continue;
      std::byte* inbox = op.inbox(p.g, op.pointer[r], op.rank);
      if (a.clean_ids) reinterpret_cast<int32_t*>(inbox)[i] = id;
      if (a.weights) reinterpret_cast<float*>(inbox + p.g.second)[i] = weight;
    }
    if (op.num_put_peers) {
      if (a.clean_ids) sent_ids[i] = id;
      if (a.weights) sent_weights[i] = weight;
    }
  }
  if (a.clean_ids) SendPicks(op, p, a);
  for (int t0 = blockIdx.x; t0 < a.num_tokens; t0 += kAhead * gridDim.x) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int t = t0 + i * gridDim.x;
      if (t >= a.num_tokens) break;
      std::byte* row = message + p.g.rows + uint64_t(t) * p.g.row_bytes;
      for (int start = warp * kWarp; start < G; start += blockDim.x) {  // whole warps: lanes share scales
        const int granule = start + lane;
        const bool valid = granule < G;
        Words<4> in = ahead[i];
        if (start != warp * kWarp) in = valid ? LoadOnce<4>(a.x + (uint64_t(t) * G + granule) * 16) : Words<4>{};
        Codec::Encode(p, row, granule, in, valid);
      }
      if (a.x_scales) {
        for (int i = threadIdx.x; i < p.scale_bytes; i += blockDim.x) {
          row[p.value_bytes + i] = a.x_scales[uint64_t(t) * p.scale_bytes + i];
        }
      }
      if (const int later = t + kAhead * gridDim.x; later < a.num_tokens && threadIdx.x < G) {
        ahead[i] = LoadOnce<4>(a.x + (uint64_t(later) * G + threadIdx.x) * 16);
      }
      if (op.num_put_peers && G) {
        __threadfence_system();
        __syncthreads();
        for (int r = warp; r < p.g.max_ranks; r += blockDim.x / kWarp) {
          if (op.pointer[r] || !op.live[r]) continue;
          bool routed = false;
          for (int k = lane; k < K; k += kWarp) {
            const int32_t id = a.ids[uint64_t(t) * K + k];
            routed |= id >= 0 && id < num_slots && id / p.g.experts_per_rank == r;
          }
          if (!__any_sync(kAllLanes, routed)) continue;
          const uint64_t offset = op.inbox_offset(p.g) + uint64_t(row - message);
          Put<UCS_DEVICE_LEVEL_WARP>(op, state, r, row, offset, uint64_t(p.wire_bytes));
          if (lane == 0) atomicAdd(&state.counters[r].bytes_out, (unsigned long long)p.wire_bytes);
        }
        __threadfence_system();
      }
    }
  }

  if (IsLast(op, &state.tails, gridDim.x)) {
    for (int r = threadIdx.x; r < p.g.max_ranks; r += blockDim.x) {
      if (op.live[r] && op.pointer[r]) SignalByPointer(op, p, r, a.num_tokens);
    }
    if (threadIdx.x == blockDim.x - 1 && a.clean_ids) {
      const uint32_t invalid = atomicExch(&state.invalid_now, 0u);
      *a.invalid_ids = int32_t(invalid);
      if (invalid) atomicAdd(&state.invalid_ids, (unsigned long long)invalid);
    }
    if (op.num_put_peers) {
      const uint64_t offset = op.inbox_offset(p.g), table_bytes = uint64_t(a.num_tokens) * K * sizeof(int32_t);
      for (int r = warp; r < p.g.max_ranks; r += blockDim.x / kWarp) {
        if (op.pointer[r] || !op.live[r]) continue;
        if (a.clean_ids) {
          Put<UCS_DEVICE_LEVEL_WARP>(op, state, r, message, offset, table_bytes);
          const uint64_t picks_bytes = uint64_t(ChunksOf(a.num_tokens)) * p.g.experts_per_rank * sizeof(uint32_t);
          Put<UCS_DEVICE_LEVEL_WARP>(op, state, r, op.outbox(p.g, op.region, r) + p.g.picks, offset + p.g.picks,
                                     picks_bytes);
        }
        if (a.weights) Put<UCS_DEVICE_LEVEL_WARP>(op, state, r, message + p.g.second, offset + p.g.second, table_bytes);
        SignalByPut(op, p, r, a.num_tokens);
      }
    }
  }
  EndSend(op, p, head, begun_ns);
}

// --- The routing plan: which row each choice gets. ---
//
// `picked` has a word for each chunk of each source rank and expert, from SendPicks. `before` counts the rows of the
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

// Rows are pulled where that is possible; tables were always brought.
__device__ const std::byte* TablesOf(const Op& op, const Params& p, int r) { return op.inbox(p.g, op.region, r); }
__device__ const std::byte* TokensOf(const Op& op, const Params& p, int r) {
  return op.pointer[r] ? op.outbox(p.g, op.pointer[r], r) : op.inbox(p.g, op.region, r);
}

// What the senders picked, gathered by `blocks` blocks.
__device__ void GatherPicks(const Op& op, const Params& p, const Plan& plan, int first_block, int blocks) {
  const int words = plan.chunks * p.g.experts_per_rank;
  for (int i = first_block * blockDim.x + threadIdx.x; i < words; i += blocks * blockDim.x) {
    const int chunk = p.experts.Quotient(i), e = i - chunk * p.g.experts_per_rank;
    const int r = p.rank_chunks.Quotient(chunk), own = chunk - r * plan.rank_chunks;
    const auto* picks = reinterpret_cast<const uint32_t*>(TablesOf(op, p, r) + p.g.picks);
    const bool sent = op.live[r] && own * kChunk < op.tokens[r];
    plan.picked[uint64_t(chunk) * plan.stride + e] = sent ? picks[own * p.g.experts_per_rank + e] : 0;
  }
}

// The largest equal limit that fits; what is left over goes, one row each, to the first experts above it. One warp.
__device__ __noinline__ void FindLimit(const int32_t* demand, int num_experts, int num_rows, int& limit, int& left) {
  auto total = [&](int most) {
    int sum = 0;
    for (int e = threadIdx.x % kWarp; e < num_experts; e += kWarp) sum += min(demand[e], most);
    return __reduce_add_sync(kAllLanes, sum);
  };
  int low = 0, high = num_rows + 1;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (total(middle) <= num_rows ? low : high) = middle;
  }
  limit = low;
  left = num_rows - total(limit);
}

// Counts and limits. One block.
__device__ void FinishPlan(const Params& p, const Plan& plan, int64_t num_rows) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, E = p.g.experts_per_rank;
  for (int e = warp; e < E; e += blockDim.x / kWarp) {
    int running = 0;
    for (int c0 = 0; c0 < plan.chunks; c0 += kWarp) {
      const int c = c0 + lane;
      const int count = c < plan.chunks ? __popc(plan.picked[uint64_t(c) * plan.stride + e]) : 0;
      int sum = count;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += other;
      }
      if (c < plan.chunks) plan.before[uint64_t(c) * plan.stride + e] = running + sum - count;
      running += __shfl_sync(kAllLanes, sum, kWarp - 1);
    }
    if (lane == 0) plan.demand[e] = running;
  }
  __syncthreads();
  if (warp == 0) {
    int demand = 0;
    for (int e = lane; e < E; e += kWarp) demand += plan.demand[e];
    demand = __reduce_add_sync(kAllLanes, demand);
    int limit = INT_MAX, left = 0;
    if (demand > num_rows) FindLimit(plan.demand, E, int(num_rows), limit, left);
    int next = 0, extras = 0;
    for (int e0 = 0; e0 < E; e0 += kWarp) {
      const int e = e0 + lane, wanted = e < E ? plan.demand[e] : 0;
      const unsigned above = __ballot_sync(kAllLanes, wanted > limit);
      const int before = extras + __popc(above & ((1u << lane) - 1));
      const int kept = wanted > limit ? limit + (before < left) : wanted;
      extras += __popc(above);
      int sum = kept;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += other;
      }
      if (e < E) plan.kept[e] = kept, plan.base[e] = next + sum - kept;
      next += __shfl_sync(kAllLanes, sum, kWarp - 1);
    }
    if (lane == 0) plan.base[E] = next, plan.demand[E] = demand;
  }
  __syncthreads();
}

__device__ int UsedRows(const Params& p, const Plan& plan) { return plan.base[p.g.experts_per_rank]; }

// The small outputs. One block.
__device__ void ReportPeers(const Op& op, const Params& p, int32_t* peers) {
  for (int r = threadIdx.x; r < p.g.max_ranks; r += blockDim.x) {
    peers[r] = op.live[r] ? 0 : p.control->state.peers[r].masked == op.stamp ? 2 : 1;
  }
}
__device__ void ReportPlan(const Op& op, const Params& p, const Plan& plan, const ReceiveTokensArgs& a) {
  for (int e = threadIdx.x; e < p.g.experts_per_rank; e += blockDim.x) {
    a.group_sizes[e] = plan.kept[e];
    a.demand[e] = plan.demand[e];
  }
  ReportPeers(op, p, a.peers);
  if (threadIdx.x == 0) {
    const int dropped = plan.demand[p.g.experts_per_rank] - UsedRows(p, plan);
    *a.dropped = dropped;
    if (dropped) atomicAdd(&p.control->state.dropped_rows, (unsigned long long)dropped);
  }
}

__global__ void __launch_bounds__(kMoveThreads)
    PlanKernel(const __grid_constant__ Params p, const __grid_constant__ ReceiveTokensArgs a) {
  __shared__ Op op;
  Begin(op, p, /*sending=*/false);
  AwaitAll(op, p);
  if (op.bad) return;  // the kernel that follows comes to the same end
  const Plan plan(p.g, p.control->state.scratch);
  GatherPicks(op, p, plan, blockIdx.x, gridDim.x);
  if (IsLast(op, &p.control->state.tails, gridDim.x)) {
    FinishPlan(p, plan, a.num_rows);
    ReportPlan(op, p, plan, a);
  }
}

// --- Receiving tokens ---

// A small table of both banks, before the state says which. Spread over the first blocks.
__device__ void PrefetchTable(const Params& p, uint64_t offset, int num_bytes) {
  const int lines = (num_bytes + 127) / 128, all = kBanks * p.g.max_ranks * lines;
  if (all > 4096) return;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < all; i += gridDim.x * blockDim.x) {
    Prefetch(p.region + p.g.inbox + uint64_t(i / lines) * p.g.message_bytes + offset + i % lines * 128);
  }
}

template <typename Codec, bool kPlanned>
__global__ void __launch_bounds__(kMoveThreads, Codec::kRaw ? 2 : 1)
    ReceiveTokensKernel(const __grid_constant__ Params p, const __grid_constant__ ReceiveTokensArgs a) {
  extern __shared__ std::byte dynamic[];
  __shared__ Op op;
  __shared__ uint32_t taken[kMaxRanks];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int R = p.g.max_ranks, T = p.g.max_tokens, K = p.g.top_k, E = p.g.experts_per_rank, G = p.granules;
  const int segments = p.segments.value;
  const int first_unit = blockIdx.x * warps + warp, num_units = R * T * segments, step = gridDim.x * warps;
  if (!kPlanned) PrefetchTable(p, p.g.picks, p.g.rank_chunks * E * int(sizeof(uint32_t)));
  PrefetchTable(p, 0, T * K * int(sizeof(int32_t)));
  if (a.weighted) PrefetchTable(p, p.g.second, T * K * int(sizeof(float)));
  Begin(op, p, /*sending=*/false);
  for (int r = threadIdx.x; r < R; r += blockDim.x) taken[r] = 0;
  AwaitAll(op, p);
  auto poison = [&] {
    Fill(a.rows, a.num_rows * p.row_bytes, 0xFFFFFFFFu);
    Fill(a.scales, a.num_rows * p.scale_bytes, 0xFFFFFFFFu);
    Fill(a.row_weights, a.num_rows * sizeof(float), 0xFFFFFFFFu);
    Fill(a.group_sizes, E * sizeof(int32_t), 0);
    Fill(a.demand, E * sizeof(int32_t), 0);
    Fill(a.row_of, uint64_t(R) * T * K * sizeof(int32_t), 0xFFFFFFFFu);
    Fill(a.dropped, sizeof(int32_t), 0);
    if (blockIdx.x == 0) ReportPeers(op, p, a.peers);
  };
  if (op.bad) {
    poison();
    EndReceive(op, p, true);
    return;
  }
  Plan plan(p.g, kPlanned ? p.control->state.scratch : dynamic);
  const int words = (E + kWarp - 1) / kWarp;
  if constexpr (kPlanned) {  // limits and starts of the experts are wanted for every row
    auto* near = reinterpret_cast<int32_t*>(dynamic);
    for (int i = threadIdx.x; i < 2 * plan.stride + 1; i += blockDim.x) near[i] = plan.kept[i];
    plan.kept = near;
    plan.base = near + plan.stride;
    __syncthreads();
  }
  if constexpr (!kPlanned) {
    GatherPicks(op, p, plan, 0, 1);
    __syncthreads();
    FinishPlan(p, plan, a.num_rows);
  }

  // Each token is read once and stored to all its rows.
  for (int unit = first_unit; unit < num_units; unit += step) {
    const int token_index = p.segments.Quotient(unit), segment = unit - token_index * segments;
    const int r = p.tokens.Quotient(token_index), t = token_index - r * T;
    if (t >= op.tokens[r]) continue;
    const std::byte* token = TokensOf(op, p, r) + p.g.rows + uint64_t(t) * p.g.row_bytes;
    const int chunk = r * plan.rank_chunks + t / kChunk, bit = t % kChunk;
    typename Codec::Loaded loaded[kUnroll];
    bool have = false;
    for (int word = 0; word < words; ++word) {
      const int e = word * kWarp + lane;
      int row = -1;
      if (e < E) {
        const uint64_t at = uint64_t(chunk) * plan.stride + e;
        const uint32_t picked = plan.picked[at];
        const int position = plan.before[at] + __popc(picked & ((1u << bit) - 1));
        if ((picked >> bit & 1) && position < plan.kept[e]) row = plan.base[e] + position;
      }
      unsigned rows = __ballot_sync(kAllLanes, row >= 0);
      if (!rows) continue;
      const int start = segment * kWarp * kUnroll + lane;
      if (!have) {
        have = true;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (start + u * kWarp < G) loaded[u] = Codec::Load(p, token, start + u * kWarp);
        }
        if (segment == 0 && lane == 0) atomicAdd(&taken[r], 1u);
      }
      for (; rows; rows &= rows - 1) {
        std::byte* out = a.rows + uint64_t(__shfl_sync(kAllLanes, row, __ffs(rows) - 1)) * p.row_bytes;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (start + u * kWarp < G) Store(out + (start + u * kWarp) * 16, Codec::Decode(loaded[u]));
        }
        if (Codec::kRaw && a.scales && segment == 0) {
          const uint64_t index = uint64_t(out - a.rows) / p.row_bytes;
          const std::byte* from = token + p.value_bytes;
          std::byte* to = a.scales + index * p.scale_bytes;
          if (p.ue8m0) {
            for (int i = lane; i < p.scale_bytes; i += kWarp) to[i] = from[i];
          } else {
            for (int i = lane; i < p.scale_bytes / 4; i += kWarp) {
              Store(to + i * 4, LoadOnce<1>(from + i * 4));
            }
          }
        }
      }
    }
  }

  // The handle: rows of each choice, and the weights of each row. The last warps begin: they may have had no token.
  for (int unit = step - 1 - first_unit; unit < R * T; unit += step) {
    const int r = p.tokens.Quotient(unit), t = unit - r * T;
    int32_t* rows = a.row_of + uint64_t(unit) * K;
    if (t >= op.tokens[r]) {
      for (int k = lane; k < K; k += kWarp) rows[k] = -1;
      continue;
    }
    const std::byte* message = TablesOf(op, p, r);
    const auto* ids = reinterpret_cast<const int32_t*>(message) + uint64_t(t) * K;
    const auto* weights = reinterpret_cast<const float*>(message + p.g.second) + uint64_t(t) * K;
    const int bit = t % kChunk;
    for (int k0 = 0; k0 < K; k0 += kWarp) {
      const int k = k0 + lane;
      const int32_t id = k < K ? ids[k] : -1;
      const float weight = k < K && a.weighted ? weights[k] : 1.0f;
      const int e = id - op.rank * E;
      int row = -1;
      if (id >= 0 && e >= 0 && e < E) {
        const uint64_t at = uint64_t(r * plan.rank_chunks + t / kChunk) * plan.stride + e;
        const int position = plan.before[at] + __popc(plan.picked[at] & ((1u << bit) - 1));
        if (position < plan.kept[e]) row = plan.base[e] + position;
      }
      if (k < K) rows[k] = row;
      // A repeated id is one row, with the sum of its weights in the order of the choices.
      float sum = 0;
      int leader = K;
      for (int j0 = 0; j0 < K; j0 += kWarp) {
        const int j = j0 + lane;
        const int32_t other = j0 == k0 ? id : j < K ? ids[j] : -1;
        const float other_weight = j0 == k0 ? weight : j < K && a.weighted ? weights[j] : 1.0f;
        for (int i = 0; i < min(kWarp, K - j0); ++i) {
          const int32_t id_i = __shfl_sync(kAllLanes, other, i);
          const float weight_i = __shfl_sync(kAllLanes, other_weight, i);
          if (id_i != id) continue;
          leader = min(leader, j0 + i);
          sum = __fadd_rn(sum, weight_i);
        }
      }
      if (row >= 0 && leader == k) a.row_weights[row] = a.weighted ? sum : 1.0f;
    }
  }
  if (!kPlanned && blockIdx.x == gridDim.x - 1) ReportPlan(op, p, plan, a);
  const int64_t used = UsedRows(p, plan), spare = a.num_rows - used;
  Fill(a.rows + used * p.row_bytes, spare * p.row_bytes, 0);
  Fill(a.row_weights + used, spare * sizeof(float), 0);
  if (a.scales) Fill(a.scales + used * p.scale_bytes, spare * p.scale_bytes, 0);
  __syncthreads();
  for (int r = threadIdx.x; r < R; r += blockDim.x) {
    if (taken[r]) atomicAdd(&p.control->state.counters[r].bytes_in, (unsigned long long)taken[r] * p.wire_bytes);
  }
  if (!EndReceive(op, p, true)) poison();
}

// Rows, or weights only, along the handle of an earlier dispatch.
template <typename Codec>
__global__ void __launch_bounds__(kMoveThreads, Codec::kRaw ? 2 : 1)
    ReceiveAlongKernel(const __grid_constant__ Params p, const __grid_constant__ ReceiveAlongArgs a) {
  __shared__ Op op;
  __shared__ int used;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int R = p.g.max_ranks, T = p.g.max_tokens, K = p.g.top_k, G = p.granules;
  Begin(op, p, /*sending=*/false);
  if (threadIdx.x == 0) used = 0;
  AwaitAll(op, p);
  if (!op.bad) {  // rows of a handle are packed: those past its largest are padding
    int most = 0;
    for (int i = threadIdx.x; i < R * T * K; i += blockDim.x) most = max(most, a.row_of[i] + 1);
    atomicMax(&used, most);
    __syncthreads();
    if (threadIdx.x == 0 && used > a.num_rows) Fail(op, p, Failure::kBadHandle, op.rank);
    __syncthreads();
  }
  auto poison = [&] {
    Fill(a.rows, a.num_rows * p.row_bytes, 0xFFFFFFFFu);
    Fill(a.row_weights, a.num_rows * sizeof(float), 0xFFFFFFFFu);
  };
  if (op.bad) {
    poison();
    EndReceive(op, p, true);
    return;
  }
  const int segments = p.segments.value;
  for (int unit = blockIdx.x * warps + warp; unit < R * T * segments; unit += gridDim.x * warps) {
    const int token_index = p.segments.Quotient(unit), segment = unit - token_index * segments;
    const int r = p.tokens.Quotient(token_index), t = token_index - r * T;
    const int32_t* rows = a.row_of + uint64_t(token_index) * K;
    const bool sent = t < op.tokens[r];  // a masked peer sends nothing: its rows become zeros
    const std::byte* token = TokensOf(op, p, r) + p.g.rows + uint64_t(t) * p.g.row_bytes;
    const auto* weights = reinterpret_cast<const float*>(TablesOf(op, p, r) + p.g.second) + uint64_t(t) * K;
    const int start = segment * kWarp * kUnroll + lane;
    typename Codec::Loaded loaded[kUnroll];
    bool have = false;
    for (int k0 = 0; k0 < K; k0 += kWarp) {
      const int k = k0 + lane;
      int row = k < K ? rows[k] : -1;
      float sum = 0;
      if (row >= 0) {
        int leader = K;
        for (int j = 0; j < K; ++j) {
          if (rows[j] != row) continue;
          leader = min(leader, j);
          if (a.row_weights && sent) sum = __fadd_rn(sum, weights[j]);
        }
        if (leader != k) row = -1;
      }
      if (segment == 0 && row >= 0 && a.row_weights) a.row_weights[row] = sum;
      for (unsigned leaders = __ballot_sync(kAllLanes, row >= 0); leaders; leaders &= leaders - 1) {
        if (!have && sent) {
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            if (start + u * kWarp < G) loaded[u] = Codec::Load(p, token, start + u * kWarp);
          }
          have = true;
        }
        std::byte* out = a.rows + uint64_t(__shfl_sync(kAllLanes, row, __ffs(leaders) - 1)) * p.row_bytes;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (start + u * kWarp < G) {
            Store(out + (start + u * kWarp) * 16, sent ? Codec::Decode(loaded[u]) : Words<4>{});
          }
        }
      }
    }
  }
  Fill(a.rows + uint64_t(used) * p.row_bytes, uint64_t(a.num_rows - used) * p.row_bytes, 0);
  if (a.row_weights) Fill(a.row_weights + used, uint64_t(a.num_rows - used) * sizeof(float), 0);
  if (!EndReceive(op, p, true)) poison();
}

// --- Sums of rows, back to the tokens ---

// Blocks of one blockIdx.y serve one destination.
constexpr int kSumUnroll = 4, kSumRows = 2,
              kSumBlocks = 2;  // granules of a row, and rows, that a lane has in flight; blocks of an SM

template <typename T_, typename W>
__global__ void __launch_bounds__(kSumThreads, kSumBlocks)
    SendSumsKernel(const __grid_constant__ Params p, const __grid_constant__ SendSumsArgs a) {
  constexpr int V = kValues<T_>;
  __shared__ Op op;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int T = p.g.max_tokens, K = p.g.top_k, G = p.granules, to = blockIdx.y;
  const int segments = p.segments.value;
  const int first_unit = blockIdx.x * warps + warp, step = gridDim.x * warps;
  DeviceState& state = p.control->state;
  auto choices_of = [&](int t) { return a.row_of + (uint64_t(to) * T + t) * K; };
  // The first choices are on their way while the state is read.
  int next_row =
      p.segments.Quotient(first_unit) < T && lane < K ? choices_of(p.segments.Quotient(first_unit))[lane] : -1;
  const uint64_t begun_ns = Now();
  Begin(op, p, /*sending=*/true);
  const uint32_t head = PassHead(p);
  AwaitBank(op, p);
  if (op.bad || !op.live[to]) return EndSend(op, p, head, begun_ns);

  const bool by_put = op.pointer[to] == nullptr;
  std::byte* message = by_put ? op.outbox(p.g, op.region, to) : op.inbox(p.g, op.pointer[to], op.rank);
  auto* present = reinterpret_cast<int32_t*>(message);
  auto* scalars = reinterpret_cast<float*>(message + p.g.second);
  const int parts = by_put ? 1 : segments;  // a put moves whole rows
  if (by_put) next_row = first_unit < T && lane < K ? choices_of(first_unit)[lane] : -1;
  uint32_t sent = 0;
  for (int unit = first_unit; unit < T * parts; unit += step) {
    const int t = by_put ? unit : p.segments.Quotient(unit), first_segment = unit - t * parts;
    const int last_segment = by_put ? segments : first_segment + 1;
    const int32_t* choices = choices_of(t);
    const int this_row = next_row;
    const int next_t = by_put ? unit + step : p.segments.Quotient(unit + step);
    if (next_t < T) next_row = lane < K ? choices_of(next_t)[lane] : -1;
    std::byte* out = message + p.g.rows + uint64_t(t) * p.g.row_bytes;
    bool any = false;
    for (int segment = first_segment; segment < last_segment; ++segment) {
      const int start = segment * kWarp * kSumUnroll + lane;
      float sum[kSumUnroll][V] = {};
      for (int k0 = 0; k0 < K; k0 += kWarp) {
        const int k = k0 + lane;
        int row = k0 == 0 ? this_row : k < K ? choices[k] : -1;
        if (row >= a.num_rows) {
          Fail(op, p, Failure::kBadHandle, op.rank);
          row = -1;
        }
        any |= row >= 0;
        if (segment == 0 && a.row_scalars && k < K) {
          scalars[uint64_t(t) * K + k] = row < 0 ? 0.0f : a.row_scalars[row];
        }
        const unsigned same = __match_any_sync(kAllLanes, row);
        bool leads = row >= 0 && (same & ((1u << lane) - 1)) == 0;
        for (int j = 0; j < k0 && leads; ++j) leads = choices[j] != row;
        const float weight = leads && G ? a.row_weights[row] : 0;
        for (unsigned leaders = __ballot_sync(kAllLanes, leads && G); leaders;) {
          Words<4> x[kSumRows][kSumUnroll];
          int from[kSumRows];
#pragma unroll
          for (int i = 0; i < kSumRows; ++i) {
            from[i] = leaders ? __ffs(leaders) - 1 : -1;
            leaders &= leaders - 1;
            if (from[i] < 0) continue;
            const std::byte* in = a.rows + uint64_t(__shfl_sync(kAllLanes, row, from[i])) * p.row_bytes;
#pragma unroll
            for (int u = 0; u < kSumUnroll; ++u) {
              if (start + u * kWarp < G) x[i][u] = LoadOnce<4>(in + (start + u * kWarp) * 16);
            }
          }
#pragma unroll
          for (int i = 0; i < kSumRows; ++i) {
            if (from[i] < 0) continue;
            const float scale = __shfl_sync(kAllLanes, weight, from[i]);  // after the loads: it is one, too
#pragma unroll
            for (int u = 0; u < kSumUnroll; ++u) {
              float values[V];
              Unpack<T_>(values, x[i][u]);
#pragma unroll
              for (int v = 0; v < V; ++v) {  // a product, then an addition: the bits of the CPU
                sum[u][v] = __fadd_rn(sum[u][v], __fmul_rn(scale, values[v]));
              }
            }
          }
        }
      }
      any = __any_sync(kAllLanes, any);
      if (segment == 0 && lane == 0) present[t] = any;
      if (!any) break;
#pragma unroll
      for (int u = 0; u < kSumUnroll; ++u) {
        if (start + u * kWarp >= G) continue;
        Granule<T_, W> y;
        Pack<W>(y, sum[u]);
        Store(out + (start + u * kWarp) * sizeof(y), y);
      }
    }
    if (next_row >= 0 && next_row < a.num_rows && next_t < T && !by_put) {
      const int segment_bytes = kWarp * kSumUnroll * 16, at = (unit + step - next_t * parts) * segment_bytes;
      for (int i = 0; i < segment_bytes && at + i < p.row_bytes; i += 128) {
        Prefetch(a.rows + uint64_t(next_row) * p.row_bytes + at + i);
      }
    }
    if (!any) continue;
    if (first_segment == 0) ++sent;
    if (by_put && G) {
      __threadfence_system();
      __syncwarp();
      Put<UCS_DEVICE_LEVEL_WARP>(op, state, to, out, op.inbox_offset(p.g) + uint64_t(out - message),
                                 uint64_t(p.wire_bytes));
      __threadfence_system();
    }
  }
  if (lane == 0 && sent && to != op.rank) {
    atomicAdd(&state.counters[to].bytes_out, (unsigned long long)sent * p.wire_bytes);
  }
  if (IsLast(op, &state.arrivals[to], gridDim.x)) {
    if (!by_put && threadIdx.x == 0) SignalByPointer(op, p, to, a.num_tokens);
    if (by_put && warp == 0) {
      const uint64_t offset = op.inbox_offset(p.g);
      Put<UCS_DEVICE_LEVEL_WARP>(op, state, to, message, offset, T * sizeof(int32_t));
      if (a.row_scalars) {
        Put<UCS_DEVICE_LEVEL_WARP>(op, state, to, message + p.g.second, offset + p.g.second,
                                   uint64_t(T) * K * sizeof(float));
      }
      SignalByPut(op, p, to, a.num_tokens);
    }
  }
  EndSend(op, p, head, begun_ns);
}

template <typename T_, typename W>
__global__ void __launch_bounds__(kSumThreads, 4)
    ReceiveSumsKernel(const __grid_constant__ Params p, const __grid_constant__ ReceiveSumsArgs a) {
  constexpr int V = kValues<T_>, kRows = 4;  // more rows at once rather than more of each
  __shared__ Op op;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int R = p.g.max_ranks, K = p.g.top_k, G = p.granules;
  const int segments = p.segments.value;
  const int first_unit = blockIdx.x * warps + warp;
  const bool small = int64_t(R) * a.num_tokens * p.wire_bytes < kSmallBytes;
  if (first_unit < a.num_tokens * segments) {  // what will be wanted; of both banks where that costs little
    const int t = p.segments.Quotient(first_unit), bytes = kWarp * int(sizeof(Granule<T_, W>));
    const int begin = (first_unit - t * segments) * bytes;
    for (int i = lane; i < kBanks * R; i += kWarp) {
      const std::byte* message = p.region + p.g.inbox + uint64_t(i) * p.g.message_bytes;
      Prefetch(message + t * sizeof(int32_t));
      const std::byte* row = message + p.g.rows + uint64_t(t) * p.g.row_bytes;
      for (int at = 0; small && at < bytes && begin + at < p.wire_bytes; at += 128) {
        Prefetch(row + begin + at);
      }
    }
  }
  Begin(op, p, /*sending=*/false);
  if (!op.bad && !small && first_unit < a.num_tokens * segments) {
    const int t = p.segments.Quotient(first_unit), bytes = kWarp * int(sizeof(Granule<T_, W>));
    const int begin = (first_unit - t * segments) * bytes;
    for (int r = lane; r < R; r += kWarp) {
      if (!op.live[r]) continue;
      const std::byte* row = op.inbox(p.g, op.region, r) + p.g.rows + uint64_t(t) * p.g.row_bytes;
      for (int at = 0; at < bytes && begin + at < p.wire_bytes; at += 128) {
        Prefetch(row + begin + at);
      }
    }
  }
  AwaitAll(op, p);
  if (op.bad) {
    Fill(a.y, uint64_t(a.num_tokens) * p.row_bytes, 0xFFFFFFFFu);
    Fill(a.scalars, uint64_t(a.num_tokens) * K * sizeof(float), 0xFFFFFFFFu);
    EndReceive(op, p, false);
    return;
  }
  for (int unit = first_unit; unit < a.num_tokens * segments; unit += gridDim.x * warps) {
    const int t = p.segments.Quotient(unit), segment = unit - t * segments, granule = segment * kWarp + lane;
    float sum[V] = {};
    for (int r0 = 0; r0 < R; r0 += kWarp) {
      const int r = r0 + lane;
      const bool present = r < R && op.live[r] && reinterpret_cast<const int32_t*>(op.inbox(p.g, op.region, r))[t] != 0;
      unsigned ranks = __ballot_sync(kAllLanes, present);
      if (segment == 0) {
        if (a.scalars) {
          for (int k = lane; k < K; k += kWarp) {
            float scalar = r0 == 0 ? 0.0f : a.scalars[uint64_t(t) * K + k];
            for (unsigned left = ranks; left; left &= left - 1) {
              const std::byte* message = op.inbox(p.g, op.region, r0 + __ffs(left) - 1);
              scalar = __fadd_rn(scalar, reinterpret_cast<const float*>(message + p.g.second)[uint64_t(t) * K + k]);
            }
            a.scalars[uint64_t(t) * K + k] = scalar;
          }
        }
        if (present && r != op.rank) {
          atomicAdd(&p.control->state.counters[r].bytes_in, (unsigned long long)p.wire_bytes);
        }
      }
      if (granule >= G) continue;
      while (ranks) {
        Granule<T_, W> x[kRows];
        int count = 0;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (!ranks) continue;
          const std::byte* message = op.inbox(p.g, op.region, r0 + __ffs(ranks) - 1);
          x[i] = LoadOnce<kWordsOf<T_, W>>(message + p.g.rows + uint64_t(t) * p.g.row_bytes + granule * sizeof(x[0]));
          ranks &= ranks - 1;
          ++count;
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (i >= count) continue;
          float values[V];
          Unpack<W>(values, x[i]);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] = __fadd_rn(sum[v], values[v]);
        }
      }
    }
    if (granule >= G) continue;
    Words<4> y;
    Pack<T_>(y, sum);
    Store(a.y + (uint64_t(t) * G + granule) * 16, y);
  }
  EndReceive(op, p, false);
}

__global__ void FindPointersKernel(void* view, int num_rows, const uint32_t* wanted, std::byte** pointers) {
  for (int i = threadIdx.x; i < num_rows; i += blockDim.x) {
    void* pointer = nullptr;
    auto* list = static_cast<ucp_device_remote_mem_list_h>(view);
    if (wanted[i] && list->version == UCP_DEVICE_MEM_LIST_VERSION_V1) {
      if (ucp_device_get_ptr(list, unsigned(i), &pointer) != UCS_OK) pointer = nullptr;
    }
    pointers[i] = static_cast<std::byte*>(pointer);
  }
}

__global__ void NotifyKernel(const __grid_constant__ Params p, Notice notice) {
  __shared__ Op op;
  Begin(op, p, /*sending=*/true);
  TellPeers(op, p, notice);
}

// --- Launches ---

constexpr size_t kSharedPlanBytes = 40 * 1024;  // beside a kernel's own, of the 48 KB that need no asking

Params MakeParams(const Launch& l, int granules_at_once) {
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

int Blocks(int64_t units, int per_block, int most) {
  return int(std::clamp<int64_t>((units + per_block - 1) / per_block, 1, most));
}

template <typename T>
struct Type {
  using type = T;
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

// Calls function(Type<token>, Type<sum on the wire>).
template <typename Function>
void WithSumTypes(const RowFormat& f, Function function) {
  const bool narrow = f.wire == Wire::kBf16;
  if (f.type == TokenType::kBfloat16) return function(Type<bf16>{}, Type<bf16>{});
  if (f.type == TokenType::kFloat32) {
    return narrow ? function(Type<float>{}, Type<bf16>{}) : function(Type<float>{}, Type<float>{});
  }
  return narrow ? function(Type<f16>{}, Type<bf16>{}) : function(Type<f16>{}, Type<f16>{});
}

}  // namespace

void SendTokens(const Launch& l, const SendTokensArgs& a) {
  Params p = MakeParams(l, kUnroll);
  p.granules = int32_t(size_t(l.format.hidden) * (a.x_scales ? sizeof(e4m3) : TokenBytes(l.format.type)) / 16);
  const int threads = std::clamp((std::max(p.granules, l.geometry.top_k) + 31) / 32 * 32, 64, 1024);
  const int blocks = Blocks(a.num_tokens, 1, l.num_sms * (2048 / threads));
  auto send = [&](auto codec) { SendTokensKernel<decltype(codec)><<<blocks, threads, 0, l.stream>>>(p, a); };
  if (a.x_scales) return send(CopyCodec{});
  WithCodec(l.format, /*encode=*/true, send);
}

void ReceiveTokens(const Launch& l, const ReceiveTokensArgs& a) {
  const Params p = MakeParams(l, kUnroll);
  const Geometry& g = l.geometry;
  const int64_t tokens = int64_t(g.max_ranks) * g.max_tokens;
  const int64_t segments = p.segments.value;
  // Rows that stay empty are written, too.
  const int blocks = Blocks(std::max(tokens, a.num_rows / 2) * segments, kMoveThreads / kWarp, l.num_sms * 2);
  const size_t plan_bytes = ScratchBytes(g);
  const size_t limit_bytes = (2 * PlanStride(g) + 1) * sizeof(int32_t);
  const bool planned = plan_bytes > kSharedPlanBytes;
  if (planned) {
    const int64_t words = int64_t(g.max_ranks) * g.rank_chunks * g.experts_per_rank;
    PlanKernel<<<Blocks(words, kMoveThreads, l.num_sms), kMoveThreads, 0, l.stream>>>(p, a);
  }
  WithCodec(l.format, /*encode=*/false, [&](auto codec) {
    if (planned) {
      ReceiveTokensKernel<decltype(codec), true><<<blocks, kMoveThreads, limit_bytes, l.stream>>>(p, a);
    } else {
      ReceiveTokensKernel<decltype(codec), false><<<blocks, kMoveThreads, plan_bytes, l.stream>>>(p, a);
    }
  });
}

void ReceiveAlong(const Launch& l, const ReceiveAlongArgs& a) {
  const Params p = MakeParams(l, kUnroll);
  const int64_t tokens = int64_t(l.geometry.max_ranks) * l.geometry.max_tokens;
  const int64_t segments = p.segments.value;
  const int blocks = Blocks(tokens * segments, kMoveThreads / kWarp, l.num_sms * 2);
  WithCodec(l.format, /*encode=*/false,
            [&](auto codec) { ReceiveAlongKernel<decltype(codec)><<<blocks, kMoveThreads, 0, l.stream>>>(p, a); });
}

void SendSums(const Launch& l, const SendSumsArgs& a) {
  const Params p = MakeParams(l, kSumUnroll);
  const int64_t segments = p.segments.value;
  const int most = std::max(1, l.num_sms * kSumBlocks / l.geometry.max_ranks);
  const dim3 blocks(Blocks(l.geometry.max_tokens * segments, kSumThreads / kWarp, most), l.geometry.max_ranks);
  WithSumTypes(l.format, [&](auto token, auto wire) {
    SendSumsKernel<typename decltype(token)::type, typename decltype(wire)::type>
        <<<blocks, kSumThreads, 0, l.stream>>>(p, a);
  });
}

void ReceiveSums(const Launch& l, const ReceiveSumsArgs& a) {
  const Params p = MakeParams(l, 1);
  const int64_t segments = p.segments.value;
  const int blocks = Blocks(a.num_tokens * segments, kSumThreads / kWarp, l.num_sms * 4);
  WithSumTypes(l.format, [&](auto token, auto wire) {
    ReceiveSumsKernel<typename decltype(token)::type, typename decltype(wire)::type>
        <<<blocks, kSumThreads, 0, l.stream>>>(p, a);
  });
}

cudaError_t FindPointers(void* remote_view, int num_rows, const uint32_t* wanted, std::byte** pointers,
                         cudaStream_t stream) {
  FindPointersKernel<<<1, kWarp, 0, stream>>>(remote_view, num_rows, wanted, pointers);
  return cudaGetLastError();
}

cudaError_t Notify(Control* control, const Geometry& geometry, Notice notice, cudaStream_t stream) {
  Params p{};
  p.control = control;
  p.g = geometry;
  NotifyKernel<<<1, 1, 0, stream>>>(p, notice);
  return cudaGetLastError();
}

cudaError_t Preload() {
  cudaError_t status = cudaSuccess;
  auto load = [&](auto* kernel) {
    cudaFuncAttributes attributes;
    if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  };
  auto load_codec = [&](auto codec) {
    load(&SendTokensKernel<decltype(codec)>);
    load(&ReceiveTokensKernel<decltype(codec), false>);
    load(&ReceiveTokensKernel<decltype(codec), true>);
    load(&ReceiveAlongKernel<decltype(codec)>);
  };
  load_codec(CopyCodec{}), load_codec(Bf16Codec<float>{}), load_codec(Bf16Codec<f16>{});
  load_codec(Fp8Codec<float>{}), load_codec(Fp8Codec<f16>{}), load_codec(Fp8Codec<bf16>{});
  auto load_sums = [&](auto token, auto wire) {
    load(&SendSumsKernel<typename decltype(token)::type, typename decltype(wire)::type>);
    load(&ReceiveSumsKernel<typename decltype(token)::type, typename decltype(wire)::type>);
  };
  load_sums(Type<float>{}, Type<float>{}), load_sums(Type<float>{}, Type<bf16>{});
  load_sums(Type<bf16>{}, Type<bf16>{}), load_sums(Type<f16>{}, Type<f16>{}), load_sums(Type<f16>{}, Type<bf16>{});
  load(&PlanKernel), load(&FindPointersKernel), load(&NotifyKernel);
  return status;
}

}  // namespace jax_nixlep::cuda
