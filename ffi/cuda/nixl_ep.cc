#include "cuda/nixl_ep.h"

#include <dlfcn.h>
#include <sys/random.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <thread>
#include <type_traits>

#include "cuda/host.h"
#include "cuda/kernels.h"

namespace jax_nixlep::cuda::nixl_ep {
namespace {

constexpr int kSendAndReceive = 3;
constexpr size_t kRegionAlign = 128;
constexpr size_t kWorkspaceBytes = 32 << 20;

void Check(cudaError_t status, const char* what) { CheckCuda("nixl_ep", status, what); }

constexpr size_t RoundUp(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Blocks of endpoints that were closed, by device and size. A peer may still have a block mapped, and write to it; so
// none is freed, and a later endpoint takes it over.
std::mutex blocks_mutex;
std::multimap<std::pair<int, size_t>, std::byte*>& FreeBlocks() {
  static auto* blocks = new std::multimap<std::pair<int, size_t>, std::byte*>;
  return *blocks;
}

std::byte* TakeBlock(int device, size_t num_bytes) {
  std::lock_guard lock(blocks_mutex);
  std::byte* block = nullptr;
  auto found = FreeBlocks().find({device, num_bytes});
  if (found != FreeBlocks().end()) {
    block = found->second;
    FreeBlocks().erase(found);
  } else {
    Check(cudaMalloc(&block, num_bytes), "allocating the symmetric memory");
  }
  Check(cudaMemset(block, 0, num_bytes), "clearing the symmetric memory");
  return block;
}

std::string Who(int rank) { return "rank " + std::to_string(rank); }

}  // namespace

Kernels::Kernels(const std::string& library) {
  void* loaded = dlopen(library.c_str(), RTLD_LAZY | RTLD_LOCAL);
  if (!loaded) throw EpError("nixl_ep: cannot load " + library + ": " + dlerror());
  auto find = [&](auto& function, const char* symbol, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(loaded, symbol));
    if (function) return;
    throw EpError(
        "nixl_ep: " + library + " must export nixl_ep::ep_kernels::" + name + " as " + symbol +
        " (so do nixl 1.4.1 and 1.5.1); it does not; install one of these versions, or use kernels=\"native\"");
  };
  find(dispatch,
       "_ZN7nixl_ep10ep_kernels8dispatchEPvS1_PiPlS2_S2_S2_S3_S1_PmS1_PKvPKiS4_iiiiiiiibbbmS1_iP11CUstream_sti"
       "PNS_12gpu_nixl_ctxE",
       "dispatch");
  find(combine,
       "_ZN7nixl_ep10ep_kernels7combineEPvS1_PmS1_PKvPKiPKfS6_PKlPiPlS2_iiiiiiiibmS1_iP11CUstream_stib"
       "PNS_12gpu_nixl_ctxE",
       "combine");
  find(cache_pointer, "_ZN7nixl_ep10ep_kernels13cache_p2p_ptrEPNS_12gpu_nixl_ctxEiP11CUstream_st", "cache_p2p_ptr");
}

RegionLayout::RegionLayout(const Shape& shape) {
  const size_t hidden = size_t(shape.hidden), scales = hidden / 128, tokens = size_t(shape.max_tokens);
  const size_t experts = size_t(shape.max_ranks) * size_t(shape.experts_per_rank);
  const size_t token = 16 + std::max(2 * hidden, hidden + 4 * scales);  // in dispatch, headed by its index
  const size_t sum = 4 * scales + 2 * hidden;                           // in combine
  signals = RoundUp(8 * experts, kRegionAlign);
  outbox = std::max(tokens * token, experts * tokens * sum);
  inbox = experts * tokens * std::max(token, sum);
}

size_t RegionLayout::num_bytes() const {
  return (2 * (signals + outbox + inbox) / kRegionAlign + 1) * kRegionAlign;  // as the peers' views expect it
}

NixlEpEndpoint::NixlEpEndpoint(const Options& options, int device, const std::string& library)
    : options_(options), device_(device), kernels_(library), layout_(options.shape) {
  OnDevice current(device_);
  if (getrandom(&nonce_, sizeof(nonce_), 0) != sizeof(nonce_)) throw EpError("nixl_ep: getrandom failed");
  nonce_ |= 1;
  int clock_khz = 0;
  Check(cudaDeviceGetAttribute(&num_sms_, cudaDevAttrMultiProcessorCount, device_), "counting the SMs");
  Check(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, device_), "reading the clock rate");
  clock_khz_ = uint64_t(clock_khz);
  timeout_cycles_ = uint64_t(options_.timeout_s * 1e3 * double(clock_khz));

  const size_t ranks = size_t(shape().max_ranks);
  peers_.resize(ranks);
  fatal_.resize(ranks);
  size_t end = layout_.num_bytes();
  auto place = [&](size_t num_bytes) {
    const size_t at = RoundUp(end, 256);
    end = at + num_bytes;
    return at;
  };
  counters_at_ = place(ranks * sizeof(int));
  counts_at_ = place(ranks * sizeof(int));
  mask_at_ = place(ranks * sizeof(int));
  fatal_at_ = place(ranks * sizeof(int));
  waits_at_ = place(ranks * sizeof(int64_t));
  pointers_at_ = place(ranks * sizeof(void*));
  context_at_ = place(sizeof(Context));
  workspace_at_ = place(kWorkspaceBytes);
  memory_bytes_ = end;
  Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
  Check(cudaHostAlloc(&host_mask_, ranks * sizeof(int32_t), cudaHostAllocDefault), "allocating the host's mask");
  std::memset(host_mask_, 0, ranks * sizeof(int32_t));
  memory_ = TakeBlock(device_, memory_bytes_);
  Check(cudaDeviceSynchronize(), "clearing the symmetric memory");

  context_.barrier_counters = reinterpret_cast<int*>(Piece(counters_at_));
  context_.barrier_counts = reinterpret_cast<int*>(Piece(counts_at_));
  context_.region = memory_;
  context_.pointers = reinterpret_cast<std::byte**>(Piece(pointers_at_));
  context_.max_ranks = shape().max_ranks;
  context_.num_hosts = options_.num_hosts;
  context_.rank = options_.rank;
  Peer& self = peers_.at(size_t(options_.rank));
  self.info = {reinterpret_cast<uint64_t>(memory_), reinterpret_cast<uint64_t>(context_.barrier_counters), 0, device_,
               options_.rank};
}

NixlEpEndpoint::~NixlEpEndpoint() {
  try {
    Close();
  } catch (const std::exception&) {  // the device is gone; there is nobody left to tell
  }
}

std::string NixlEpEndpoint::OpenNixl(const std::string& library, const std::string& name) {
  std::lock_guard lock(mutex_);
  OnDevice current(device_);
  if (!nixl_) {
    auto agent = std::make_unique<NixlAgent>(library, name, device_);
    const size_t ranks = size_t(shape().max_ranks);
    agent->Register(memory_, num_bytes());
    agent->Register(Piece(counters_at_), ranks * sizeof(int));
    agent->Register(Piece(counts_at_), ranks * sizeof(int));
    nixl_ = std::move(agent);
  }
  const PeerInfo& info = peers_[size_t(options_.rank)].info;
  return std::string(reinterpret_cast<const char*>(&info), sizeof(info)) + nixl_->Metadata();
}

void NixlEpEndpoint::ConnectNixl(int peer, const std::string& metadata, uint64_t /*base*/, uint64_t /*nonce*/) {
  std::lock_guard lock(mutex_);
  OnDevice current(device_);
  Peer& p = peers_.at(size_t(peer));
  if (metadata.size() <= sizeof(p.info)) throw EpError("nixl_ep: metadata must come from a peer's open_nixl");
  std::memcpy(&p.info, metadata.data(), sizeof(p.info));
  p.agent = nixl_->Connect(metadata.substr(sizeof(p.info)));
}

std::string NixlEpEndpoint::AgentMetadata() const {
  std::lock_guard lock(mutex_);
  if (!nixl_) throw EpError("nixl_ep: open_nixl must be called before; it was not");
  return nixl_->Metadata();
}

void NixlEpEndpoint::ConnectUpstream(int peer, const std::string& metadata, double timeout_s) {
  std::lock_guard lock(mutex_);
  OnDevice current(device_);
  Peer& p = peers_.at(size_t(peer));
  p.agent = nixl_->Connect(metadata);
  const PeerInfo& own = peers_[size_t(options_.rank)].info;
  nixl_->Tell(p.agent, std::string(reinterpret_cast<const char*>(&own), sizeof(own)));
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_s);
  while (p.info.region == 0) {
    for (const std::string& message : nixl_->Told()) {
      PeerInfo info;
      if (message.size() != sizeof(info)) continue;
      std::memcpy(&info, message.data(), sizeof(info));
      if (info.rank >= 0 && info.rank < shape().max_ranks) peers_[size_t(info.rank)].info = info;
    }
    if (std::chrono::steady_clock::now() > deadline) {
      throw EpError("nixl_ep: " + Who(peer) + " did not tell where its memory is within " + std::to_string(timeout_s) +
                    " s; check that it runs connect_ranks, with this rank in it");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

void NixlEpEndpoint::ReleaseViews() {
  for (void** view : {&context_.local_view, &context_.barrier_view, &context_.remote_view}) {
    if (*view) nixl_->ReleaseView(*view);
    *view = nullptr;
  }
}

void NixlEpEndpoint::MakeViews() {
  const size_t counter_bytes = size_t(shape().max_ranks) * sizeof(int);
  std::vector<NixlAgent::ViewRow> regions(peers_.size()), counters(peers_.size());
  for (size_t r = 0; r < peers_.size(); ++r) {
    const Peer& p = peers_[r];
    if (p.agent.empty()) continue;
    regions[r] = {p.info.region, num_bytes(), p.info.device, p.agent};
    counters[r] = {p.info.barrier_counters, counter_bytes, p.info.device, p.agent};
  }
  const NixlAgent::ViewRow own[] = {{reinterpret_cast<uint64_t>(memory_), num_bytes(), device_},
                                    {reinterpret_cast<uint64_t>(context_.barrier_counts), counter_bytes, device_}};
  auto remote = [&](std::vector<NixlAgent::ViewRow> rows) {
    const std::optional<void*> view = RemoteViewInTime(*nixl_, std::move(rows), device_);
    if (!view) {
      static_cast<void>(nixl_.release());
      throw EpError(kStuck);
    }
    return *view;
  };
  context_.local_view = nixl_->LocalView(own);
  context_.remote_view = remote(std::move(regions));
  context_.barrier_view = remote(std::move(counters));
}

// The kernels keep the peers' pointers themselves. That they put the right ones in the right place shows that they read
// the context as it is written here.
void NixlEpEndpoint::FindPointersOf(std::span<const int> peers) {
  const size_t ranks = peers_.size();
  std::vector<uint32_t> wanted(ranks, 0);
  for (int r : peers) wanted[size_t(r)] = 1;
  uint32_t* device_wanted = reinterpret_cast<uint32_t*>(Piece(workspace_at_));
  auto** device_pointers = reinterpret_cast<std::byte**>(Piece(workspace_at_ + RoundUp(4 * ranks, 256)));
  std::vector<std::byte*> ours(ranks), theirs(ranks);
  Check(cudaMemcpy(device_wanted, wanted.data(), 4 * ranks, cudaMemcpyHostToDevice), "copying");
  Check(FindPointers(context_.remote_view, int(ranks), device_wanted, device_pointers, stream_),
        "looking for pointers to the peers");
  Check(cudaStreamSynchronize(stream_), "looking for pointers to the peers");
  Check(cudaMemcpy(ours.data(), device_pointers, 8 * ranks, cudaMemcpyDeviceToHost), "copying");
  Check(cudaMemset(device_wanted, 0, RoundUp(4 * ranks, 256) + 8 * ranks), "clearing the workspace");

  constexpr int kUntouched = 0xA5;
  Check(cudaMemset(context_.pointers, kUntouched, 8 * ranks), "preparing the check of the context");
  Check(cudaDeviceSynchronize(), "preparing the check of the context");
  auto* context = reinterpret_cast<Context*>(Piece(context_at_));
  for (int r : peers) kernels_.cache_pointer(context, r, stream_);
  Check(cudaStreamSynchronize(stream_), "cache_p2p_ptr of the library (its context may have changed)");
  Check(cudaMemcpy(theirs.data(), context_.pointers, 8 * ranks, cudaMemcpyDeviceToHost), "copying");
  std::byte* untouched = nullptr;
  std::memset(&untouched, kUntouched, sizeof(untouched));
  for (size_t r = 0; r < ranks; ++r) {
    if (theirs[r] != (wanted[r] ? ours[r] : untouched)) {
      throw EpError("nixl_ep: the library does not read its context as versions 1.4.1 and 1.5.1 do (pointer to " +
                    Who(int(r)) + "); install one of these, or use kernels=\"native\"");
    }
    peers_[r].by_pointer = wanted[r] && ours[r] && PointersAllowed();
    if (!peers_[r].by_pointer) theirs[r] = nullptr;
  }
  Check(cudaMemcpy(context_.pointers, theirs.data(), 8 * ranks, cudaMemcpyHostToDevice), "writing the pointers");
}

void NixlEpEndpoint::Activate(uint16_t epoch, std::span<const int> members) {
  std::lock_guard lock(mutex_);
  OnDevice current(device_);
  for (Peer& peer : peers_) peer.member = false;
  for (int r : members) {
    Peer& peer = peers_.at(size_t(r));
    if (r != options_.rank && peer.agent.empty()) {
      throw EpError("nixl_ep: " + Who(r) + " is to be a member but is not connected");
    }
    peer.member = true;
  }
  Check(cudaDeviceSynchronize(), "finishing before the membership changes");
  std::vector<int> connected;
  for (size_t r = 0; r < peers_.size(); ++r) {
    if (!peers_[r].agent.empty()) connected.push_back(int(r));
  }
  if (nixl_) ReleaseViews();
  if (!connected.empty() && !nixl_) throw EpError(kStuck);
  if (!connected.empty()) MakeViews();
  Check(cudaMemcpy(Piece(context_at_), &context_, sizeof(context_), cudaMemcpyHostToDevice), "writing the context");
  if (!connected.empty()) FindPointersOf(connected);
  for (size_t r = 0; r < peers_.size(); ++r) {
    host_mask_[r] = !peers_[r].member;
    fatal_[r] = peers_[r].member && !options_.mask_late_peers;
  }
  WriteMask();
  // Before the first operation they are clear, and a peer that was quicker may have set some.
  if (operations_ > 0) Check(cudaMemset(memory_, 0, 2 * layout_.signals), "clearing the signals");
  Check(cudaDeviceSynchronize(), "activating");
  bank_ = 0;
  epoch_ = epoch;
  active_ = true;
}

void NixlEpEndpoint::WriteMask() {
  const size_t num_bytes = 4 * peers_.size();
  Check(cudaMemcpy(Piece(mask_at_), host_mask_, num_bytes, cudaMemcpyHostToDevice), "writing the mask");
  Check(cudaMemcpy(Piece(fatal_at_), fatal_.data(), num_bytes, cudaMemcpyHostToDevice), "writing the mask");
}

void NixlEpEndpoint::Close() {
  std::lock_guard lock(mutex_);
  if (closed_) return;
  closed_ = true;
  active_ = false;
  OnDevice current(device_);
  Check(cudaDeviceSynchronize(), "closing");
  if (nixl_) ReleaseViews();
  nixl_.reset();
  cudaStreamDestroy(stream_);
  cudaFreeHost(host_mask_);
  host_mask_ = nullptr;
  std::lock_guard blocks_lock(blocks_mutex);
  FreeBlocks().emplace(std::pair(device_, memory_bytes_), memory_);
}

PeerHealth NixlEpEndpoint::Health(int peer) const {
  std::lock_guard lock(mutex_);
  const Peer& p = peers_.at(size_t(peer));
  PeerHealth health;
  health.member = p.member;
  health.path = peer == options_.rank ? "self" : !p.member ? "none" : p.by_pointer ? "pointer" : "put";
  if (closed_) return health;
  OnDevice current(device_);
  int64_t cycles = 0;
  Check(cudaMemcpyAsync(&cycles, Piece(waits_at_) + 8 * peer, 8, cudaMemcpyDeviceToHost, stream_), "reading");
  Check(cudaStreamSynchronize(stream_), "reading");
  health.masked = p.member && host_mask_[peer];
  health.timeouts = health.masked;
  // Every local expert waits for itself.
  health.wait_us = uint64_t(cycles) * 1000 / clock_khz_ / uint64_t(shape().experts_per_rank);
  return health;
}

uint64_t NixlEpEndpoint::num_operations() const {
  std::lock_guard lock(mutex_);
  return operations_;
}

std::string NixlEpEndpoint::Failure() const {
  std::lock_guard lock(mutex_);
  return FailureLocked();
}

std::string NixlEpEndpoint::FailureLocked() const {
  if (!host_mask_) return "";
  for (size_t r = 0; r < peers_.size(); ++r) {
    if (fatal_[r] && reinterpret_cast<volatile int32_t&>(host_mask_[r])) {
      return Who(int(r)) + " did not arrive within " + std::to_string(options_.timeout_s) +
             " s; check that rank's output, or raise timeout_s if it is only slow";
    }
  }
  return "";
}

int32_t* NixlEpEndpoint::Begin(const char* op, int num_tokens, int32_t* masked, cudaStream_t stream) const {
  if (!active_) throw EpError(std::string(op) + ": the group was shut down; call initialize first");
  if (std::string failure = FailureLocked(); !failure.empty()) {
    throw EpError(std::string(op) + ": the group failed earlier: " + failure + "; shut down and initialize again");
  }
  if (num_tokens > shape().max_tokens) {
    throw EpError(std::string(op) + ": tokens must be at most max_tokens_per_rank = " +
                  std::to_string(shape().max_tokens) + "; got " + std::to_string(num_tokens));
  }
  auto* mask = reinterpret_cast<int32_t*>(Piece(mask_at_));
  const size_t num_bytes = peers_.size() * sizeof(int32_t);
  Check(cudaMemcpyAsync(masked, mask, num_bytes, cudaMemcpyDeviceToDevice, stream), "reading the mask");
  return mask;
}

void NixlEpEndpoint::End(int32_t* masked, cudaStream_t stream) {
  const size_t num_bytes = peers_.size() * sizeof(int32_t);
  Check(cudaMemcpyAsync(masked + peers_.size(), Piece(mask_at_), num_bytes, cudaMemcpyDeviceToDevice, stream),
        "reading the mask");
  Check(cudaMemcpyAsync(masked + 2 * peers_.size(), Piece(fatal_at_), num_bytes, cudaMemcpyDeviceToDevice, stream),
        "reading the mask");
  Check(cudaMemcpyAsync(host_mask_, Piece(mask_at_), num_bytes, cudaMemcpyDeviceToHost, stream), "reading the mask");
  bank_ ^= 1;
  ++operations_;
}

void NixlEpEndpoint::Dispatch(const DispatchArgs& args, cudaStream_t stream) {
  std::lock_guard lock(mutex_);
  int32_t* mask = Begin("dispatch", args.num_tokens, args.masked, stream);
  const Shape& s = shape();
  kernels_.dispatch(args.rows, args.scales, args.source, args.ranges, args.counts, mask, nullptr,
                    reinterpret_cast<int64_t*>(Piece(waits_at_)), Piece(layout_.inbox_at(bank_)),
                    reinterpret_cast<uint64_t*>(Piece(layout_.signals_at(bank_))), Piece(layout_.outbox_at(bank_)),
                    args.x, args.ids, reinterpret_cast<uint64_t*>(Piece(layout_.signals_at(bank_ ^ 1))),
                    s.max_ranks * s.experts_per_rank, args.num_tokens, s.hidden, s.max_tokens, s.top_k, s.max_ranks,
                    s.experts_per_rank, options_.rank, args.fp8, args.round_scale, args.ue8m0, timeout_cycles_,
                    Piece(workspace_at_), num_sms_, stream, kSendAndReceive,
                    reinterpret_cast<Context*>(Piece(context_at_)));
  End(args.masked, stream);
}

void NixlEpEndpoint::Combine(const CombineArgs& args, cudaStream_t stream) {
  std::lock_guard lock(mutex_);
  int32_t* mask = Begin("combine", args.num_tokens, args.masked, stream);
  const Shape& s = shape();
  kernels_.combine(args.y, Piece(layout_.inbox_at(bank_)),
                   reinterpret_cast<uint64_t*>(Piece(layout_.signals_at(bank_))), Piece(layout_.outbox_at(bank_)),
                   args.rows, args.ids, args.weights, args.source, args.ranges, mask,
                   reinterpret_cast<int64_t*>(Piece(waits_at_)),
                   reinterpret_cast<uint64_t*>(Piece(layout_.signals_at(bank_ ^ 1))), s.max_ranks * s.experts_per_rank,
                   args.num_tokens, s.hidden, s.max_tokens, s.top_k, s.max_ranks, s.experts_per_rank, options_.rank,
                   /*log_format=*/false, timeout_cycles_, Piece(workspace_at_), num_sms_, stream, kSendAndReceive,
                   /*zero_copy=*/false, reinterpret_cast<Context*>(Piece(context_at_)));
  End(args.masked, stream);
}

}  // namespace jax_nixlep::cuda::nixl_ep
