// What every kernel is made of: memory access, conversions, and one block's view of an operation.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <ucp/api/device/ucp_device_impl.h>

#include "cuda/kernels.h"

namespace jax_nixlep::cuda {

inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;
inline constexpr int kWarp = 32;

// --- Memory ---

__device__ inline uint64_t LoadAcquire(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}
__device__ inline uint64_t LoadRelaxed(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}
__device__ inline uint32_t LoadRelaxed(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
__device__ inline void StoreRelaxed(uint64_t* p, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}
__device__ inline void StoreRelaxed(uint32_t* p, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
__device__ inline void StoreRelease(uint64_t* p, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}

__device__ inline uint64_t Now() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

// Rows are used once: keep them out of L1, which would only delay the loads. Never the read-only path: peers write
// while kernels run.
template <typename P>
__device__ inline P LoadOnce(const std::byte* p) {
  static_assert(sizeof(P) == 16 || sizeof(P) == 8 || sizeof(P) == 4);
  union {
    P value;
    uint32_t word[sizeof(P) / 4];
  } u;
  if constexpr (sizeof(P) == 16) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(u.word[0]), "=r"(u.word[1]), "=r"(u.word[2]), "=r"(u.word[3])
                 : "l"(p));
  } else if constexpr (sizeof(P) == 8) {
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(u.word[0]), "=r"(u.word[1]) : "l"(p));
  } else {
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(u.word[0]) : "l"(p));
  }
  return u.value;
}

template <typename P>
__device__ inline void StoreAs(std::byte* p, const P& value) {
  *reinterpret_cast<P*>(p) = value;
}

// --- Numbers: a granule is one 16-byte vector of tokens, or the same values on the wire. ---

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ inline float ToFloat(float x) { return x; }
__device__ inline float ToFloat(bf16 x) { return __bfloat162float(x); }
__device__ inline float ToFloat(f16 x) { return __half2float(x); }
template <typename T>
__device__ inline T FromFloat(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
  else return __float2half_rn(x);
}

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};
template <typename T>
inline constexpr int kValues = 16 / int(sizeof(T));  // in a granule
template <typename T, typename W>
using Granule = Pack<W, kValues<T>>;

// --- One block's view of an operation. ---

struct Params {
  DeviceState* state;
  Geometry g;
  uint64_t tag;
  uint64_t* ticket;
  float* order;
  int32_t granules;        // of a row
  int32_t value_bytes, scale_bytes, wire_bytes, row_bytes;
  uint32_t ue8m0, round_scale;
};

struct Op {
  std::byte* region;
  uint64_t stamp, deadline_ns, begun_ns;
  int bank, rank;
  int bad;  // nothing may be believed: outputs are poisoned
  int num_put_peers;
  int flag;
  std::byte* pointer[kMaxRanks];
  int tokens[kMaxRanks];
  uint8_t live[kMaxRanks];

  __device__ std::byte* outbox(const Geometry& g, std::byte* of, int to) const {
    return of + g.outbox + (uint64_t(bank) * g.max_ranks + to) * g.message_bytes;
  }
  __device__ std::byte* inbox(const Geometry& g, std::byte* of, int from) const {
    return of + g.inbox + (uint64_t(bank) * g.max_ranks + from) * g.message_bytes;
  }
  __device__ SignalCell* signal(const Geometry& g, std::byte* of, int from) const {
    return reinterpret_cast<SignalCell*>(of + g.signals + (uint64_t(bank) * g.max_ranks + from) * kAlign);
  }
  __device__ static NoticeCell* notice(const Geometry& g, std::byte* of, int from) {
    return reinterpret_cast<NoticeCell*>(of + g.notices + uint64_t(from) * kAlign);
  }
};

template <ucs_device_level_t kLevel>
__device__ inline void Put(const Op& op, const DeviceState* state, int to, const std::byte* local, uint64_t remote_offset,
                           uint64_t num_bytes) {
  if (!num_bytes) return;
  ucp_device_put<kLevel>(static_cast<ucp_device_local_mem_list_h>(state->local_view), 0, size_t(local - op.region),
                         static_cast<ucp_device_remote_mem_list_h>(state->remote_view), unsigned(to), remote_offset,
                         num_bytes, 0, UCP_DEVICE_FLAG_NODELAY, nullptr);
}

// Ends this and all later operations of the endpoint, and tells the peers. One thread.
__device__ inline void Fail(Op& op, DeviceState* state, const Geometry& g, uint64_t tag, Failure why, int peer,
                            uint64_t other_tag = 0) {
  op.bad = 1;
  if (atomicCAS(&state->failed, 0u, uint32_t(why)) != 0) return;
  state->report->stamp = op.stamp;
  state->report->tag = tag;
  state->report->other_tag = other_tag;
  state->report->peer = peer;
  __threadfence_system();
  StoreRelaxed(&state->report->code, uint32_t(why));
  NoticeCell* own = Op::notice(g, op.region, op.rank);
  StoreRelaxed(&own->notice, uint32_t(Notice::kFailed));
  __threadfence_system();
  for (int r = 0; r < g.max_ranks; ++r) {
    if (r == op.rank || !op.live[r]) continue;
    if (op.pointer[r]) {
      StoreRelaxed(&Op::notice(g, op.pointer[r], op.rank)->notice, uint32_t(Notice::kFailed));
    } else {
      Put<UCS_DEVICE_LEVEL_THREAD>(op, state, r, reinterpret_cast<std::byte*>(own),
                                   g.notices + uint64_t(op.rank) * kAlign, sizeof(uint32_t));
    }
  }
}

// Loads the operation. All threads of the block.
__device__ inline void Begin(Op& op, const Params& p, bool sending) {
  DeviceState* state = p.state;
  for (int r = threadIdx.x; r < p.g.max_ranks; r += blockDim.x) {
    op.pointer[r] = state->peers[r].pointer;
    op.live[r] = state->peers[r].member && state->peers[r].masked == 0;
    op.tokens[r] = 0;
  }
  if (threadIdx.x == 0) {
    const Geometry& own = state->geometry;
    op.bad = !state->active || state->failed || own.max_ranks != p.g.max_ranks || own.max_tokens != p.g.max_tokens ||
             own.top_k != p.g.top_k || own.experts_per_rank != p.g.experts_per_rank || own.row_bytes != p.g.row_bytes;
    op.stamp = sending ? state->started + 1 : p.ticket ? *p.ticket : state->current;
    op.bank = int(op.stamp % kBanks);
    op.rank = state->rank;
    op.region = state->region;
    op.begun_ns = state->begun_ns[op.bank];
    op.deadline_ns = op.begun_ns + state->timeout_ns;
    op.num_put_peers = int(state->num_put_peers);
    op.flag = 0;
  }
  __syncthreads();
}

// Settles for all blocks whether `peer` was in time, once its deadline has passed. True: it was not.
__device__ inline bool DecideTimeout(Op& op, DeviceState* state, const Geometry& g, int peer, bool timed_out) {
  auto* word = reinterpret_cast<unsigned long long*>(&state->peers[peer].decision);
  unsigned long long seen = atomicAdd(word, 0ull);
  for (;;) {
    if ((seen & ~kTimedOutBit) == op.stamp) return seen & kTimedOutBit;
    const unsigned long long found = atomicCAS(word, seen, op.stamp | (timed_out ? kTimedOutBit : 0));
    if (found == seen) break;
    seen = found;
  }
  if (timed_out) {
    state->peers[peer].masked = op.stamp;
    state->counters[peer].timeouts += 1;
    StoreRelaxed(&Op::notice(g, op.region, peer)->masked_at, op.stamp);
    __threadfence_system();
  }
  return timed_out;
}

inline constexpr uint64_t kGraceNs = 1'000'000;  // far above the skew of the timer between blocks

// Waits for one peer's message. One thread.
__device__ inline void AwaitPeer(Op& op, const Params& p, int r) {
  DeviceState* state = p.state;
  const SignalCell* cell = op.signal(p.g, op.region, r);
  const bool by_put = op.pointer[r] == nullptr;
  const uint64_t* counter = &cell->arrivals[(op.stamp >> kEpochShift) % kEpochSlots];
  const uint64_t wanted = ((op.stamp & ((uint64_t(1) << kEpochShift) - 1)) + 1) / kBanks;
  const Signal* signal = &cell->signal;
  bool stopped = false;
  for (uint64_t first = 0;;) {
    const bool counted = !by_put || LoadAcquire(counter) >= wanted;
    const uint64_t tag = LoadRelaxed(&signal->tag), tokens = LoadRelaxed(&signal->num_tokens);
    const uint64_t check = LoadRelaxed(&signal->check), stamp = LoadAcquire(&signal->stamp);
    const uint64_t now = Now();
    if (!first) first = now;
    const bool arrived = counted && stamp == op.stamp && check == Signal::Check(stamp, tag, tokens);
    bool done = arrived;
    if (arrived) {
      if (now >= op.deadline_ns && DecideTimeout(op, state, p.g, r, false)) {
        op.live[r] = 0;
        if (!state->mask_late_peers) Fail(op, state, p.g, p.tag, Failure::kTimedOut, r);
      } else if (tag != p.tag) {
        Fail(op, state, p.g, p.tag, Failure::kOtherOp, r, tag);
      } else if (tokens > uint64_t(p.g.max_tokens)) {
        Fail(op, state, p.g, p.tag, Failure::kBadCount, r);
      } else {
        op.tokens[r] = int(tokens);
      }
    } else if (stamp > op.stamp && stamp >> kEpochShift == op.stamp >> kEpochShift) {
      Fail(op, state, p.g, p.tag, Failure::kPeerAhead, r);
      done = true;
    } else if (stopped) {  // and the message was still not there when looked for once more
      const bool left = LoadRelaxed(&Op::notice(p.g, op.region, r)->notice) == uint32_t(Notice::kLeft);
      Fail(op, state, p.g, p.tag, left ? Failure::kPeerLeft : Failure::kPeerFailed, r);
      done = true;
    } else if (now >= op.deadline_ns + kGraceNs && DecideTimeout(op, state, p.g, r, true)) {
      op.live[r] = 0;
      if (!state->mask_late_peers) Fail(op, state, p.g, p.tag, Failure::kTimedOut, r);
      done = true;
    } else if (LoadRelaxed(&state->closing) || LoadRelaxed(&state->failed)) {
      op.bad = 1;
      done = true;
    }
    if (done) {
      if (blockIdx.x == 0) state->counters[r].wait_ns += now - first;
      return;
    }
    stopped = LoadRelaxed(&Op::notice(p.g, op.region, r)->notice) != 0;
  }
}

// Waits for all live members. All threads of the block; on return `live`, `tokens` and `bad` are settled.
__device__ inline void AwaitAll(Op& op, const Params& p) {
  if (!op.bad) {
    for (int r = threadIdx.x; r < p.g.max_ranks; r += blockDim.x) {
      if (op.live[r]) AwaitPeer(op, p, r);
    }
  }
  __syncthreads();
}

// True in the last of `count` blocks to come here; what the others wrote before is then visible. All threads.
__device__ inline bool IsLast(Op& op, uint32_t* counter, uint32_t count) {
  __syncthreads();
  if (threadIdx.x == 0) {
    if (count > 1) __threadfence();
    op.flag = count == 1 || atomicInc(counter, count - 1) == count - 1;
    if (count > 1) __threadfence();
  }
  __syncthreads();
  return op.flag;
}

// Sets bytes of an output, with all threads of the grid.
__device__ inline void Fill(void* data, uint64_t num_bytes, uint32_t pattern) {
  if (!data) return;
  const uint64_t index = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = uint64_t(gridDim.x) * blockDim.x;
  auto* bytes = static_cast<uint8_t*>(data);
  const uint64_t vectors = reinterpret_cast<uint64_t>(data) % 16 ? 0 : num_bytes / 16;
  const uint4 vector{pattern, pattern, pattern, pattern};
  for (uint64_t i = index; i < vectors; i += step) reinterpret_cast<uint4*>(bytes)[i] = vector;
  for (uint64_t i = vectors * 16 + index; i < num_bytes; i += step) bytes[i] = uint8_t(pattern);
}

// Tells `to` that this rank's message is complete: one thread where it has a pointer, else a whole warp.
__device__ inline void SignalByPointer(const Op& op, const Params& p, int to, int num_tokens) {
  __threadfence_system();
  Signal* signal = &op.signal(p.g, op.pointer[to], op.rank)->signal;
  StoreRelaxed(&signal->tag, p.tag);
  StoreRelaxed(&signal->num_tokens, uint64_t(num_tokens));
  StoreRelaxed(&signal->check, Signal::Check(op.stamp, p.tag, uint64_t(num_tokens)));
  StoreRelaxed(&signal->stamp, op.stamp);
}
__device__ inline void SignalByPut(const Op& op, const Params& p, int to, int num_tokens) {
  SignalCell* own = op.signal(p.g, op.region, op.rank);
  if (threadIdx.x % kWarp == 0) {  // several warps may write the same words
    StoreRelaxed(&own->signal.tag, p.tag);
    StoreRelaxed(&own->signal.num_tokens, uint64_t(num_tokens));
    StoreRelaxed(&own->signal.check, Signal::Check(op.stamp, p.tag, uint64_t(num_tokens)));
    StoreRelaxed(&own->signal.stamp, op.stamp);
  }
  __threadfence_system();
  __syncwarp();
  const uint64_t offset = uint64_t(reinterpret_cast<std::byte*>(own) - op.region);
  Put<UCS_DEVICE_LEVEL_WARP>(op, p.state, to, reinterpret_cast<std::byte*>(own), offset, sizeof(Signal));
  __threadfence_system();
  __syncwarp();
  if (threadIdx.x % kWarp == 0) {
    const uint64_t slot = (op.stamp >> kEpochShift) % kEpochSlots;
    ucp_device_counter_inc<UCS_DEVICE_LEVEL_THREAD>(
        1, static_cast<ucp_device_remote_mem_list_h>(p.state->remote_view), unsigned(to),
        offset + offsetof(SignalCell, arrivals) + slot * sizeof(uint64_t), 0, UCP_DEVICE_FLAG_NODELAY, nullptr);
  }
  __syncwarp();
}

// --- First and last acts of each half. ---

// Before the first write of a sending half: the peers must have finished reading what the bank held. Calls of whole
// operations imply it (a peer answers only after it has); separate halves do not, so there it is waited for.
__device__ inline void AwaitBank(Op& op, const Params& p) {
  DeviceState* state = p.state;
  if (!op.bad && state->split[op.bank] && state->split[op.bank] == op.stamp - kBanks) {
    const uint64_t deadline = Now() + state->timeout_ns;
    for (int r = threadIdx.x; r < p.g.max_ranks; r += blockDim.x) {
      if (!op.live[r]) continue;
      const NoticeCell* cell = Op::notice(p.g, op.region, r);
      while (LoadAcquire(&cell->finished) < op.stamp - kBanks) {
        if (LoadRelaxed(&cell->notice) || LoadRelaxed(&state->closing) || Now() > deadline) {
          Fail(op, state, p.g, p.tag, Failure::kNotFinished, r);
          break;
        }
      }
    }
    __syncthreads();
  }
}

// Counts the blocks that have read the state; EndSend uses the answer, by when it has arrived.
__device__ inline bool PassHead(const Params& p) {
  const uint32_t blocks = gridDim.x * gridDim.y;
  return threadIdx.x == 0 && atomicInc(&p.state->heads, blocks - 1) == blocks - 1;
}

__device__ inline void EndSend(const Op& op, const Params& p, bool last_head, uint64_t begun_ns) {
  if (!last_head) return;
  DeviceState* state = p.state;
  if (!op.bad) {
    state->started = state->current = op.stamp;
    state->begun_ns[op.bank] = begun_ns;
    state->split[op.bank] = p.ticket ? op.stamp : 0;
    state->operations += 1;
  }
  if (p.ticket) {
    *p.ticket = op.stamp;
    if (p.order) *p.order = 0;
  }
}

// After the last read of a receiving half.
__device__ inline void EndReceive(Op& op, const Params& p, bool pulled) {
  DeviceState* state = p.state;
  if (blockIdx.x == 0 && threadIdx.x == 0 && p.order) *p.order = 0;
  if (op.bad) return;
  // A peer overwrites what this rank reads only after giving it up, hence not within the timeout.
  __syncthreads();
  if (pulled && threadIdx.x == 0) op.flag = Now() - op.begun_ns > state->timeout_ns / 2;
  __syncthreads();
  if (pulled && op.flag) {
    __threadfence_system();
    for (int r = threadIdx.x; r < p.g.max_ranks; r += blockDim.x) {
      if (r == op.rank || !op.live[r] || !op.pointer[r]) continue;
      const uint64_t masked_at = LoadAcquire(&Op::notice(p.g, op.pointer[r], op.rank)->masked_at);
      if (masked_at && masked_at >> kEpochShift == op.stamp >> kEpochShift) {
        Fail(op, state, p.g, p.tag, Failure::kOverwritten, r);
      }
    }
  }
  if (p.ticket && IsLast(op, &state->tails, gridDim.x)) {
    NoticeCell* own = Op::notice(p.g, op.region, op.rank);
    if (threadIdx.x == 0) StoreRelease(&own->finished, op.stamp);
    __syncthreads();
    for (int r = threadIdx.x; r < p.g.max_ranks; r += blockDim.x) {
      if (r == op.rank || !op.live[r]) continue;
      if (op.pointer[r]) {
        StoreRelease(&Op::notice(p.g, op.pointer[r], op.rank)->finished, op.stamp);
      } else {
        Put<UCS_DEVICE_LEVEL_THREAD>(op, state, r, reinterpret_cast<std::byte*>(&own->finished),
                                     p.g.notices + uint64_t(op.rank) * kAlign + offsetof(NoticeCell, finished), sizeof(uint64_t));
      }
    }
  }
}

}  // namespace jax_nixlep::cuda
