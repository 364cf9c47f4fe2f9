// Combine: weighted sums of rows, back to the ranks of their tokens.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/numbers.cuh"

namespace jax_nixlep::cuda {
namespace {

constexpr int kSumThreads = 256;
static_assert(kSumThreads >= kMaxRanks);
// Granules of a row, and rows, that a lane has in flight; blocks of an SM.
constexpr int kSendUnroll = 2, kSendRows = 4, kSendBlocks = 2;
constexpr int kReceiveUnroll = 2, kReceiveRows = 4, kReceiveBlocks = 3;
constexpr int64_t kSmallBytes = 1 << 20;  // may be read in vain

// --- Sending: blocks of one blockIdx.y serve one destination. ---

template <typename T_, typename W>
__global__ void __launch_bounds__(kSumThreads, kSendBlocks)
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
  const auto prefetch = [&](int unit) {  // the lane's row, and its weight
    if (next_row < 0 || next_row >= a.num_rows || !G) return;
    constexpr int kBytes = kWarp * kSendUnroll * 16;
    const int at = (unit - p.segments.Quotient(unit) * segments) * kBytes;
    Prefetch(a.row_weights + next_row);
    PrefetchBulk(a.rows + uint64_t(next_row) * p.row_bytes + at, min(kBytes, p.row_bytes - at));
  };
  Begin(op, p, /*sending=*/true, [&] { prefetch(first_unit); });
  StoreTicket(op, p);
  AwaitBank(op, p);
  if (op.bad) return;

  const bool live = op.live[to];
  const bool by_put = op.pointer[to] == nullptr;
  std::byte* message = by_put ? op.outbox(p.g, op.region, to) : op.inbox(p.g, op.pointer[to], op.rank);
  auto* present = reinterpret_cast<int32_t*>(message);
  auto* scalars = reinterpret_cast<float*>(message + p.g.second);
  const int parts = by_put ? 1 : segments;  // a put moves whole rows
  if (by_put) next_row = first_unit < T && lane < K ? choices_of(first_unit)[lane] : -1;
  uint32_t sent = 0;
  for (int unit = first_unit; live && unit < T * parts; unit += step) {
    const int t = by_put ? unit : p.segments.Quotient(unit), first_segment = unit - t * parts;
    const int last_segment = by_put ? segments : first_segment + 1;
    const int32_t* choices = choices_of(t);
    const int this_row = next_row;
    const int next_t = by_put ? unit + step : p.segments.Quotient(unit + step);
    if (next_t < T) next_row = lane < K ? choices_of(next_t)[lane] : -1;
    std::byte* out = message + p.g.rows + uint64_t(t) * p.g.row_bytes;
    bool any = false;
    for (int segment = first_segment; segment < last_segment; ++segment) {
      const int start = segment * kWarp * kSendUnroll + lane;
      float sum[kSendUnroll][V] = {};
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
          Words<4> x[kSendRows][kSendUnroll];
          int from[kSendRows];
#pragma unroll
          for (int i = 0; i < kSendRows; ++i) {
            from[i] = leaders ? __ffs(leaders) - 1 : -1;
            leaders &= leaders - 1;
            if (from[i] < 0) continue;
            const std::byte* in = a.rows + uint64_t(__shfl_sync(kAllLanes, row, from[i])) * p.row_bytes;
#pragma unroll
            for (int u = 0; u < kSendUnroll; ++u) {
              if (start + u * kWarp < G) x[i][u] = LoadOnce<4>(in + (start + u * kWarp) * 16);
            }
          }
#pragma unroll
          for (int i = 0; i < kSendRows; ++i) {
            if (from[i] < 0) continue;
            const float scale = __shfl_sync(kAllLanes, weight, from[i]);  // after the loads: it is one, too
#pragma unroll
            for (int u = 0; u < kSendUnroll; ++u) {
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
      for (int u = 0; u < kSendUnroll; ++u) {
        if (start + u * kWarp >= G) continue;
        Granule<T_, W> y;
        Pack<W>(y, sum[u]);
        Store(out + (start + u * kWarp) * sizeof(y), y);
      }
    }
    if (next_t < T && !by_put) prefetch(unit + step);
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
  if (!IsLast(op, &state.arrivals[to], gridDim.x)) return;
  if (live && !by_put && threadIdx.x == 0) SignalByPointer(op, p, to, a.num_tokens);
  if (live && by_put && warp == 0) {
    const uint64_t offset = op.inbox_offset(p.g);
    Put<UCS_DEVICE_LEVEL_WARP>(op, state, to, message, offset, T * sizeof(int32_t));
    if (a.row_scalars) {
      Put<UCS_DEVICE_LEVEL_WARP>(op, state, to, message + p.g.second, offset + p.g.second,
                                 uint64_t(T) * K * sizeof(float));
    }
    SignalByPut(op, p, to, a.num_tokens);
  }
  const uint32_t destinations = gridDim.y;
  if (threadIdx.x == 0 && atomicInc(&state.tails, destinations - 1) == destinations - 1) EndSend(op, p);
}

// --- Receiving ---

__device__ __noinline__ void Poison(const Op& op, const Params& p, const ReceiveSumsArgs& a) {
  FinishReceive(op, p);
  Fill(a.y, uint64_t(a.num_tokens) * p.row_bytes, 0xFFFFFFFFu, Together());
  Fill(a.scalars, uint64_t(a.num_tokens) * p.g.top_k * sizeof(float), 0xFFFFFFFFu, Together());
}

template <typename T_, typename W>
__global__ void __launch_bounds__(kSumThreads, kReceiveBlocks)
    ReceiveSumsKernel(const __grid_constant__ Params p, const __grid_constant__ ReceiveSumsArgs a) {
  constexpr int V = kValues<T_>;
  __shared__ Op op;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int R = p.g.max_ranks, K = p.g.top_k, G = p.granules;
  const int segments = p.segments.value;
  const int first_unit = blockIdx.x * warps + warp;
  const bool small = int64_t(R) * a.num_tokens * p.wire_bytes < kSmallBytes;
  // What will be wanted of `count` messages; of both banks, before the state says which, where that costs little.
  constexpr int kLines = kWarp * kReceiveUnroll * int(sizeof(Granule<T_, W>)) / kLineBytes;
  const int first_t = p.segments.Quotient(first_unit), first_line = (first_unit - first_t * segments) * kLines;
  const auto prefetch = [&](int first, int count) {
    const std::byte* message = p.region + p.g.inbox + uint64_t(first) * p.g.message_bytes;
#pragma unroll 1
    for (int i = lane; i < count * kLines; i += kWarp) {
      const std::byte* row = message + i / kLines * p.g.message_bytes + p.g.rows + uint64_t(first_t) * p.g.row_bytes;
      const int line = first_line + i % kLines;
      if (line * kLineBytes < p.wire_bytes) Prefetch(row + line * kLineBytes);
    }
  };
  if (first_t < a.num_tokens) {
#pragma unroll 1
    for (int i = lane; i < kBanks * R; i += kWarp) {
      Prefetch(p.region + p.g.inbox + uint64_t(i) * p.g.message_bytes + first_t * sizeof(int32_t));
    }
    if (small) prefetch(0, kBanks * R);
  }
  Begin(op, p, /*sending=*/false);
  if (!op.bad && !small && first_t < a.num_tokens) prefetch(op.bank * R, R);
  AwaitAll(op, p);
  if (op.bad) return Poison(op, p, a);
  for (int unit = first_unit; unit < a.num_tokens * segments; unit += gridDim.x * warps) {
    const int t = p.segments.Quotient(unit), segment = unit - t * segments;
    const int start = segment * kWarp * kReceiveUnroll + lane;
    float sum[kReceiveUnroll][V] = {};
    for (int r0 = 0; r0 < R; r0 += kWarp) {
      const int r = r0 + lane;  // this lane's, until it has found its row
      const std::byte* message = r < R ? op.inbox(p.g, op.region, r) : nullptr;
      const bool present = r < R && op.live[r] && reinterpret_cast<const int32_t*>(message)[t] != 0;
      const auto row = reinterpret_cast<unsigned long long>(message + p.g.rows + uint64_t(t) * p.g.row_bytes);
      unsigned ranks = __ballot_sync(kAllLanes, present);
      if (segment == 0) {
        if (a.scalars) {
          for (int k = lane; k < K; k += kWarp) {
            float scalar = r0 == 0 ? 0.0f : a.scalars[uint64_t(t) * K + k];
            for (unsigned left = ranks; left; left &= left - 1) {
              const std::byte* from = op.inbox(p.g, op.region, r0 + __ffs(left) - 1);
              scalar = __fadd_rn(scalar, reinterpret_cast<const float*>(from + p.g.second)[uint64_t(t) * K + k]);
            }
            a.scalars[uint64_t(t) * K + k] = scalar;
          }
        }
        if (present && r != op.rank) {
          atomicAdd(&p.control->state.counters[r].bytes_in, (unsigned long long)p.wire_bytes);
        }
      }
      while (ranks && G) {
        Granule<T_, W> x[kReceiveRows][kReceiveUnroll];
        int count = 0;
#pragma unroll
        for (int i = 0; i < kReceiveRows; ++i) {
          if (!ranks) continue;
          const auto* in = reinterpret_cast<const std::byte*>(__shfl_sync(kAllLanes, row, __ffs(ranks) - 1));
#pragma unroll
          for (int u = 0; u < kReceiveUnroll; ++u) {
            const int granule = start + u * kWarp;
            if (granule < G) x[i][u] = LoadOnce<kWordsOf<T_, W>>(in + granule * sizeof(x[0][0]));
          }
          ranks &= ranks - 1;
          ++count;
        }
#pragma unroll
        for (int i = 0; i < kReceiveRows; ++i) {
          if (i >= count) continue;
#pragma unroll
          for (int u = 0; u < kReceiveUnroll; ++u) {
            float values[V];
            Unpack<W>(values, x[i][u]);
#pragma unroll
            for (int v = 0; v < V; ++v) sum[u][v] = __fadd_rn(sum[u][v], values[v]);
          }
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kReceiveUnroll; ++u) {
      const int granule = start + u * kWarp;
      if (granule >= G) continue;
      Words<4> y;
      Pack<T_>(y, sum[u]);
      Store(a.y + (uint64_t(t) * G + granule) * 16, y);
    }
  }
  FinishReceive(op, p);
  if (op.overlaps) ReleaseBank(op, p);
}

template <typename T>
struct Type {
  using type = T;
};

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

void SendSums(const Launch& l, const SendSumsArgs& a) {
  const Params p = MakeParams(l, kSendUnroll);
  const int64_t segments = p.segments.value;
  const int most = std::max(1, l.num_sms * kSendBlocks / l.geometry.max_ranks);
  const dim3 blocks(Blocks(l.geometry.max_tokens * segments, kSumThreads / kWarp, most), l.geometry.max_ranks);
  WithSumTypes(l.format, [&](auto token, auto wire) {
    SendSumsKernel<typename decltype(token)::type, typename decltype(wire)::type>
        <<<blocks, kSumThreads, 0, l.stream>>>(p, a);
  });
}

void ReceiveSums(const Launch& l, const ReceiveSumsArgs& a) {
  const Params p = MakeParams(l, kReceiveUnroll);
  const int64_t segments = p.segments.value;
  const int blocks = Blocks(a.num_tokens * segments, kSumThreads / kWarp, l.num_sms * kReceiveBlocks);
  WithSumTypes(l.format, [&](auto token, auto wire) {
    ReceiveSumsKernel<typename decltype(token)::type, typename decltype(wire)::type>
        <<<blocks, kSumThreads, 0, l.stream>>>(p, a);
  });
}

cudaError_t PreloadSums() {
  cudaError_t status = cudaSuccess;
  auto load = [&](auto token, auto wire) {
    using T = typename decltype(token)::type;
    using W = typename decltype(wire)::type;
    if (status == cudaSuccess) status = LoadKernel(&SendSumsKernel<T, W>);
    if (status == cudaSuccess) status = LoadKernel(&ReceiveSumsKernel<T, W>);
  };
  load(Type<float>{}, Type<float>{}), load(Type<float>{}, Type<bf16>{});
  load(Type<bf16>{}, Type<bf16>{}), load(Type<f16>{}, Type<f16>{}), load(Type<f16>{}, Type<bf16>{});
  return status;
}

}  // namespace jax_nixlep::cuda
