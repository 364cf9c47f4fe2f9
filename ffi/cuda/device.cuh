// One block's view of an operation: what every kernel begins and ends with, and how it waits.
#pragma once

#include <ucp/api/device/ucp_device_impl.h>

#include "cuda/access.cuh"
#include "cuda/kernels.h"

namespace jax_nixlep::cuda {

// Division by a number that the host knows.
struct Divisor {
  uint32_t value = 1, reciprocal = 0;

  Divisor() = default;
  explicit Divisor(uint32_t d) : value(d), reciprocal(d > 1 ? uint32_t(((uint64_t(1) << 32) + d - 1) / d) : 0) {}
  __device__ int Quotient(int n) const {
    if (!reciprocal) return n;
    const uint32_t q = __umulhi(uint32_t(n), reciprocal);  // or one too many, where n * value is above 2^32
    return int(q - (q * value > uint32_t(n)));
  }
};

struct Params {
  Control* control;
  const std::byte* region;  // for prefetches only: a replayed graph may hold that of an earlier group
  Geometry g;
  uint64_t tag;
  uint64_t* ticket;
  float* order;
  int32_t granules;  // of a row
  Divisor segments;  // of a row: what one warp handles at a time
  Divisor ranks;     // max_ranks
  Divisor tokens;    // max_tokens
  Divisor experts;   // of a rank
  Divisor rank_chunks;
  Divisor columns;  // of a chunk of picks: up to 32 experts of a rank each
  int32_t value_bytes, scale_bytes, wire_bytes, row_bytes;
  uint32_t ue8m0, round_scale;
};

struct Op {
  std::byte* region;
  uint64_t stamp, tag, begun_ns, deadline_ns;
  int bank, rank;
  int bad;  // nothing may be believed: outputs are poisoned
  int num_put_peers;
  int wait_for_bank;
  int overlaps;            // sending: the operation before is not finished; receiving: the next one is started
  int newest;              // receiving: no later operation is finished, as where halves are nested
  int stale;               // receiving: of an earlier epoch, or finished already
  uint64_t safe_until_ns;  // no peer has given this rank up before that
  int flag;
  std::byte* pointer[kMaxRanks];
  Control* control[kMaxRanks];
  uint64_t nonce[kMaxRanks];
  int tokens[kMaxRanks];
  uint8_t live[kMaxRanks];

  __device__ std::byte* outbox(const Geometry& g, std::byte* of, int to) const {
    return of + g.outbox + (uint64_t(bank) * g.max_ranks + to) * g.message_bytes;
  }
  __device__ std::byte* inbox(const Geometry& g, std::byte* of, int from) const {
    return of + g.inbox + (uint64_t(bank) * g.max_ranks + from) * g.message_bytes;
  }
  // Where the inbox for messages from this rank lies in the region of any peer.
  __device__ uint64_t inbox_offset(const Geometry& g) const {
    return g.inbox + (uint64_t(bank) * g.max_ranks + rank) * g.message_bytes;
  }
};

// Rows are pulled where that is possible; tables were always brought.
__device__ inline const std::byte* TablesOf(const Op& op, const Params& p, int r) {
  return op.inbox(p.g, op.region, r);
}
__device__ inline const std::byte* TokensOf(const Op& op, const Params& p, int r) {
  return op.pointer[r] ? op.outbox(p.g, op.pointer[r], r) : op.inbox(p.g, op.region, r);
}

// Writes to row `to` of the peers' regions, from this rank's.
template <ucs_device_level_t kLevel>
__device__ __noinline__ void Put(const Op& op, const DeviceState& state, int to, const std::byte* local,
                                 uint64_t offset, uint64_t num_bytes) {
  if (!num_bytes) return;
  ucp_device_put<kLevel>(static_cast<ucp_device_local_mem_list_h>(state.local_view), 0, size_t(local - op.region),
                         static_cast<ucp_device_remote_mem_list_h>(state.remote_view), unsigned(RegionRow(to)), offset,
                         num_bytes, 0, UCP_DEVICE_FLAG_NODELAY, nullptr);
}
// Writes a field of the control block to the same place of the peer's. False: the way to it cannot be used by kernels.
template <ucs_device_level_t kLevel>
__device__ __noinline__ bool PutControl(Control* own, int max_ranks, int to, const void* field, uint64_t num_bytes) {
  const size_t offset = size_t(static_cast<const char*>(field) - reinterpret_cast<const char*>(own));
  const ucs_status_t status = ucp_device_put<kLevel>(
      static_cast<ucp_device_local_mem_list_h>(own->state.local_view), 1, offset,
      static_cast<ucp_device_remote_mem_list_h>(own->state.remote_view), unsigned(ControlRow(to, max_ranks)), offset,
      num_bytes, 0, UCP_DEVICE_FLAG_NODELAY, nullptr);
  return !UCS_STATUS_IS_ERR(status);
}

// Sets a field of the notice cell that `to` keeps for this rank; adds the nonce. One thread.
__device__ inline void SetNotice(const Op& op, const Params& p, int to, uint64_t NoticeCell::* field, uint64_t value) {
  value += op.nonce[op.rank];
  if (op.control[to]) {
    __threadfence_system();
    StoreRelaxed(&(op.control[to]->notices[op.rank].*field), value);
    return;
  }
  uint64_t* own = &(p.control->notices[op.rank].*field);
  StoreRelaxed(own, value);
  __threadfence_system();
  PutControl<UCS_DEVICE_LEVEL_THREAD>(p.control, p.g.max_ranks, to, own, sizeof(value));
}

// What rank `from` says when it stops.
__device__ inline uint64_t NoticeFrom(const Op& op, int from, Notice notice) {
  return NoticeWord(op.nonce[from], uint16_t(op.stamp >> kEpochShift), uint64_t(notice));
}

// Tells the peers that this rank stops. One thread.
__device__ inline void TellPeers(const Op& op, const Params& p, Notice notice) {
  const uint64_t word = NoticeWord(0, uint16_t(op.stamp >> kEpochShift), uint64_t(notice));
  for (int r = 0; r < p.g.max_ranks; ++r) {
    if (r != op.rank && op.live[r]) SetNotice(op, p, r, &NoticeCell::notice, word);
  }
}

// Ends this and all later operations of the endpoint, and tells the peers. One thread.
__device__ __noinline__ inline void Fail(Op& op, const Params& p, Failure why, int peer, uint64_t other_tag = 0) {
  DeviceState& state = p.control->state;
  op.bad = 1;
  if (atomicCAS(&state.failed, 0u, uint32_t(why)) != 0) return;
  state.report->stamp = op.stamp;
  state.report->tag = op.tag;
  state.report->other_tag = other_tag;
  state.report->peer = peer;
  __threadfence_system();
  StoreRelaxed(&state.report->code, uint32_t(why));
  TellPeers(op, p, Notice::kFailed);
}

inline constexpr uint64_t kMercyNs = 150'000'000;  // _GRACE_S of elastic/boundary.py

// True if a peer that said `given_up` went on without this rank: what it sent, or offers to be read, may be gone.
// Without it in a later operation, too: the peer writes to the bank of `stamp` in the second one after it, when it has
// waited for this rank there. It does not begin a third one before this rank has finished the first.
__device__ inline bool GaveUp(uint64_t given_up, uint64_t stamp) {
  return (given_up >> kEpochShift == stamp >> kEpochShift) & (given_up <= stamp + kBanks);
}
__device__ inline bool GaveUp(const Op& op, const Params& p, int peer) {
  return GaveUp(LoadRelaxed(&p.control->notices[peer].given_up) - op.nonce[peer], op.stamp);
}

inline constexpr int kStateWarps = 2;  // load the state in Begin

// Loads the operation; `meanwhile()` is done while that is on its way. All threads of the block, kStateWarps at least.
template <typename Meanwhile>
__device__ inline void Begin(Op& op, const Params& p, bool sending, Meanwhile meanwhile) {
  const DeviceState& state = p.control->state;
  for (int r = threadIdx.x; r < p.g.max_ranks; r += blockDim.x) {
    const PeerEntry& peer = state.peers[r];
    if (!sending) {
      Prefetch(&p.control->signals[0][r]), Prefetch(&p.control->signals[1][r]);
      Prefetch(&p.control->notices[r].given_up);
    }
    op.pointer[r] = peer.pointer;
    op.control[r] = peer.control;
    op.nonce[r] = peer.nonce;
    // Nothing is sent to a peer that went on without this rank: this process may have been stopped meanwhile, its
    // number be another's. The receiving half fails. A plain load, as the rest: all are to be under way together.
    const uint64_t given_up = p.control->notices[r].given_up - peer.nonce;
    const bool gave_up = sending & (r != state.rank) & GaveUp(given_up, state.started + 1);
    op.live[r] = (peer.member != 0) & (peer.masked == 0) & !gave_up;
    op.tokens[r] = 0;
  }
  if (threadIdx.x == kWarp) {  // another warp than the first peers': one would wait for both, one after the other
    const Geometry& own = state.geometry;
    // No short circuits: all these loads are to be under way together.
    const uint64_t started = state.started, current = state.current, timeout_ns = state.timeout_ns;
    const uint64_t begun0 = state.begun_ns[0], begun1 = state.begun_ns[1], finished = state.finished;
    const uint64_t overlapped0 = state.overlapped[0], overlapped1 = state.overlapped[1];
    const uint64_t tag0 = state.tags[0], tag1 = state.tags[1];
    op.begun_ns = Now();
    if (sending) Prefetch(&state.tails);  // and the first counters after it
    op.bad = (state.active == 0) | (state.failed != 0) | (own.max_ranks != p.g.max_ranks) |
             (own.max_tokens != p.g.max_tokens) | (own.top_k != p.g.top_k) |
             (own.experts_per_rank != p.g.experts_per_rank) | (own.row_bytes != p.g.row_bytes);
    op.rank = state.rank;
    op.region = state.region;
    op.stamp = sending ? started + 1 : p.ticket ? *p.ticket : current;
    op.bank = int(op.stamp % kBanks);
    const uint64_t begun = op.bank ? begun1 : begun0, other_begun = op.bank ? begun0 : begun1;
    const uint64_t overlapped = op.bank ? overlapped1 : overlapped0;
    op.deadline_ns = begun + timeout_ns;
    op.num_put_peers = int(state.num_put_peers);
    // A peer began this operation after this rank began the one before, and gives up a timeout later, or is told to by
    // the others, who give a rank kMercyNs. Half of it leaves room for clocks. Not so with two operations in flight: a
    // peer may begin the second before this rank began the first.
    op.overlaps = sending ? finished != started : started != op.stamp;
    op.newest = finished < op.stamp;
    op.stale = !sending & (started != op.stamp) & ((started - op.stamp > 1) | (overlapped != op.stamp));
    // Ranks that finish in another order would wait for, or overwrite, what the others have not finished.
    const uint64_t begun_tag = op.stale ? p.tag : op.bank ? tag1 : tag0;
    op.tag = sending ? p.tag | op.overlaps * kSecondInFlight : begun_tag;
    op.safe_until_ns = op.overlaps | (op.tag >= kSecondInFlight) ? 0 : other_begun + min(timeout_ns, kMercyNs) / 2;
    op.wait_for_bank = (overlapped != 0) & (overlapped == op.stamp - kBanks);
    op.flag = 0;
  }
  meanwhile();
  __syncthreads();
}
__device__ inline void Begin(Op& op, const Params& p, bool sending) {
  Begin(op, p, sending, [] {});
}

// Settles for all blocks whether `peer` was in time, once its deadline has passed. True: it was not.
__device__ __noinline__ inline bool DecideTimeout(Op& op, const Params& p, int peer, bool timed_out) {
  DeviceState& state = p.control->state;
  auto* word = reinterpret_cast<unsigned long long*>(&state.peers[peer].decision);
  unsigned long long seen = atomicAdd(word, 0ull);
  for (;;) {
    if ((seen & ~kTimedOutBit) == op.stamp) return seen & kTimedOutBit;
    const unsigned long long found = atomicCAS(word, seen, op.stamp | (timed_out ? kTimedOutBit : 0));
    if (found == seen) break;
    seen = found;
  }
  if (timed_out) {
    state.counters[peer].timeouts += 1;
    StoreRelaxed(&state.report->gave_up, 1u);
    // Before what the peer may be reading is overwritten, by this block or by those that go on when they see `masked`.
    SetNotice(op, p, peer, &NoticeCell::given_up, op.stamp);
    __threadfence_system();
    StoreRelease(&state.peers[peer].masked, op.stamp);
  }
  return timed_out;
}

// True if the peer said, in this epoch of this group, that it stopped.
__device__ inline bool HasStopped(const Op& op, const Params& p, int peer) {
  const uint64_t notice = LoadAcquire(&p.control->notices[peer].notice);  // what is read next may be the peer's last
  return notice == NoticeFrom(op, peer, Notice::kLeft) || notice == NoticeFrom(op, peer, Notice::kFailed);
}

__device__ inline bool HasLeft(const Op& op, const Params& p, int peer) {
  return LoadRelaxed(&p.control->notices[peer].notice) == NoticeFrom(op, peer, Notice::kLeft);
}

// True if the host ends the operation, which waits for `peer`; else says whether it knows the peer to be dead. To be
// asked now and then, by few: it takes a trip to the host.
__device__ __noinline__ inline bool StoppedByHost(Op& op, const Params& p, int peer, bool& dead) {
  const FailureReport& host = *p.control->state.report;
  const auto stop = Stop(LoadRelaxed(&host.stop));
  dead = LoadRelaxed(&host.dead[peer]) != 0;
  if (stop == Stop::kNo) return false;
  op.bad = 1;
  if (stop == Stop::kInterrupt) Fail(op, p, Failure::kInterrupted, peer);
  atomicCAS(&p.control->state.failed, 0u, uint32_t(Failure::kInterrupted));  // closing: ends the other blocks, too
  return true;
}

inline constexpr uint64_t kGraceNs = 1'000'000;       // far above the skew of the timer between blocks
inline constexpr uint64_t kLastWordsNs = 20'000'000;  // some time slices: kernels of a dead process may run on so long

// Hundreds of blocks wait at once, next to the memory that peers read: most looks are at one word, after a pause.
inline constexpr int kGlancesPerLook = 32;
inline constexpr unsigned kPauseNs = 100;

// What a signal says. `whole`: all of it comes from the same message of the endpoint with this nonce.
struct Seen {
  uint64_t stamp, tag, tokens;
  bool whole;
};
__device__ inline Seen Look(const Signal& signal, uint64_t nonce) {
  Seen seen;
  seen.tag = LoadRelaxed(&signal.tag), seen.tokens = LoadRelaxed(&signal.num_tokens);
  const uint64_t check = LoadRelaxed(&signal.check);
  seen.stamp = LoadAcquire(&signal.stamp);
  seen.whole = check == Signal::Check(nonce, seen.stamp, seen.tag, seen.tokens);
  return seen;
}

// True if some block has settled that `peer` is late for this operation.
__device__ inline bool DecidedLate(const Op& op, const Params& p, int peer) {
  return LoadRelaxed(&p.control->state.peers[peer].decision) == (op.stamp | kTimedOutBit);
}

// Waits for one peer's message. One thread.
__device__ __noinline__ inline void AwaitPeer(Op& op, const Params& p, int r) {
  DeviceState& state = p.control->state;
  const SignalCell& cell = p.control->signals[op.bank][r];
  const bool by_put = op.pointer[r] == nullptr;
  const uint64_t* counter = &cell.arrivals[(op.stamp >> kEpochShift) % kEpochSlots];
  const uint64_t wanted = ((op.stamp & ((uint64_t(1) << kEpochShift) - 1)) + 1) / kBanks;
  const Signal* signal = &cell.signal;
  bool stopped = false, dead = false;
  // Until then blocks take a message without asking the others. Who masks must not find that some had taken one.
  uint64_t first = 0, last_ns = op.deadline_ns + kGraceNs;
  if (op.stale) return Fail(op, p, Failure::kNotStarted, op.rank);
  for (unsigned polls = 0;; ++polls) {
    if (polls % kGlancesPerLook && LoadRelaxed(&signal->stamp) != op.stamp) {
      __nanosleep(kPauseNs);
      continue;
    }
    const uint64_t before = Now();  // this block may lose its turn between a look and the next line
    const bool counted = !by_put || LoadAcquire(counter) >= wanted;
    const auto [stamp, tag, tokens, whole] = Look(*signal, op.nonce[r]);
    const bool gave_up = r != op.rank && GaveUp(op, p, r);  // after what it may have sent only in part
    const uint64_t now = Now();
    if (!first) first = now;
    const bool arrived = counted && whole && stamp == op.stamp;
    const bool decided_late = DecidedLate(op, p, r);  // by another block, which also reports it
    bool done = arrived;
    if (gave_up) {
      Fail(op, p, Failure::kPeerAhead, r);
      done = true;
    } else if (arrived) {
      if (decided_late || (now >= op.deadline_ns && DecideTimeout(op, p, r, false))) {
        op.live[r] = 0;
        if (!state.mask_late_peers) op.bad = 1;
      } else if (tag != op.tag) {
        Fail(op, p, Failure::kOtherOp, r, tag);
      } else if (tokens > uint64_t(p.g.max_tokens)) {
        Fail(op, p, Failure::kBadCount, r);
      } else {
        op.tokens[r] = int(tokens);
      }
    } else if (whole && stamp > op.stamp && stamp >> kEpochShift == op.stamp >> kEpochShift) {
      Fail(op, p, Failure::kPeerAhead, r);
      done = true;
    } else if (stopped && (HasLeft(op, p, r) || !state.mask_late_peers)) {  // and its message was still not there
      Fail(op, p, HasLeft(op, p, r) ? Failure::kPeerLeft : Failure::kPeerFailed, r);
      done = true;
    } else if (decided_late) {
      op.live[r] = 0;
      if (!state.mask_late_peers) op.bad = 1;
      done = true;
    } else if (before >= last_ns && DecideTimeout(op, p, r, true)) {
      op.live[r] = 0;
      if (!state.mask_late_peers) Fail(op, p, dead ? Failure::kPeerDead : Failure::kTimedOut, r);
      done = true;
    } else if (LoadRelaxed(&state.failed)) {
      op.bad = 1;
      done = true;
    } else if (polls && blockIdx.x == 0) {  // the others see what the first block made of it
      done = StoppedByHost(op, p, r, dead);
    }
    if (done) {
      if (blockIdx.x == 0) state.counters[r].wait_ns += now - first;
      return;
    }
    stopped = HasStopped(op, p, r);
    if (dead || stopped) last_ns = min(last_ns, now + (state.mask_late_peers ? kLastWordsNs : 0));
  }
}

// Waits for all live members. All threads of the block, at least kMaxRanks; on return `live`, `tokens` and `bad` are
// settled.
__device__ inline void AwaitAll(Op& op, const Params& p) {
  const int r = threadIdx.x;  // no loop: what it kept would come from local memory, which the acquiring load drops
  if (r < p.g.max_ranks && op.live[r] && !op.bad) {
    // The common case first, and short: code has to be fetched, too. Any word of this epoch takes the long way.
    const Signal& signal = p.control->signals[op.bank][r].signal;
    const uint64_t given_up = LoadRelaxed(&p.control->notices[r].given_up);
    const auto [stamp, tag, tokens, whole] = Look(signal, op.nonce[r]);
    if ((stamp == op.stamp) & whole & (tag == op.tag) & !op.stale &
        (((given_up - op.nonce[r]) ^ op.stamp) >> kEpochShift != 0) & (tokens <= uint64_t(p.g.max_tokens)) &
        (op.pointer[r] != nullptr) & (Now() < op.deadline_ns)) {
      op.tokens[r] = int(tokens);
    } else {
      AwaitPeer(op, p, r);
    }
  }
  __syncthreads();
}

// True in the last of `count` blocks to come here; what the others wrote before is then visible to it, and what it
// signals is visible after all that to every reader in the system: each block puts a fence before it counts itself.
// Never true once the operation has failed in one of them. All threads.
__device__ inline bool IsLast(Op& op, uint32_t* counter, uint32_t count) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    op.flag = !op.bad && (count == 1 || IncrementAcquire(counter, count - 1) == count - 1);
  }
  __syncthreads();
  return op.flag;
}

// Who fills an output: all blocks of the grid, each its part, or one block all of it.
struct Filling {
  int block, blocks;
};
__device__ inline Filling Together() { return {int(blockIdx.x), int(gridDim.x)}; }
__device__ inline Filling Alone() { return {0, 1}; }

// Sets bytes of an output.
__device__ __noinline__ inline void Fill(void* data, uint64_t num_bytes, uint32_t pattern, Filling by) {
  if (!data) return;
  const uint64_t index = uint64_t(by.block) * blockDim.x + threadIdx.x, step = uint64_t(by.blocks) * blockDim.x;
  auto* bytes = static_cast<uint8_t*>(data);
  const uint64_t vectors = reinterpret_cast<uint64_t>(data) % 16 ? 0 : num_bytes / 16;
  const uint4 vector{pattern, pattern, pattern, pattern};
  for (uint64_t i = index; i < vectors; i += step) reinterpret_cast<uint4*>(bytes)[i] = vector;
  for (uint64_t i = vectors * 16 + index; i < num_bytes; i += step) bytes[i] = uint8_t(pattern);
}

// Tells `to` that this rank's message is complete, after IsLast: one thread where there is a pointer, else a warp.
__device__ inline void SignalByPointer(const Op& op, const Params& p, int to, int num_tokens) {
  Signal* signal = &op.control[to]->signals[op.bank][op.rank].signal;
  StoreRelaxed(&signal->tag, op.tag);
  StoreRelaxed(&signal->num_tokens, uint64_t(num_tokens));
  StoreRelaxed(&signal->check, Signal::Check(op.nonce[op.rank], op.stamp, op.tag, uint64_t(num_tokens)));
  // After the fences of all blocks, which have performed their writes. `check` ties the four words together.
  StoreRelaxed(&signal->stamp, op.stamp);
}
__device__ __noinline__ inline void SignalByPut(Op& op, const Params& p, int to, int num_tokens) {
  SignalCell* own = &p.control->signals[op.bank][op.rank];
  if (threadIdx.x % kWarp == 0) {  // several warps may write the same words
    StoreRelaxed(&own->signal.tag, op.tag);
    StoreRelaxed(&own->signal.num_tokens, uint64_t(num_tokens));
    StoreRelaxed(&own->signal.check, Signal::Check(op.nonce[op.rank], op.stamp, op.tag, uint64_t(num_tokens)));
    StoreRelaxed(&own->signal.stamp, op.stamp);
  }
  __threadfence_system();
  __syncwarp();
  const bool put = PutControl<UCS_DEVICE_LEVEL_WARP>(p.control, p.g.max_ranks, to, own, sizeof(Signal));
  __threadfence_system();
  __syncwarp();
  if (threadIdx.x % kWarp == 0) {
    // Where late peers are masked, this one will find itself late.
    if (!put && !p.control->state.mask_late_peers) Fail(op, p, Failure::kUnreachable, to);
    const uint64_t* counter = &own->arrivals[(op.stamp >> kEpochShift) % kEpochSlots];
    const size_t offset = size_t(reinterpret_cast<const char*>(counter) - reinterpret_cast<const char*>(p.control));
    ucp_device_counter_inc<UCS_DEVICE_LEVEL_THREAD>(
        1, static_cast<ucp_device_remote_mem_list_h>(p.control->state.remote_view),
        unsigned(ControlRow(to, p.g.max_ranks)), offset, 0, UCP_DEVICE_FLAG_NODELAY, nullptr);
  }
  __syncwarp();
}

// --- First and last acts of each half. ---

// Before the first write of a sending half: the peers must have finished reading what the bank held, two operations
// ago. Where the operation before this one was received already, that is implied: who sends one has finished the one
// before. Where it was only started, its messages are looked for; where it was started before the one two ago was
// finished, word of that. All members run the same program, so this rank knows from its own order which it was.
__device__ __noinline__ inline void AwaitBankSlow(Op& op, const Params& p) {
  const DeviceState& state = p.control->state;
  const uint64_t deadline = Now() + state.timeout_ns;
  for (int r = threadIdx.x; r < p.g.max_ranks; r += blockDim.x) {
    if (!op.live[r]) continue;
    auto before = [&](int rank) {  // its message of the operation before, once that is there
      const Seen seen = Look(p.control->signals[1 - op.bank][rank].signal, op.nonce[rank]);
      return seen.whole && seen.stamp == op.stamp - 1 ? seen : Seen{};
    };
    auto unfinished = [&](int rank) {
      if (op.wait_for_bank) {
        // A peer may have finished even this operation, where other blocks have sent theirs; a word that an earlier
        // group left can be any number.
        return LoadAcquire(&p.control->notices[rank].finished) - (op.nonce[rank] + op.stamp - kBanks) > kBanks;
      }
      return !before(rank).whole;
    };
    bool over = false, stopped = false, dead = false;  // before the word was read, which may be the peer's last
    for (unsigned polls = 1; unfinished(r); ++polls) {
      if (over && unfinished(op.rank)) {
        Fail(op, p, Failure::kNotFinished, r);
      } else if (over && state.mask_late_peers && !HasLeft(op, p, r)) {
        DecideTimeout(op, p, r, true);
      } else if (over) {
        const auto silent = dead ? Failure::kPeerDead : Failure::kTimedOut;
        Fail(op, p, !stopped ? silent : HasLeft(op, p, r) ? Failure::kPeerLeft : Failure::kPeerFailed, r);
      }
      if (LoadRelaxed(&state.failed)) {
        op.bad = 1;
        break;
      }
      if (DecidedLate(op, p, r)) break;  // by any block: only the first asks the host who is dead
      if (blockIdx.x + blockIdx.y == 0 && polls % kGlancesPerLook == 0 && StoppedByHost(op, p, r, dead)) break;
      stopped = HasStopped(op, p, r);
      over = dead || stopped || Now() > deadline;
      __nanosleep(kPauseNs);
    }
    if (DecidedLate(op, p, r)) {  // but told so? By a block that runs, before anything is overwritten.
      while (!LoadAcquire(&state.peers[r].masked)) __nanosleep(kPauseNs);
      op.live[r] = 0;
    } else if (const Seen seen = before(r); !op.wait_for_bank && seen.whole && seen.tag != state.tags[1 - op.bank]) {
      // In another order, it does not mean that the peer has finished what it is to have finished before.
      Fail(op, p, Failure::kOtherBefore, r, seen.tag);
    }
  }
  if (threadIdx.x == 0) op.begun_ns = Now();  // the peers have all of their time from here on
  __syncthreads();
}

__device__ inline void AwaitBank(Op& op, const Params& p) {
  if ((op.wait_for_bank | op.overlaps) && !op.bad) AwaitBankSlow(op, p);
}

// Names the operation to its receiving half. All threads.
__device__ inline void StoreTicket(const Op& op, const Params& p) {
  if (blockIdx.x + blockIdx.y + threadIdx.x || !p.ticket) return;
  *p.ticket = op.stamp;
  if (p.order) *p.order = 0;
}

// The operation is started. The last block, when all others have read the state.
__device__ inline void EndSend(const Op& op, const Params& p) {
  if (threadIdx.x != 0) return;
  DeviceState& state = p.control->state;
  state.started = state.current = op.stamp;
  state.begun_ns[op.bank] = op.begun_ns;
  state.tags[op.bank] = op.tag;
  if (op.overlaps) state.overlapped[1 - op.bank] = op.stamp - 1;
  atomicAdd(&state.operations, 1ull);
}

// For the kernels that follow in this stream, the operation is over.
__device__ inline void FinishReceive(const Op& op, const Params& p) {
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  if (p.order) *p.order = 0;
  if (!op.bad && op.newest) p.control->state.finished = op.stamp;
}

// After the last read, where another operation is in flight: the peers may use the bank again. All threads.
__device__ __noinline__ inline void ReleaseBank(Op& op, const Params& p) {
  if (!IsLast(op, &p.control->state.tails, gridDim.x)) return;
  for (int r = threadIdx.x; r < p.g.max_ranks; r += blockDim.x) {
    if (r == op.rank) StoreRelease(&p.control->notices[r].finished, op.nonce[r] + op.stamp);
  }
  __syncthreads();
  for (int r = threadIdx.x; r < p.g.max_ranks; r += blockDim.x) {
    if (r != op.rank && op.live[r]) SetNotice(op, p, r, &NoticeCell::finished, op.stamp);
  }
}

// After the last read of a receiving half that reads the peers' memory. False: a peer has gone on, so that it may have
// been overwritten. All threads.
__device__ inline bool EndReceive(Op& op, const Params& p) {
  FinishReceive(op, p);
  __syncwarp();  // the lanes have read what the others of the warp look after
  bool gave_up = false;
  for (int r = threadIdx.x % kWarp; r < p.g.max_ranks; r += kWarp) {  // each warp for what it has read
    if (r == op.rank || !op.live[r] || Now() < op.safe_until_ns || !GaveUp(op, p, r)) continue;
    Fail(op, p, Failure::kOverwritten, r);
    gave_up = true;
  }
  if (__syncthreads_or(gave_up)) return false;
  if (op.overlaps) ReleaseBank(op, p);
  return true;
}

}  // namespace jax_nixlep::cuda
