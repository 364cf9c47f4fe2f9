// A rank's end of an expert-parallel group: its symmetric memory, its peers, and the protocol of one operation.
// Knows no XLA and no Python.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/layout.h"
#include "runtime/nixl_agent.h"
#include "runtime/shared_memory.h"

namespace jax_nixlep {

// Anything that ends an operation: the text says what happened, to whom, and what to do.
struct EpError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class OpKind : uint8_t { kDispatch = 1, kRedispatch = 2, kCombine = 3 };

// Names an operation of a program. Every member must run the same ones in the same order; equal tags prove it.
struct OpTag {
  OpKind kind;
  uint32_t ordinal;  // which call of the traced program
  uint32_t digest;   // of everything about the message's format that both sides must agree on (24 bits travel)

  uint64_t Pack() const { return uint64_t(kind) << 56 | uint64_t(digest & 0xFFFFFF) << 32 | ordinal; }
  static std::string Name(uint64_t packed);
  // Of `theirs`, said to a rank that runs `ours` at the same place.
  static std::string NameBeside(uint64_t theirs, uint64_t ours);
};

// What to do about operations that differ.
inline constexpr const char* kSameOrder =
    "every member must run the same operations in the same order: run the same program, and pass after= between "
    "operations that do not depend on each other";

struct EndpointOptions {
  int rank = 0;
  Capacity capacity;
  double timeout_s = 60;
  bool mask_late_peers = false;  // a late peer is masked and reported instead of failing the operation
};

// What was counted for one peer since the endpoint was made.
struct PeerHealth {
  uint64_t bytes_out = 0;  // pushed to the peer (nothing where it pulls)
  uint64_t bytes_in = 0;   // pulled from it, or read from what it pushed
  uint64_t wait_us = 0;
  uint64_t timeouts = 0;
  bool member = false;
  bool masked = false;
  const char* path = "none";  // "self", "shared memory", "nixl"
};

enum class PeerState : int32_t { kOk = 0, kAbsent = 1, kTimedOut = 2 };

class Endpoint {
 public:
  explicit Endpoint(const EndpointOptions& options);
  ~Endpoint();
  Endpoint(const Endpoint&) = delete;

  int rank() const { return options_.rank; }
  const Capacity& capacity() const { return layout_.capacity; }
  uint64_t nonce() const;
  const std::shared_ptr<SharedMemory>& memory() const { return memory_; }

  // --- Connecting, by one thread at a time, at any time: what a running operation uses changes only after it. ---
  // Maps the region of a peer of this machine. False if it cannot be reached or is not the one described.
  bool MapPeer(int peer, int pid, int fd, uint64_t nonce);
  // The same, for a region that is already mapped in this process.
  bool AttachPeer(int peer, std::shared_ptr<SharedMemory> memory, uint64_t nonce);
  // Creates the NIXL agent and registers the region, once; returns the metadata peers need.
  std::string OpenNixl(const std::string& library, const std::string& name);
  // Reaches `peer` with one-sided writes into its region at `remote_base`; replaces a mapping.
  void ConnectNixl(int peer, const std::string& metadata, uint64_t remote_base, uint64_t nonce);
  void DropPeer(int peer);
  // Nothing: what connecting did is all that Activate needs.
  void Prepare(std::span<const int> /*members*/) {}
  // Starts `epoch` with `members`; operations are numbered anew. Members must be connected, or be this rank.
  void Activate(uint16_t epoch, std::span<const int> members);

  // Ends the operation that runs, and refuses others, until the next Activate. Any thread, any time.
  void Interrupt();
  // Returns when no operation runs.
  void Drain() { std::lock_guard lock(busy_); }
  // False once a peer in shared memory is known to be dead. Any thread, any time.
  bool PeerAlive(int peer) const;
  bool ShowsDeath(int peer) const;  // whether PeerAlive would tell

  // Tells the peers that this rank leaves and ends a waiting operation. Idempotent.
  void Close();

  // --- Reading; any thread, any time. ---
  // Why no operation can run until the next Activate; empty if they can.
  std::string Failure() const;
  bool GaveUp() const;  // a member, since Activate
  PeerHealth Health(int peer) const;
  uint64_t num_operations() const { return num_operations_.load(); }
  uint16_t epoch() const { return epoch_.load(); }
  // Rows dropped for want of capacity, and ids out of range, since the endpoint was made.
  std::atomic<uint64_t> dropped_rows{0}, invalid_ids{0};

 private:
  friend class Operation;

  struct Peer {
    std::shared_ptr<SharedMemory> memory;  // set when the peer is reached through shared memory
    std::string agent;                     // set when it is reached through NIXL
    uint64_t remote_base = 0;
    uint64_t nonce = 0;
    std::atomic<bool> member{false}, masked{false};
    std::atomic<uint64_t> bytes_out{0}, bytes_in{0}, wait_us{0}, timeouts{0};
  };

  std::byte* base() const { return memory_->data(); }
  Layout::Control& control(std::byte* region) const { return *reinterpret_cast<Layout::Control*>(region); }
  Signal& signal(std::byte* region, int bank, int from) const {
    return *reinterpret_cast<Signal*>(region + layout_.signal(bank, from));
  }
  // How `peer` is reached from now on, instead of how it was until now.
  void Link(int peer, std::shared_ptr<SharedMemory> memory, std::string agent, uint64_t remote_base, uint64_t nonce);
  std::shared_ptr<SharedMemory> MemoryOf(int peer) const;
  void Ring(std::byte* region) const;  // wakes the owner of `region`
  void SleepUntilRung(uint32_t seen, std::chrono::microseconds at_most);
  void NotifyPeers(Notice notice);
  // What `peer` wrote when it stopped taking part, if it did.
  std::optional<Notice> NoticeOf(int peer) const;

  EndpointOptions options_;
  Layout layout_;
  std::shared_ptr<SharedMemory> memory_;
  std::unique_ptr<NixlAgent> nixl_;
  std::vector<std::unique_ptr<Peer>> peers_;

  std::mutex busy_;  // held by the operation that runs, and while membership or a member's link changes
  // Held by whoever changes a link (memory, agent, base, nonce of a peer) and by readers that do not hold busy_. An
  // operation uses links of members only, so those of others change under this one alone. Taken after busy_.
  mutable std::mutex links_;
  std::atomic<bool> closing_{false}, interrupted_{false};
  std::atomic<uint16_t> epoch_{0};
  std::atomic<uint64_t> num_operations_{0};
  uint64_t sequence_ = 0;  // operations of this epoch; under busy_
  bool active_ = false;    // under busy_
  mutable std::mutex failure_lock_;
  std::string failure_;  // why no further operation can run; under failure_lock_
};

// One dispatch or combine of this rank, from its first write to its last read. Every member runs the same operations
// in the same order. Throws EpError; leaving by an exception fails the endpoint and tells the peers.
class Operation {
 public:
  // `broadcast`: all peers read the one message outgoing(rank()); otherwise each has its own.
  Operation(Endpoint& endpoint, OpTag tag, int num_tokens, bool broadcast);
  ~Operation();

  int rank() const { return endpoint_.rank(); }
  int max_ranks() const { return endpoint_.capacity().max_ranks; }
  bool live(int peer) const { return states_[peer] == PeerState::kOk; }  // at the start, or until it is given up
  PeerState state(int peer) const { return states_[peer]; }

  Message outgoing(int to) const;
  // Makes outgoing(to) (or the broadcast message) visible to `to`. Where bytes must be moved, these are the first
  // `first_bytes` and `second_bytes` of the tables and the first `row_bytes` of the rows for which `sends_row` holds.
  void Publish(int to, size_t first_bytes, size_t second_bytes, size_t row_bytes,
               const std::function<bool(int token)>& sends_row);
  // Waits until the message of `from` is complete.
  PeerState Wait(int from);
  Message incoming(int from) const;
  int num_tokens(int from) const { return num_tokens_[from]; }
  void CountBytesIn(int from, uint64_t num_bytes) { endpoint_.peers_[from]->bytes_in += num_bytes; }
  // After the last read: waits for own writes and checks that nobody overwrote what was read.
  void Finish();

 private:
  struct Outgoing {
    int to;
    bool is_signal;
    NixlAgent::Transfer transfer;
  };

  std::string Describe() const;  // "combine #4 (operation 17 of epoch 1)"
  bool Arrived(int from);        // throws on a signal or notice that ends the operation
  // For a peer that stopped and sent nothing for this operation.
  void GiveUp(int peer, Notice notice);
  // Goes on without a peer, or ends the operation: as the group was told to.
  void GiveUp(int peer, const std::string& why);
  // The same for one that NIXL fails to reach.
  void GiveUp(int peer, const NixlError& error);
  void Progress();
  std::byte* region(int rank) const;

  Endpoint& endpoint_;
  std::unique_lock<std::mutex> busy_;
  const uint64_t tag_;
  const bool broadcast_;
  uint64_t stamp_ = 0;
  int bank_ = 0;
  std::chrono::steady_clock::time_point deadline_;
  std::vector<PeerState> states_;
  std::vector<int> num_tokens_;
  std::vector<Outgoing> outgoing_;
  bool finished_ = false;
};

}  // namespace jax_nixlep
