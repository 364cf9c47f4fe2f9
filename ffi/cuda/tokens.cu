// Dispatch: tokens to the ranks of their experts. A token is written once, into the message that all peers read; they
// read it once, and store it to all its rows.
#include <algorithm>
#include <climits>

#include "cuda/codecs.cuh"
#include "cuda/launch.cuh"
#include "cuda/plan.cuh"

namespace jax_nixlep::cuda {
namespace {

constexpr int kSendThreads = 512, kMoveThreads = 512, kBlocksPerSm = 2;
constexpr int kSendUnroll = 2, kUnroll = 4;  // granules of a token that a lane has in flight
static_assert(kMoveThreads >= kMaxRanks);
constexpr size_t kSharedPlanBytes = 40 * 1024;  // beside a kernel's own, of the 48 KB that need no asking

// --- Sending ---

// Which tokens of a chunk go to each of `count` experts from `first` on: lane e has those of expert first + e, a bit
// each. A repeated id counts once. `words` is the warp's.
__device__ __noinline__ uint32_t PicksOf(const SendTokensArgs& a, int K, int chunk, int first, int count,
                                         uint32_t* words) {
  const int lane = threadIdx.x % kWarp, t = chunk * kChunk + lane;
  words[lane] = 0;
  __syncwarp();
  if (t < a.num_tokens) {
    const int32_t* ids = a.ids + uint64_t(t) * K;
    auto choose = [&](uint32_t id) {
      const uint32_t expert = id - uint32_t(first);
      if (expert < uint32_t(count)) atomicOr(words + expert, 1u << lane);
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
  __syncwarp();
  return words[lane];
}

template <typename Codec>
__global__ void __launch_bounds__(kSendThreads, kBlocksPerSm)
    SendTokensKernel(const __grid_constant__ Params p, const __grid_constant__ SendTokensArgs a) {
  static_assert(kChunk == kWarp);
  __shared__ Op op;
  __shared__ uint32_t words[kSendThreads / kWarp][kWarp];
  const int G = p.granules, R = p.g.max_ranks, K = p.g.top_k, E = p.g.experts_per_rank;
  // The first warps load the state, and no tokens: they would wait for both. `warp` is negative there.
  const int lane = threadIdx.x % kWarp, warp = int(threadIdx.x) / kWarp - kStateWarps;
  const int warps = blockDim.x / kWarp - kStateWarps;
  const int first_unit = warp < 0 ? INT_MAX : warp * gridDim.x + blockIdx.x, step = warps * gridDim.x;
  DeviceState& state = p.control->state;
  // The first tokens and the choices are on their way while the state is read.
  const int first_granule = warp < 0 ? G : warp * kWarp * kSendUnroll;
  Words<4> next[kSendUnroll];
  auto fetch = [&](int t) {
    if (t >= a.num_tokens) return;
#pragma unroll
    for (int u = 0; u < kSendUnroll; ++u) {
      const int granule = first_granule + u * kWarp + lane;
      if (granule < G) next[u] = LoadOnce<4>(a.x + (uint64_t(t) * G + granule) * 16);
    }
  };
  fetch(blockIdx.x);
  // Tables: a unit is up to 32 choices, for one rank.
  const int choices = a.num_tokens * K;
  const int num_units = a.clean_ids || a.weights ? (choices + kWarp - 1) / kWarp * R : 0;
  int32_t id = -1;
  float weight = 0;
  auto choose = [&](int i) {
    if (i >= choices) return;
    id = a.ids[i];
    if (a.weights) weight = a.weights[i];
  };
  if (first_unit < num_units) choose(p.ranks.Quotient(first_unit) * kWarp + lane);
  // Picks: a unit is a chunk of tokens and up to 32 experts of a rank. From the last warp on: the first have tables.
  const int num_columns = p.columns.value, rank_columns = (E + kWarp - 1) / kWarp;
  const int num_picks = a.clean_ids ? ChunksOf(a.num_tokens) * num_columns : 0;
  const int first_pick = warp < 0 ? INT_MAX : step - 1 - first_unit;
  uint32_t picks = 0;
  int pick_rank = 0, pick_expert = 0, pick_chunk = 0;
  auto pick = [&](int unit) {
    pick_chunk = p.columns.Quotient(unit);
    const int column = unit - pick_chunk * num_columns;
    pick_rank = rank_columns == 1 ? column : column / rank_columns;
    pick_expert = (column - pick_rank * rank_columns) * kWarp;
    picks = PicksOf(a, K, pick_chunk, pick_rank * E + pick_expert, min(kWarp, E - pick_expert), words[warp]);
    pick_expert += lane;
  };
  Begin(op, p, /*sending=*/true, [&] {
    if (first_pick < num_picks) pick(first_pick);
  });
  StoreTicket(op, p);
  AwaitBank(op, p);
  if (op.bad) {
    Fill(a.clean_ids, uint64_t(a.num_tokens) * K * sizeof(int32_t), 0xFFFFFFFFu, Together());
    if (a.invalid_ids && blockIdx.x == 0 && threadIdx.x == 0) *a.invalid_ids = 0;
    return;
  }
  std::byte* message = op.outbox(p.g, op.region, op.rank);
  auto* sent_ids = reinterpret_cast<int32_t*>(message);
  auto* sent_weights = reinterpret_cast<float*>(message + p.g.second);
  const int num_slots = R * E;

  // Tables are brought, not fetched: the receiving half begins with them.
  for (int unit = first_unit; unit < num_units; unit += step) {
    const int group = p.ranks.Quotient(unit), r = unit - group * R, i = group * kWarp + lane;
    if (unit != first_unit) choose(i);
    if (i >= choices) continue;
    if (a.clean_ids) {
      const bool slot = id >= 0 && id < num_slots;
      if (!slot && id != -1 && r == 0) atomicAdd(&state.invalid_now, 1u);
      id = slot ? id : -1;
      if (r == 0) a.clean_ids[i] = id;
      if (r == 0 && op.num_put_peers) sent_ids[i] = id;
    }
    if (a.weights && r == 0 && op.num_put_peers) sent_weights[i] = weight;
    if (!op.pointer[r] || !op.live[r]) continue;
    std::byte* inbox = op.inbox(p.g, op.pointer[r], op.rank);
    if (a.clean_ids) reinterpret_cast<int32_t*>(inbox)[i] = id;
    if (a.weights) reinterpret_cast<float*>(inbox + p.g.second)[i] = weight;
  }
  for (int unit = first_pick; unit < num_picks; unit += step) {
    if (unit != first_pick) pick(unit);
    if (pick_expert >= E || !op.live[pick_rank]) continue;
    std::byte* to =
        op.pointer[pick_rank] ? op.inbox(p.g, op.pointer[pick_rank], op.rank) : op.outbox(p.g, op.region, pick_rank);
    reinterpret_cast<uint32_t*>(to + p.g.picks)[pick_chunk * E + pick_expert] = picks;
  }
  for (int t = blockIdx.x; t < a.num_tokens; t += gridDim.x) {
    std::byte* row = message + p.g.rows + uint64_t(t) * p.g.row_bytes;
    // By whole warps: lanes share scales.
    for (int start = first_granule; start < G; start += warps * kWarp * kSendUnroll) {
#pragma unroll
      for (int u = 0; u < kSendUnroll; ++u) {
        const int granule = start + u * kWarp + lane;
        const bool valid = granule < G;
        Words<4> in = next[u];
        if (start != first_granule) in = valid ? LoadOnce<4>(a.x + (uint64_t(t) * G + granule) * 16) : Words<4>{};
        Codec::Encode(p, row, granule, in, valid);
      }
    }
    if (a.x_scales) {
      for (int i = threadIdx.x; i < p.scale_bytes; i += blockDim.x) {
        row[p.value_bytes + i] = a.x_scales[uint64_t(t) * p.scale_bytes + i];
      }
    }
    fetch(t + gridDim.x);
    if (op.num_put_peers && G) {
      __threadfence_system();
      __syncthreads();
      for (int r = threadIdx.x / kWarp; r < R; r += blockDim.x / kWarp) {
        if (op.pointer[r] || !op.live[r]) continue;
        bool routed = false;
        for (int k = lane; k < K; k += kWarp) {
          const int32_t slot = a.ids[uint64_t(t) * K + k];
          routed |= slot >= 0 && slot < num_slots && slot / E == r;
        }
        if (!__any_sync(kAllLanes, routed)) continue;
        const uint64_t offset = op.inbox_offset(p.g) + uint64_t(row - message);
        Put<UCS_DEVICE_LEVEL_WARP>(op, state, r, row, offset, uint64_t(p.wire_bytes));
        if (lane == 0) atomicAdd(&state.counters[r].bytes_out, (unsigned long long)p.wire_bytes);
      }
      __threadfence_system();
    }
  }

  if (IsLast(op, &state.tails, gridDim.x)) {
    for (int r = threadIdx.x; r < R; r += blockDim.x) {
      if (op.live[r] && op.pointer[r]) SignalByPointer(op, p, r, a.num_tokens);
    }
    if (threadIdx.x == blockDim.x - 1 && a.invalid_ids) {
      const uint32_t invalid = atomicExch(&state.invalid_now, 0u);
      *a.invalid_ids = int32_t(invalid);
      if (invalid) atomicAdd(&state.invalid_ids, (unsigned long long)invalid);
    }
    if (op.num_put_peers) {
      const uint64_t offset = op.inbox_offset(p.g), table_bytes = uint64_t(a.num_tokens) * K * sizeof(int32_t);
      for (int r = threadIdx.x / kWarp; r < R; r += blockDim.x / kWarp) {
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
    EndSend(op, p);
  }
}

// --- Receiving ---

// The small outputs. One block.
__device__ void ReportPeers(const Op& op, const Params& p, int32_t* peers) {
  for (int r = threadIdx.x; r < p.g.max_ranks; r += blockDim.x) {
    peers[r] = op.live[r] ? 0 : DecidedLate(op, p, r) ? 2 : 1;
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
    FinishPlan<32>(p, plan, a.num_rows);
    ReportPlan(op, p, plan, a);
  }
}

// The tables of messages of both banks, before the state says which. One warp of a few blocks.
__device__ void PrefetchTables(const Params& p, bool weighted, bool picks) {
  constexpr int kMostBytes = 1 << 19;
  const int tables_bytes = int(weighted ? p.g.rows : p.g.second), messages = kBanks * p.g.max_ranks;
  const int picks_bytes = picks ? p.g.rank_chunks * p.g.experts_per_rank * int(sizeof(uint32_t)) : 0;
  if (threadIdx.x / kWarp != kStateWarps || messages * (tables_bytes + picks_bytes) > kMostBytes) return;
  for (int i = blockIdx.x; i < messages; i += gridDim.x) {
    const std::byte* message = p.region + p.g.inbox + uint64_t(i) * p.g.message_bytes;
    PrefetchRange(message + p.g.picks, picks_bytes);
    PrefetchRange(message, tables_bytes);
  }
}

__device__ __noinline__ void Poison(const Op& op, const Params& p, const ReceiveTokensArgs& a, Filling by) {
  FinishReceive(op, p);
  const uint64_t choices = uint64_t(p.g.max_ranks) * p.g.max_tokens * p.g.top_k;
  Fill(a.rows, a.num_rows * p.row_bytes, 0xFFFFFFFFu, by);
  Fill(a.scales, a.num_rows * p.scale_bytes, 0xFFFFFFFFu, by);
  Fill(a.row_weights, a.num_rows * sizeof(float), 0xFFFFFFFFu, by);
  Fill(a.group_sizes, p.g.experts_per_rank * sizeof(int32_t), 0, by);
  Fill(a.demand, p.g.experts_per_rank * sizeof(int32_t), 0, by);
  Fill(a.row_of, choices * sizeof(int32_t), 0xFFFFFFFFu, by);
  Fill(a.dropped, sizeof(int32_t), 0, by);
  if (blockIdx.x == 0) ReportPeers(op, p, a.peers);
}

// What a warp receives at a time. Ranks take turns: by blocks of them, all would read from the same peer at once. Then
// tokens: some have many rows, and one block would have all parts of such a one.
struct TokenUnit {
  int rank, token, segment;

  __device__ TokenUnit(const Params& p, int unit) {
    const int i = p.ranks.Quotient(unit);
    rank = unit - i * int(p.ranks.value);
    segment = p.tokens.Quotient(i);
    token = i - segment * int(p.tokens.value);
  }
};

// The scales of a row, by a warp, one at a time: a row of them begins where the one before ends.
__device__ __noinline__ void CopyScales(const Params& p, std::byte* to, const std::byte* from) {
  const int lane = threadIdx.x % kWarp;
  if (p.ue8m0) {
    for (int i = lane; i < p.scale_bytes; i += kWarp) to[i] = from[i];
  } else {
    for (int i = lane; i < p.scale_bytes / 4; i += kWarp) Store(to + i * 4, LoadOnce<1>(from + i * 4));
  }
}

template <typename Codec, bool kPlanned>
__global__ void __launch_bounds__(kMoveThreads, Codec::kRaw ? kBlocksPerSm : 1)
    ReceiveTokensKernel(const __grid_constant__ Params p, const __grid_constant__ ReceiveTokensArgs a) {
  extern __shared__ std::byte dynamic[];
  __shared__ Op op;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int R = p.g.max_ranks, T = p.g.max_tokens, K = p.g.top_k, E = p.g.experts_per_rank, G = p.granules;
  const int segments = p.segments.value;
  const int first_unit = blockIdx.x * warps + warp, num_units = R * T * segments, step = gridDim.x * warps;
  PrefetchTables(p, a.weighted, !kPlanned);
  Begin(op, p, /*sending=*/false);
  AwaitAll(op, p);
  if (op.bad) return Poison(op, p, a, Together());
  Plan plan(p.g, kPlanned ? p.control->state.scratch : dynamic);
  const int words = (E + kWarp - 1) / kWarp;
  if constexpr (kPlanned) {  // limits and starts of the experts are wanted for every row
    auto* near = reinterpret_cast<int32_t*>(dynamic);
    for (int i = threadIdx.x; i < 2 * plan.stride + 1; i += blockDim.x) near[i] = plan.kept[i];
    plan.kept = near;
    plan.base = near + plan.stride;
    __syncthreads();
  } else {
    GatherPicks(op, p, plan, 0, 1);
    __syncthreads();
    FinishPlan<8>(p, plan, a.num_rows);
  }

  // Each token is read once and stored to all its rows.
  for (int unit = first_unit; unit < num_units; unit += step) {
    const TokenUnit of(p, unit);
    const int r = of.rank, t = of.token, segment = of.segment;
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
        if (segment == 0 && lane == 0) {
          atomicAdd(&p.control->state.counters[r].bytes_in, (unsigned long long)p.wire_bytes);
        }
      }
      for (; rows; rows &= rows - 1) {
        std::byte* out = a.rows + uint64_t(__shfl_sync(kAllLanes, row, __ffs(rows) - 1)) * p.row_bytes;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (start + u * kWarp < G) Store(out + (start + u * kWarp) * 16, Codec::Decode(loaded[u]));
        }
        if (Codec::kRaw && a.scales && segment == 0) {
          const uint64_t index = uint64_t(out - a.rows) / p.row_bytes;
          CopyScales(p, a.scales + index * p.scale_bytes, token + p.value_bytes);
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
  // Padding becomes zero, likewise from the last warps on.
  const int used = UsedRows(p, plan);
  for (int unit = step - 1 - first_unit; unit < int(a.num_rows - used) * segments; unit += step) {
    const int spare = p.segments.Quotient(unit), segment = unit - spare * segments;
    const int64_t row = used + spare;
    std::byte* out = a.rows + row * p.row_bytes;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int granule = segment * kWarp * kUnroll + u * kWarp + lane;
      if (granule < G) Store(out + granule * 16, Words<4>{});
    }
    if (segment) continue;
    if (lane == 0) a.row_weights[row] = 0;
    if (!a.scales) continue;
    for (int i = lane; i < p.scale_bytes; i += kWarp) a.scales[row * p.scale_bytes + i] = std::byte(0);
  }
  if (!EndReceive(op, p)) Poison(op, p, a, Alone());  // others may have ended, or write on
}

__device__ __noinline__ void Poison(const Op& op, const Params& p, const ReceiveAlongArgs& a, Filling by) {
  FinishReceive(op, p);
  Fill(a.rows, a.num_rows * p.row_bytes, 0xFFFFFFFFu, by);
  Fill(a.row_weights, a.num_rows * sizeof(float), 0xFFFFFFFFu, by);
}

// Rows, or weights only, along the handle of an earlier dispatch.
template <typename Codec>
__global__ void __launch_bounds__(kMoveThreads, Codec::kRaw ? kBlocksPerSm : 1)
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
  if (op.bad) return Poison(op, p, a, Together());
  __syncthreads();  // from here on a warp that is done may find that the operation has failed
  const int segments = p.segments.value;
  for (int unit = blockIdx.x * warps + warp; unit < R * T * segments; unit += gridDim.x * warps) {
    const TokenUnit of(p, unit);
    const int r = of.rank, t = of.token, segment = of.segment;
    const int32_t* rows = a.row_of + (uint64_t(r) * T + t) * K;
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
  Fill(a.rows + uint64_t(used) * p.row_bytes, uint64_t(a.num_rows - used) * p.row_bytes, 0, Together());
  if (a.row_weights) Fill(a.row_weights + used, uint64_t(a.num_rows - used) * sizeof(float), 0, Together());
  if (!EndReceive(op, p)) Poison(op, p, a, Alone());  // others may have ended, or write on
}

}  // namespace

void SendTokens(const Launch& l, const SendTokensArgs& a) {
  Params p = MakeParams(l, kSendUnroll);
  // Of the tokens as they are given, not of the rows that come out.
  p.granules = int32_t(size_t(l.format.hidden) * (a.x_scales ? sizeof(e4m3) : TokenBytes(l.format.type)) / 16);
  const int warps = std::max((p.granules + kWarp * kSendUnroll - 1) / (kWarp * kSendUnroll), 1) + kStateWarps;
  const int threads = std::min(warps * kWarp, kSendThreads);
  const int blocks = Blocks(a.num_tokens, 1, l.num_sms * std::max(kBlocksPerSm, 1024 / threads));
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
  const int blocks =
      Blocks(std::max(tokens, a.num_rows / 2) * segments, kMoveThreads / kWarp, l.num_sms * kBlocksPerSm);
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
  const int blocks = Blocks(tokens * segments, kMoveThreads / kWarp, l.num_sms * kBlocksPerSm);
  WithCodec(l.format, /*encode=*/false,
            [&](auto codec) { ReceiveAlongKernel<decltype(codec)><<<blocks, kMoveThreads, 0, l.stream>>>(p, a); });
}

cudaError_t PreloadTokens() {
  cudaError_t status = LoadKernel(&PlanKernel);
  auto load = [&](auto* kernel) {
    if (status == cudaSuccess) status = LoadKernel(kernel);
  };
  auto load_codec = [&](auto codec) {
    load(&SendTokensKernel<decltype(codec)>);
    load(&ReceiveTokensKernel<decltype(codec), false>);
    load(&ReceiveTokensKernel<decltype(codec), true>);
    load(&ReceiveAlongKernel<decltype(codec)>);
  };
  load_codec(CopyCodec{}), load_codec(Bf16Codec<float>{}), load_codec(Bf16Codec<f16>{});
  load_codec(Fp8Codec<float>{}), load_codec(Fp8Codec<f16>{}), load_codec(Fp8Codec<bf16>{});
  return status;
}

}  // namespace jax_nixlep::cuda
