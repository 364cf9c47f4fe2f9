// The symmetric memory of a rank: what lies where. One struct gives sizes and addresses, so they cannot disagree.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jax_nixlep {

// Raised whenever the meaning of a byte in the region changes: members with different versions refuse each other.
inline constexpr uint32_t kWireVersion = 6;
inline constexpr int kBanks = 2;        // a rank may be one operation ahead of its slowest peer, never two
inline constexpr int kEpochShift = 48;  // a stamp is epoch << kEpochShift | number of the operation in it
// In a tag, on GPUs: the operation before was not finished when this one was started.
inline constexpr uint64_t kSecondInFlight = uint64_t(1) << 63;
inline constexpr int kQuantBlock = 128;
inline constexpr int kChunk = 32;  // tokens that have a bit each in one word
inline constexpr size_t kAlign = 64;

constexpr size_t AlignUp(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }
constexpr int ChunksOf(int num_tokens) { return (num_tokens + kChunk - 1) / kChunk; }

// Capacities of a group; the numbers of EpConfig.
struct Capacity {
  int32_t max_ranks = 0;
  int32_t experts_per_rank = 0;
  int32_t max_tokens = 0;  // per rank and call
  int32_t top_k = 0;
  int64_t row_bytes = 0;  // widest row that travels, scales included

  bool operator==(const Capacity&) const = default;
};

// How one rank tells another that a message is complete. `check` ties the words to each other and to the sender's
// nonce: neither a half-arrived signal nor one of an earlier group at the same address is ever believed.
struct Signal {
  uint64_t stamp;  // see kEpochShift
  uint64_t tag;    // which operation; see OpTag
  uint64_t num_tokens;
  uint64_t check;

  static constexpr uint64_t Check(uint64_t sender_nonce, uint64_t stamp, uint64_t tag, uint64_t num_tokens) {
    uint64_t mixed =
        sender_nonce ^ stamp * 0x9E3779B97F4A7C15u ^ tag * 0xC2B2AE3D27D4EB4Fu ^ num_tokens * 0x165667B19E3779F9u;
    return mixed ^ mixed >> 29;
  }
};

// Why a rank stopped taking part, and in which epoch: a notice says nothing about the sender in a later one. Written,
// added to the sender's nonce, into each peer's region.
enum class Notice : uint64_t { kLeft = 1, kFailed = 2 };
constexpr uint64_t NoticeWord(uint64_t nonce, uint16_t epoch, uint64_t notice) {
  return nonce + (uint64_t(epoch) << 8) + notice;
}

// A message from one rank to another: a table and one row per token of the token's owner.
//   dispatch: first = expert ids int32 [T, K], second = weights float32 [T, K], rows = tokens
//   combine:  first = present int32 [T],       second = scalars float32 [T, K], rows = partial sums
struct Message {
  std::byte* base = nullptr;
  const Capacity* capacity = nullptr;

  size_t choices() const { return size_t(capacity->max_tokens) * capacity->top_k; }
  size_t first_offset() const { return 0; }
  size_t second_offset() const { return AlignUp(choices() * sizeof(int32_t)); }
  size_t rows_offset() const { return second_offset() + AlignUp(choices() * sizeof(float)); }
  size_t row_offset(int token) const { return rows_offset() + size_t(token) * capacity->row_bytes; }
  int32_t* first() const { return reinterpret_cast<int32_t*>(base + first_offset()); }
  float* second() const { return reinterpret_cast<float*>(base + second_offset()); }
  std::byte* row(int token) const { return base + row_offset(token); }
};

// Offsets in a region:
//   control | notices [R] | signals [banks][R] | outbox [banks][R] | inbox [banks][R]
// Peers that share memory read the sender's outbox (pull); other peers get it written into their inbox (push). On CPUs
// what is never touched takes no physical memory; on a GPU all of it does. No size depends on the number of experts but
// that of picks, which follow the rows of a message between GPUs: uint32 [chunks, E], a bit for each token of a chunk
// that goes to the expert of the receiver.
struct Layout {
  Capacity capacity;
  bool has_picks = false;

  struct Control {
    uint64_t nonce;          // proves that a mapping is the region its owner described
    uint32_t doorbell;       // futex word: changes after each signal or notice
    uint32_t sleepers;       // threads of the owner that wait on the doorbell
    uint64_t begun[kBanks];  // stamp of the operation whose outbox is being filled or is complete
  };

  size_t picks() const { return AlignUp(Message{nullptr, &capacity}.row_offset(capacity.max_tokens)); }
  size_t message_bytes() const {
    const size_t words = has_picks ? size_t(ChunksOf(capacity.max_tokens)) * capacity.experts_per_rank : 0;
    return AlignUp(picks() + words * sizeof(uint32_t));
  }
  size_t notices() const { return AlignUp(sizeof(Control)); }
  size_t notice(int from) const { return notices() + size_t(from) * kAlign; }
  size_t signal(int bank, int from) const {
    return notice(capacity.max_ranks) + (size_t(bank) * capacity.max_ranks + from) * kAlign;
  }
  size_t outbox(int bank, int to) const {
    return signal(kBanks, 0) + (size_t(bank) * capacity.max_ranks + to) * message_bytes();
  }
  size_t inbox(int bank, int from) const { return outbox(kBanks + bank, from); }
  size_t num_bytes() const { return inbox(kBanks, 0); }
};

}  // namespace jax_nixlep
