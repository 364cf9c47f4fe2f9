// What kernels and host share: the state of an endpoint in device memory, and where things lie in a region.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/layout.h"

namespace jax_nixlep::cuda {

inline constexpr int kMaxRanks = 128;
inline constexpr int kEpochSlots = 4;  // counters of that many epochs are told apart

// This bit of a stamp marks a timeout in `decision`.
inline constexpr uint64_t kTimedOutBit = uint64_t(1) << 47;

// One peer's 64-byte cell of signals. Peers without a pointer add to a counter after their data.
struct SignalCell {
  Signal signal;
  uint64_t arrivals[kEpochSlots];
};
static_assert(sizeof(SignalCell) == kAlign);

// One peer's cell of notices. Every word has the peer's nonce added: a late one of an earlier group is told from those
// of this group, whose epochs have the same numbers.
struct alignas(kAlign) NoticeCell {
  uint64_t notice;    // why the peer stopped: NoticeWord
  uint64_t finished;  // stamp of the last split operation that the peer has finished reading
  uint64_t given_up;  // stamp of the operation in which the peer went on without this rank
};

// The numbers of Layout, evaluated once.
struct Geometry {
  int32_t max_ranks, experts_per_rank, max_tokens, top_k;
  uint64_t outbox, inbox, message_bytes;    // offsets in a region
  uint64_t second, picks, rows, row_bytes;  // offsets in a message; bytes of a row
  int32_t rank_chunks;                      // chunks of the tokens of one rank

  explicit Geometry(const Layout& layout)
      : max_ranks(layout.capacity.max_ranks),
        experts_per_rank(layout.capacity.experts_per_rank),
        max_tokens(layout.capacity.max_tokens),
        top_k(layout.capacity.top_k),
        outbox(layout.outbox(0, 0)),
        inbox(layout.inbox(0, 0)),
        message_bytes(layout.message_bytes()),
        row_bytes(uint64_t(layout.capacity.row_bytes)),
        rank_chunks(ChunksOf(layout.capacity.max_tokens)) {
    const Message message{nullptr, &layout.capacity};
    second = message.second_offset();
    picks = layout.picks();
    rows = message.rows_offset();
  }
  Geometry() = default;
  bool operator==(const Geometry&) const = default;
};

// Why an endpoint stopped; the words are in failures.cc.
enum class Failure : uint32_t {
  kNone = 0,
  kTimedOut,     // a peer did not arrive, and late peers end the operation
  kOtherOp,      // a peer runs another operation at the same place
  kOtherBefore,  // the same of the operation before, which is not finished
  kPeerAhead,    // a peer went on without this rank
  kPeerLeft,
  kPeerFailed,
  kBadCount,
  kBadHandle,
  kOverwritten,  // a peer went on while its data was read
  kNotFinished,  // an operation was started whose bank this rank still has to finish
  kInterrupted,  // by the host
  kPeerDead,
  kUnreachable,  // by kernels, though NIXL connects it
  kNotStarted,   // an operation was finished that is not in flight
};

// What the host asks of kernels that wait.
enum class Stop : uint32_t {
  kNo = 0,
  kInterrupt,  // fail
  kClose,      // end, and let the host say goodbye
};

// In host memory that kernels can read and write: neither side ever waits for the other, or for a kernel, to use it.
// `code` is written after what comes before it.
struct FailureReport {
  uint64_t stamp, tag, other_tag;
  int32_t peer;
  uint32_t code;
  uint32_t gave_up;  // a peer was, in this epoch
  // Written by the host.
  uint32_t stop;  // Stop
  uint32_t dead[kMaxRanks];
};

struct Control;

struct PeerEntry {
  std::byte* pointer;  // the peer's region, where this GPU can reach it; null: by put
  Control* control;    // the peer's control block, likewise
  uint64_t masked;     // stamp of the operation that gave the peer up; 0: live
  uint32_t member;
  uint32_t unused;
  uint64_t decision;  // of blocks that disagree about a late arrival: stamp, with kTimedOutBit
  uint64_t nonce;     // of the peer's endpoint: what it signals to an earlier group may come after this one has begun
};

struct PeerCounters {
  unsigned long long bytes_out, bytes_in, wait_ns, timeouts;
};

struct DeviceState {
  // Read at the start of every kernel.
  std::byte* region;
  uint64_t started;             // stamp of the operation that was started last
  uint64_t current;             // the same, for the receiving half of a fused operation
  uint64_t begun_ns[kBanks];    // when the operation of the bank was started
  uint64_t tags[kBanks];        // its tag: a program that finishes it numbers its own operations
  uint64_t overlapped[kBanks];  // its stamp, if the next operation was started before it was finished
  uint64_t finished;            // stamp of the operation that was finished last
  uint64_t timeout_ns;
  int32_t rank;
  uint32_t active;
  uint32_t failed;  // Failure
  uint32_t mask_late_peers;
  uint32_t num_put_peers;
  Geometry geometry;
  PeerEntry peers[kMaxRanks];

  void *local_view, *remote_view;
  FailureReport* report;
  std::byte* scratch;  // of the routing plan
  // Blocks that passed a point of the running kernel; back at zero when the last one has, unless the operation failed.
  uint32_t tails, arrivals[kMaxRanks];
  uint32_t invalid_now;
  // From here on: counted as long as the endpoint lives. What is above is written anew for each epoch.
  unsigned long long operations, dropped_rows, invalid_ids;
  PeerCounters counters[kMaxRanks];
};

// The small part of the symmetric memory. One for each device and process, at an address that never changes: captured
// graphs outlive endpoints. Kernels find signals without having read where the region is.
struct Control {
  DeviceState state;
  alignas(kAlign) SignalCell signals[kBanks][kMaxRanks];
  NoticeCell notices[kMaxRanks];
};

// Words of a chunk in a routing plan; odd: no bank conflicts between chunks.
constexpr int PlanStride(const Geometry& g) { return g.experts_per_rank | 1; }

// Bytes of DeviceState::scratch.
inline size_t ScratchBytes(const Geometry& g) {
  const size_t chunks = size_t(g.max_ranks) * g.rank_chunks, stride = PlanStride(g);
  return (2 * chunks * stride + 3 * (stride + 1)) * sizeof(int32_t);
}

}  // namespace jax_nixlep::cuda
