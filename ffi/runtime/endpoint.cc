#include "runtime/endpoint.h"

#include <linux/futex.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <ctime>
#include <utility>

namespace jax_nixlep {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// Long enough to catch a peer that runs on another core, short enough not to keep it off this one.
constexpr microseconds kSpin{5};
// A peer in shared memory rings the doorbell; the sleep is bounded only to notice a death.
constexpr microseconds kNapShared{100'000};
// Writes through NIXL ring nothing: look for them this often.
constexpr microseconds kNapNixl{50};
// How long an operation that failed waits for its own writes.
constexpr microseconds kDrain{200'000};
constexpr int kMaxPiecesPerTransfer = 512;
// How long to keep memory that a peer may still write to through NIXL, so that it can say goodbye too.
constexpr std::chrono::milliseconds kLinger{200};

template <typename T>
std::atomic_ref<T> Atomic(T& word) {
  return std::atomic_ref<T>(word);
}

uint64_t MakeStamp(uint16_t epoch, uint64_t sequence) { return uint64_t(epoch) << kEpochShift | sequence; }

uint64_t RandomNonce() {
  uint64_t nonce = 0;
  if (getrandom(&nonce, sizeof(nonce), 0) != sizeof(nonce)) throw EpError("endpoint: getrandom failed");
  return nonce | 1;  // never the zero of fresh memory
}

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

std::string OpTag::Name(uint64_t packed) {
  static constexpr const char* kNames[] = {"unknown operation", "dispatch", "dispatch along a handle", "combine"};
  const size_t kind = (packed & ~kSecondInFlight) >> 56;
  return std::string(kNames[kind < std::size(kNames) ? kind : 0]) + " #" + std::to_string(uint32_t(packed));
}

std::string OpTag::NameBeside(uint64_t theirs, uint64_t ours) {
  const std::string name = Name(theirs);
  if ((theirs ^ ours) == kSecondInFlight) return name + " with other operations unfinished";
  return name == Name(ours) ? name + " of another shape, dtype or wire" : name;
}

Endpoint::Endpoint(const EndpointOptions& options) : options_(options), layout_{options.capacity} {
  memory_ = std::make_shared<SharedMemory>(SharedMemory::Create(layout_.num_bytes()));
  control(base()).nonce = RandomNonce();
  for (int r = 0; r < capacity().max_ranks; ++r) peers_.push_back(std::make_unique<Peer>());
}

Endpoint::~Endpoint() { Close(); }

uint64_t Endpoint::nonce() const { return control(base()).nonce; }

bool Endpoint::MapPeer(int peer, int pid, int fd, uint64_t nonce) {
  try {
    return AttachPeer(peer, std::make_shared<SharedMemory>(SharedMemory::Open(pid, fd, layout_.num_bytes())), nonce);
  } catch (const std::runtime_error&) {  // another machine or container: its ids mean something else here
    return false;
  }
}

bool Endpoint::AttachPeer(int peer, std::shared_ptr<SharedMemory> memory, uint64_t nonce) {
  if (memory->size() != layout_.num_bytes() || control(memory->data()).nonce != nonce) return false;
  Link(peer, std::move(memory), "", 0, nonce);
  return true;
}

std::string Endpoint::OpenNixl(const std::string& library, const std::string& name) {
  if (!nixl_) {
    auto agent = std::make_unique<NixlAgent>(library, name);
    agent->Register(base(), layout_.num_bytes());
    std::lock_guard lock(busy_);  // not while it is made: operations go on
    nixl_ = std::move(agent);
  }
  return nixl_->Metadata();
}

void Endpoint::ConnectNixl(int peer, const std::string& metadata, uint64_t remote_base, uint64_t nonce) {
  Link(peer, nullptr, "", 0, 0);  // NIXL refuses to know one agent twice
  Link(peer, nullptr, nixl_->Connect(metadata), remote_base, nonce);
}

void Endpoint::DropPeer(int peer) {
  Link(peer, nullptr, "", 0, 0);
  peers_[peer]->member = false;
}

void Endpoint::Link(int peer, std::shared_ptr<SharedMemory> memory, std::string agent, uint64_t remote_base,
                    uint64_t nonce) {
  Peer& p = *peers_.at(peer);
  std::unique_lock busy(busy_, std::defer_lock);
  if (p.member) busy.lock();
  {
    std::lock_guard lock(links_);
    p.memory.swap(memory);
    p.agent.swap(agent);
    p.remote_base = remote_base;
    p.nonce = nonce;
  }
  // What was there before goes without the lock: that takes its time.
  if (!agent.empty() && nixl_) nixl_->Disconnect(agent);
}

void Endpoint::Activate(uint16_t epoch, std::span<const int> members) {
  std::lock_guard lock(busy_);
  std::lock_guard links(links_);
  for (auto& peer : peers_) peer->member = false, peer->masked = false;
  for (int r : members) {
    Peer& peer = *peers_.at(r);
    if (r != rank() && !peer.memory && peer.agent.empty()) {
      throw EpError("endpoint: rank " + std::to_string(r) + " is to be a member but is not connected");
    }
    peer.member = true;
  }
  epoch_ = epoch;
  sequence_ = 0;
  {
    std::lock_guard failure_lock(failure_lock_);
    failure_.clear();
  }
  interrupted_ = false;
  active_ = true;
}

void Endpoint::Interrupt() {
  interrupted_ = true;
  Ring(base());
}

bool Endpoint::GaveUp() const {
  return std::any_of(peers_.begin(), peers_.end(), [](const auto& peer) { return peer->masked.load(); });
}

std::string Endpoint::Failure() const {
  std::lock_guard lock(failure_lock_);
  return interrupted_ && failure_.empty() ? "the members changed" : failure_;
}

std::shared_ptr<SharedMemory> Endpoint::MemoryOf(int peer) const {
  const Peer& p = *peers_.at(peer);
  std::lock_guard lock(links_);
  return p.memory;
}

bool Endpoint::PeerAlive(int peer) const {
  const auto memory = MemoryOf(peer);
  return !memory || memory->OwnerAlive();
}

bool Endpoint::ShowsDeath(int peer) const { return MemoryOf(peer) != nullptr; }

void Endpoint::Ring(std::byte* region) const {
  Layout::Control& owner = control(region);
  Atomic(owner.doorbell).fetch_add(1);
  if (Atomic(owner.sleepers).load()) syscall(SYS_futex, &owner.doorbell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Endpoint::SleepUntilRung(uint32_t seen, microseconds at_most) {
  Layout::Control& own = control(base());
  timespec span{at_most.count() / 1'000'000, at_most.count() % 1'000'000 * 1000};
  Atomic(own.sleepers).fetch_add(1);
  syscall(SYS_futex, &own.doorbell, FUTEX_WAIT, seen, &span, nullptr, 0);  // returns at once if it was rung since
  Atomic(own.sleepers).fetch_sub(1);
}

void Endpoint::NotifyPeers(Notice notice) {
  const uint64_t word = NoticeWord(nonce(), epoch_, uint64_t(notice));
  const size_t offset = layout_.notice(rank());
  Atomic(*reinterpret_cast<uint64_t*>(base() + offset)).store(word);
  for (int r = 0; r < capacity().max_ranks; ++r) {
    Peer& peer = *peers_[r];
    if (r == rank() || !peer.member || NoticeOf(r)) continue;  // who has left may have given its memory back
    if (peer.memory) {
      std::byte* region = peer.memory->data();
      Atomic(*reinterpret_cast<uint64_t*>(region + offset)).store(word);
      Ring(region);
    } else if (nixl_) {
      try {  // best effort: a peer that cannot be told finds out by its own bounded wait
        NixlAgent::Piece piece{base() + offset, peer.remote_base + offset, sizeof(word)};
        NixlAgent::Transfer transfer(*nixl_, peer.agent, {&piece, 1});
        for (auto end = Clock::now() + std::chrono::milliseconds(200); !transfer.Done() && Clock::now() < end;) {
          usleep(kNapNixl.count());
        }
      } catch (const NixlError&) {
      }
    }
  }
}

std::optional<Notice> Endpoint::NoticeOf(int peer) const {
  auto& word = *reinterpret_cast<uint64_t*>(base() + layout_.notice(peer));
  const uint64_t notice = Atomic(word).load() - NoticeWord(peers_[peer]->nonce, epoch_, 0);
  if (notice != uint64_t(Notice::kLeft) && notice != uint64_t(Notice::kFailed)) return std::nullopt;
  return Notice(notice);
}

void Endpoint::Close() {
  if (closing_.exchange(true)) return;
  Ring(base());
  std::lock_guard lock(busy_);  // an operation that waits gives up now
  if (Failure().empty()) NotifyPeers(Notice::kLeft);
  const auto may_write = [&](int r) { return peers_[r]->member && !peers_[r]->agent.empty() && !NoticeOf(r); };
  for (const auto end = Clock::now() + kLinger; Clock::now() < end; usleep(kNapNixl.count())) {
    bool any = false;
    for (int r = 0; r < capacity().max_ranks; ++r) any |= may_write(r);
    if (!any) break;
  }
  active_ = false;
  nixl_.reset();
  std::lock_guard links(links_);
  for (auto& peer : peers_) peer->memory.reset(), peer->agent.clear(), peer->member = false;
}

PeerHealth Endpoint::Health(int rank) const {
  const Peer& peer = *peers_.at(rank);
  std::lock_guard lock(links_);
  return {.bytes_out = peer.bytes_out,
          .bytes_in = peer.bytes_in,
          .wait_us = peer.wait_us,
          .timeouts = peer.timeouts,
          .member = peer.member,
          .masked = peer.masked,
          .path = rank == this->rank() ? "self"
                  : peer.memory        ? "shared memory"
                  : peer.agent.empty() ? "none"
                                       : "nixl"};
}

Operation::Operation(Endpoint& endpoint, OpTag tag, int num_tokens, bool broadcast)
    : endpoint_(endpoint), busy_(endpoint.busy_), tag_(tag.Pack()), broadcast_(broadcast) {
  const std::string name = OpTag::Name(tag_);
  if (endpoint_.closing_ || !endpoint_.active_)
    throw EpError(name + ": the group was shut down; call initialize first");
  if (endpoint_.interrupted_) throw EpError(name + ": interrupted: the members of the group change");
  if (const std::string failure = endpoint_.Failure(); !failure.empty()) {
    throw EpError(name + ": the group failed earlier: " + failure + "; shut down and initialize again");
  }
  if (num_tokens > endpoint_.capacity().max_tokens) {
    throw EpError(name + ": tokens must be at most max_tokens_per_rank = " +
                  std::to_string(endpoint_.capacity().max_tokens) + "; got " + std::to_string(num_tokens));
  }
  stamp_ = MakeStamp(endpoint_.epoch_, ++endpoint_.sequence_);
  bank_ = int(endpoint_.sequence_ % kBanks);
  ++endpoint_.num_operations_;
  deadline_ = Clock::now() + microseconds(int64_t(endpoint_.options_.timeout_s * 1e6));
  num_tokens_.assign(max_ranks(), 0);
  num_tokens_[rank()] = num_tokens;
  for (auto& peer : endpoint_.peers_)
    states_.push_back(peer->member && !peer->masked ? PeerState::kOk : PeerState::kAbsent);

  // A reader that was left behind sees by this word that its source went on (Finish).
  Atomic(endpoint_.control(endpoint_.base()).begun[bank_]).store(stamp_);
  Signal& own = endpoint_.signal(endpoint_.base(), bank_, rank());
  const uint64_t count = uint64_t(num_tokens);
  own = {stamp_, tag_, count, Signal::Check(endpoint_.nonce(), stamp_, tag_, count)};
}

Operation::~Operation() {
  if (finished_) return;
  // A write that landed later could meet the data of the next epoch: let those to live peers end.
  for (const auto end = Clock::now() + kDrain; !outgoing_.empty() && Clock::now() < end; usleep(kNapNixl.count())) {
    std::erase_if(outgoing_, [&](Outgoing& out) {
      try {
        return out.transfer.Done();
      } catch (const NixlError&) {
        return true;
      }
    });
  }
  outgoing_.clear();
  {
    std::lock_guard lock(endpoint_.failure_lock_);
    if (endpoint_.failure_.empty()) endpoint_.failure_ = Describe() + " did not complete";
  }
  endpoint_.NotifyPeers(endpoint_.closing_ ? Notice::kLeft : Notice::kFailed);
}

std::string Operation::Describe() const {
  return OpTag::Name(tag_) + " (operation " + std::to_string(stamp_ & ((uint64_t(1) << kEpochShift) - 1)) +
         " of epoch " + std::to_string(stamp_ >> kEpochShift) + ")";
}

std::byte* Operation::region(int rank) const {
  return rank == this->rank() ? endpoint_.base() : endpoint_.peers_[rank]->memory->data();
}

Message Operation::outgoing(int to) const {
  int slot = broadcast_ ? rank() : to;
  return {endpoint_.base() + endpoint_.layout_.outbox(bank_, slot), &endpoint_.capacity()};
}

Message Operation::incoming(int from) const {
  const Layout& layout = endpoint_.layout_;
  bool pulled = from == rank() || endpoint_.peers_[from]->memory;
  size_t offset = pulled ? layout.outbox(bank_, broadcast_ ? from : rank()) : layout.inbox(bank_, from);
  return {(pulled ? region(from) : endpoint_.base()) + offset, &endpoint_.capacity()};
}

void Operation::Publish(int to, size_t first_bytes, size_t second_bytes, size_t row_bytes,
                        const std::function<bool(int token)>& sends_row) {
  if (to == rank() || !live(to)) return;
  Endpoint::Peer& peer = *endpoint_.peers_[to];
  const Signal& own = endpoint_.signal(endpoint_.base(), bank_, rank());
  if (peer.memory) {
    Signal& theirs = endpoint_.signal(peer.memory->data(), bank_, rank());
    Atomic(theirs.tag).store(own.tag, std::memory_order_relaxed);
    Atomic(theirs.num_tokens).store(own.num_tokens, std::memory_order_relaxed);
    Atomic(theirs.check).store(own.check, std::memory_order_relaxed);
    Atomic(theirs.stamp).store(own.stamp, std::memory_order_release);
    endpoint_.Ring(peer.memory->data());
    return;
  }
  // Before anything is written to memory that may no longer be there.
  if (const auto notice = endpoint_.NoticeOf(to)) return GiveUp(to, *notice);
  Message message = outgoing(to);
  uint64_t remote = peer.remote_base + endpoint_.layout_.inbox(bank_, rank());
  std::vector<NixlAgent::Piece> pieces;
  auto add = [&](size_t offset, size_t num_bytes) {
    if (!num_bytes) return;
    peer.bytes_out += num_bytes;
    if (!pieces.empty() && pieces.back().remote + pieces.back().num_bytes == remote + offset) {
      pieces.back().num_bytes += num_bytes;  // rows that lie side by side travel as one
    } else {
      pieces.push_back({message.base + offset, remote + offset, num_bytes});
    }
  };
  add(message.first_offset(), first_bytes);
  add(message.second_offset(), second_bytes);
  const int tokens = broadcast_ ? num_tokens_[rank()] : endpoint_.capacity().max_tokens;
  for (int t = 0; row_bytes && t < tokens; ++t) {
    if (sends_row(t)) add(message.row_offset(t), row_bytes);
  }
  try {
    // The signal follows once the data has arrived: writes of different transfers are not ordered.
    for (size_t i = 0; i < pieces.size(); i += kMaxPiecesPerTransfer) {
      auto part = std::span(pieces).subspan(i, std::min<size_t>(kMaxPiecesPerTransfer, pieces.size() - i));
      outgoing_.push_back({to, false, NixlAgent::Transfer(*endpoint_.nixl_, peer.agent, part)});
    }
    if (pieces.empty()) outgoing_.push_back({to, false, NixlAgent::Transfer()});
  } catch (const NixlError& error) {
    GiveUp(to, error);
  }
  Progress();
}

void Operation::Progress() {
  for (size_t i = 0; i < outgoing_.size();) {
    Outgoing& out = outgoing_[i];
    const int to = out.to;
    try {
      if (!out.transfer.Done()) {
        ++i;
        continue;
      }
      const bool was_signal = out.is_signal;
      std::swap(out, outgoing_.back());
      outgoing_.pop_back();
      bool last_piece = std::none_of(outgoing_.begin(), outgoing_.end(), [&](auto& other) { return other.to == to; });
      if (was_signal || !last_piece) continue;
      const size_t offset = endpoint_.layout_.signal(bank_, rank());
      const Endpoint::Peer& peer = *endpoint_.peers_[to];
      NixlAgent::Piece piece{endpoint_.base() + offset, peer.remote_base + offset, sizeof(Signal)};
      outgoing_.push_back({to, true, NixlAgent::Transfer(*endpoint_.nixl_, peer.agent, {&piece, 1})});
    } catch (const NixlError& error) {
      GiveUp(to, error);
      i = 0;
    }
  }
}

void Operation::GiveUp(int peer, const std::string& why) {
  std::erase_if(outgoing_, [&](const Outgoing& out) { return out.to == peer; });
  ++endpoint_.peers_[peer]->timeouts;
  if (!endpoint_.options_.mask_late_peers) {
    throw EpError(Describe() + ": rank " + std::to_string(peer) + " " + why +
                  "; check that rank's output, or raise timeout_s if it is only slow");
  }
  endpoint_.peers_[peer]->masked = true;
  states_[peer] = PeerState::kTimedOut;
}

void Operation::GiveUp(int peer, const NixlError& error) {
  // A rank that said goodbye cannot be written to any more.
  if (const auto notice = endpoint_.NoticeOf(peer)) return GiveUp(peer, *notice);
  GiveUp(peer, std::string("cannot be reached: ") + error.what());
}

bool Operation::Arrived(int from) {
  // Looked at before the signal: a rank that stops has sent what it had to send before it says so.
  const std::optional<Notice> notice = endpoint_.NoticeOf(from);
  Signal& theirs = endpoint_.signal(endpoint_.base(), bank_, from);
  const uint64_t stamp = Atomic(theirs.stamp).load(std::memory_order_acquire);
  const std::string who = "rank " + std::to_string(from);
  const uint64_t tag = Atomic(theirs.tag).load(std::memory_order_relaxed);
  const uint64_t tokens = Atomic(theirs.num_tokens).load(std::memory_order_relaxed);
  const uint64_t check = Atomic(theirs.check).load(std::memory_order_relaxed);
  const bool whole = check == Signal::Check(endpoint_.peers_[from]->nonce, stamp, tag, tokens);
  if (whole && stamp == stamp_) {
    if (tag != tag_) {
      throw EpError(Describe() + ": " + who + " runs " + OpTag::NameBeside(tag, tag_) + " at the same place; " +
                    kSameOrder);
    }
    if (tokens > uint64_t(endpoint_.capacity().max_tokens))
      throw EpError(Describe() + ": " + who + " sent a bad count");
    num_tokens_[from] = int(tokens);
    return true;
  }
  if (whole && stamp > stamp_ && (stamp >> kEpochShift) == (stamp_ >> kEpochShift)) {
    throw EpError(Describe() + ": " + who + " went on without this rank, which was too late");
  }
  if (notice && live(from)) GiveUp(from, *notice);
  return false;
}

void Operation::GiveUp(int peer, Notice notice) {
  if (notice == Notice::kFailed && endpoint_.options_.mask_late_peers) return GiveUp(peer, "failed");
  throw EpError(Describe() + ": rank " + std::to_string(peer) +
                (notice == Notice::kLeft ? " has left the group" : " failed; see its error"));
}

PeerState Operation::Wait(int from) {
  if (from == rank() || !live(from)) return state(from);
  Endpoint::Peer& peer = *endpoint_.peers_[from];
  const auto start = Clock::now();
  std::string why;
  for (;;) {
    const uint32_t rung = Atomic(endpoint_.control(endpoint_.base()).doorbell).load();
    if (Arrived(from)) break;
    if (endpoint_.interrupted_) throw EpError(Describe() + ": interrupted: the members of the group change");
    if (endpoint_.closing_) throw EpError(Describe() + ": shut down while waiting for rank " + std::to_string(from));
    Progress();
    if (!live(from)) break;  // it could not be written to
    const auto now = Clock::now();
    if (now >= deadline_) {
      why = "did not arrive within " + std::to_string(endpoint_.options_.timeout_s) + " s";
      break;
    }
    if (now - start < kSpin) {
      Pause();
      continue;
    }
    if (peer.memory && now - start > kNapShared && !peer.memory->OwnerAlive() && !Arrived(from) && live(from)) {
      why = "is dead";
      break;
    }
    const bool pushing = !peer.memory || !outgoing_.empty();
    const auto left = std::chrono::ceil<microseconds>(deadline_ - now);
    endpoint_.SleepUntilRung(rung, std::min(left, pushing ? kNapNixl : kNapShared));
  }
  peer.wait_us += uint64_t(std::chrono::duration_cast<microseconds>(Clock::now() - start).count());
  if (!why.empty()) GiveUp(from, why);
  return state(from);
}

void Operation::Finish() {
  for (Progress(); !outgoing_.empty(); Progress()) {
    if (Clock::now() >= deadline_) {
      GiveUp(outgoing_.front().to,
             "did not take its data within " + std::to_string(endpoint_.options_.timeout_s) + " s");
    } else {
      usleep(kNapNixl.count());
    }
  }
  for (int r = 0; r < max_ranks(); ++r) {
    if (!live(r) || r == rank() || !endpoint_.peers_[r]->memory) continue;
    // A read-modify-write, so that no read of the peer's data can sink below it.
    if (Atomic(endpoint_.control(region(r)).begun[bank_]).fetch_add(0) != stamp_) {
      throw EpError(Describe() + ": rank " + std::to_string(r) + " went on while its data was read");
    }
  }
  finished_ = true;
}

}  // namespace jax_nixlep
