#include "cuda/endpoint.h"

#include <sys/random.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>

namespace jax_nixlep::cuda {
namespace {

void Check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw EpError(std::string("endpoint: ") + what + " failed: " + cudaGetErrorString(status));
  }
}

// Makes the device current for a scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    Check(cudaGetDevice(&before_), "cudaGetDevice");
    Check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

// Device memory that outlives endpoints. The state is found by captured graphs, a region by peers that are slow to
// leave; so neither is freed, and a later endpoint takes them over.
struct DeviceMemory {
  DeviceState* state = nullptr;
  FailureReport* report = nullptr;
  std::multimap<size_t, std::byte*> free_regions;
  bool in_use = false;
};

std::mutex memory_mutex;
std::map<int, DeviceMemory>& Memories() {
  static auto* memories = new std::map<int, DeviceMemory>;
  return *memories;
}

std::byte* TakeRegion(DeviceMemory& memory, size_t num_bytes) {
  std::byte* region = nullptr;
  auto found = memory.free_regions.find(num_bytes);
  if (found != memory.free_regions.end()) {
    region = found->second;
    memory.free_regions.erase(found);
  } else {
    Check(cudaMalloc(&region, num_bytes), "allocating the symmetric memory");
  }
  Check(cudaMemset(region, 0, num_bytes), "clearing the symmetric memory");
  return region;
}

// Reads a number of SMs from the environment: how much of the GPU the operations may take.
int NumSms(int device) {
  int all = 0;
  Check(cudaDeviceGetAttribute(&all, cudaDevAttrMultiProcessorCount, device), "counting the SMs");
  const char* text = std::getenv("JAX_NIXLEP_NUM_SMS");
  if (!text || !*text) return all;
  const int wanted = std::atoi(text);
  if (wanted < 1) throw EpError(std::string("endpoint: JAX_NIXLEP_NUM_SMS must be positive; got ") + text);
  return std::min(wanted, all);
}

bool PointersAllowed() {
  const char* text = std::getenv("JAX_NIXLEP_P2P");
  return !text || std::string(text) != "0";
}

}  // namespace

CudaEndpoint::CudaEndpoint(const EndpointOptions& options, int device)
    : options_(options), device_(device), layout_{options.capacity}, geometry_(layout_) {
  if (capacity().max_ranks > kMaxRanks) {
    throw EpError("endpoint: max_ranks must be at most " + std::to_string(kMaxRanks) + " on a GPU; got " +
                  std::to_string(capacity().max_ranks));
  }
  OnDevice current(device_);
  if (getrandom(&nonce_, sizeof(nonce_), 0) != sizeof(nonce_)) throw EpError("endpoint: getrandom failed");
  nonce_ |= 1;
  num_sms_ = NumSms(device_);
  Check(Preload(), "loading the kernels");
  Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
  Check(cudaMalloc(&scratch_, ScratchBytes(geometry_)), "allocating the routing plan");
  peers_.resize(size_t(capacity().max_ranks));

  std::lock_guard lock(memory_mutex);
  DeviceMemory& memory = Memories()[device_];
  if (memory.in_use) {
    throw EpError("endpoint: GPU " + std::to_string(device_) +
                  " must belong to one group of this process; got a second; shut the first one down");
  }
  if (!memory.state) {
    Check(cudaMalloc(&memory.state, sizeof(DeviceState)), "allocating the state");
    Check(cudaHostAlloc(&memory.report, sizeof(FailureReport), cudaHostAllocMapped), "allocating the failure report");
  }
  region_ = TakeRegion(memory, num_bytes());
  state_ = memory.state;
  report_ = memory.report;
  std::memset(report_, 0, sizeof(*report_));
  Check(cudaMemset(state_, 0, sizeof(DeviceState)), "clearing the state");
  Check(cudaDeviceSynchronize(), "clearing the symmetric memory");
  memory.in_use = true;
}

CudaEndpoint::~CudaEndpoint() {
  try {
    Close();
  } catch (const std::exception&) {  // the device is gone; there is nobody left to tell
  }
}

std::string CudaEndpoint::OpenNixl(const std::string& library, const std::string& name) {
  std::lock_guard lock(mutex_);
  OnDevice current(device_);
  if (!nixl_) {
    auto agent = std::make_unique<NixlAgent>(library, name, device_);
    agent->Register(region_, num_bytes());
    nixl_ = std::move(agent);
  }
  // Peers name the memory by its device too.
  std::string metadata(sizeof(int32_t), '\0');
  const int32_t device = device_;
  std::memcpy(metadata.data(), &device, sizeof(device));
  return metadata + nixl_->Metadata();
}

void CudaEndpoint::ConnectNixl(int peer, const std::string& metadata, uint64_t remote_base) {
  std::lock_guard lock(mutex_);
  OnDevice current(device_);
  int32_t device = 0;
  if (metadata.size() <= sizeof(device)) throw EpError("endpoint: metadata must come from a peer's open_nixl");
  std::memcpy(&device, metadata.data(), sizeof(device));
  Peer& p = peers_.at(size_t(peer));
  p.agent = nixl_->Connect(metadata.substr(sizeof(device)));
  p.device = device;
  p.remote_base = remote_base;
}

void CudaEndpoint::DropPeer(int peer) {
  std::lock_guard lock(mutex_);
  OnDevice current(device_);
  Peer& p = peers_.at(size_t(peer));
  if (p.agent.empty()) return;
  // The views hold the connection: they go first, and Activate makes them anew.
  Check(cudaDeviceSynchronize(), "finishing before a peer is dropped");
  ReleaseViews();
  nixl_->Disconnect(p.agent);
  p = {};
}

void CudaEndpoint::ReleaseViews() {
  for (void** view : {&remote_view_, &local_view_}) {
    if (*view) nixl_->ReleaseView(*view);
    *view = nullptr;
  }
}

void CudaEndpoint::Activate(uint16_t epoch, std::span<const int> members) {
  std::lock_guard lock(mutex_);
  OnDevice current(device_);
  for (Peer& peer : peers_) peer.member = false;
  for (int r : members) {
    Peer& peer = peers_.at(size_t(r));
    if (r != rank() && peer.agent.empty()) {
      throw EpError("endpoint: rank " + std::to_string(r) + " is to be a member but is not connected");
    }
    peer.member = true;
  }
  Check(cudaDeviceSynchronize(), "finishing before the membership changes");

  const int R = capacity().max_ranks;
  std::vector<std::byte*> pointers(size_t(R), nullptr);
  if (nixl_) {
    ReleaseViews();
    std::vector<NixlAgent::RemoteMemory> rows;
    std::vector<uint32_t> wanted;
    for (int r = 0; r < R; ++r) {
      const Peer& peer = peers_[size_t(r)];
      const bool there = peer.member && r != rank();
      rows.push_back(there ? NixlAgent::RemoteMemory{peer.remote_base, peer.device, peer.agent}
                           : NixlAgent::RemoteMemory{});
      wanted.push_back(there && PointersAllowed());
    }
    const bool alone = std::none_of(rows.begin(), rows.end(), [](auto& row) { return !row.agent.empty(); });
    if (!alone) {
      local_view_ = nixl_->LocalView(region_, num_bytes());
      remote_view_ = nixl_->RemoteView(rows, num_bytes());
      uint32_t* device_wanted = nullptr;
      std::byte** device_pointers = nullptr;
      Check(cudaMalloc(&device_wanted, wanted.size() * sizeof(uint32_t)), "allocating");
      Check(cudaMalloc(&device_pointers, pointers.size() * sizeof(std::byte*)), "allocating");
      Check(cudaMemcpy(device_wanted, wanted.data(), wanted.size() * sizeof(uint32_t), cudaMemcpyHostToDevice), "copying");
      Check(FindPointers(remote_view_, R, device_wanted, device_pointers, stream_), "looking for pointers to the peers");
      Check(cudaStreamSynchronize(stream_), "looking for pointers to the peers");
      Check(cudaMemcpy(pointers.data(), device_pointers, pointers.size() * sizeof(std::byte*), cudaMemcpyDeviceToHost),
            "copying");
      cudaFree(device_wanted), cudaFree(device_pointers);
    }
  }

  auto state = std::make_unique<DeviceState>();
  Check(cudaMemcpy(state.get(), state_, sizeof(DeviceState), cudaMemcpyDeviceToHost), "reading the state");
  const DeviceState before = *state;
  std::memset(static_cast<void*>(state.get()), 0, sizeof(DeviceState));
  state->region = region_;
  state->scratch = scratch_;
  state->report = report_;
  state->rank = rank();
  state->active = 1;
  state->mask_late_peers = options_.mask_late_peers;
  state->timeout_ns = uint64_t(options_.timeout_s * 1e9);
  state->geometry = geometry_;
  state->started = state->current = uint64_t(epoch) << kEpochShift;
  state->local_view = local_view_;
  state->remote_view = remote_view_;
  state->operations = before.operations;
  state->dropped_rows = before.dropped_rows;
  state->invalid_ids = before.invalid_ids;
  for (int r = 0; r < R; ++r) {
    Peer& peer = peers_[size_t(r)];
    peer.pointer = r == rank() ? region_ : pointers[size_t(r)];
    state->peers[r].pointer = peer.pointer;
    state->peers[r].member = peer.member;
    state->num_put_peers += peer.member && !peer.pointer;
    state->counters[r] = before.counters[r];
  }
  std::memset(report_, 0, sizeof(*report_));
  // Counters of the coming epoch start at zero; late adders of an earlier one use other slots.
  for (int bank = 0; bank < kBanks; ++bank) {
    const size_t offset = layout_.signal(bank, 0) + offsetof(SignalCell, arrivals) + epoch % kEpochSlots * sizeof(uint64_t);
    Check(cudaMemset2D(region_ + offset, kAlign, 0, sizeof(uint64_t), size_t(R)), "clearing the counters");
  }
  Check(cudaMemset2D(region_ + layout_.notice(0), kAlign, 0, sizeof(NoticeCell), size_t(R)), "clearing the notices");
  Check(cudaMemcpy(state_, state.get(), sizeof(DeviceState), cudaMemcpyHostToDevice), "writing the state");
  Check(cudaDeviceSynchronize(), "activating");
  epoch_ = epoch;
  active_ = true;
}

void CudaEndpoint::Close() {
  std::lock_guard lock(mutex_);
  if (closed_) return;
  closed_ = true;
  OnDevice current(device_);
  const uint32_t one = 1, zero = 0;
  if (active_) {
    // Ends a kernel that waits; then says goodbye, unless the peers know worse.
    Check(cudaMemcpyAsync(&state_->closing, &one, sizeof(one), cudaMemcpyHostToDevice, stream_), "closing");
    if (!report_->code) Check(Notify(state_, Notice::kLeft, stream_), "telling the peers");
    Check(cudaStreamSynchronize(stream_), "closing");
    Check(cudaDeviceSynchronize(), "closing");
    Check(cudaMemcpy(&state_->active, &zero, sizeof(zero), cudaMemcpyHostToDevice), "closing");
  }
  active_ = false;
  if (nixl_) ReleaseViews();
  nixl_.reset();
  cudaFree(scratch_);
  cudaStreamDestroy(stream_);
  std::lock_guard memory_lock(memory_mutex);
  DeviceMemory& memory = Memories()[device_];
  memory.free_regions.emplace(num_bytes(), region_);
  memory.in_use = false;
}

template <typename T>
T CudaEndpoint::Read(const T& field) const {
  std::lock_guard lock(mutex_);
  T value{};
  if (closed_) return value;
  OnDevice current(device_);
  Check(cudaMemcpyAsync(&value, &field, sizeof(T), cudaMemcpyDeviceToHost, stream_), "reading the state");
  Check(cudaStreamSynchronize(stream_), "reading the state");
  return value;
}

PeerHealth CudaEndpoint::Health(int peer) const {
  const Peer& p = peers_.at(size_t(peer));
  const PeerCounters counters = Read(state_->counters[peer]);
  const bool masked = Read(state_->peers[peer].masked) != 0;
  const char* path = peer == rank() ? "self" : !p.member ? "none" : p.pointer ? "pointer" : "put";
  return {.bytes_out = counters.bytes_out,
          .bytes_in = counters.bytes_in,
          .wait_us = counters.wait_ns / 1000,
          .timeouts = counters.timeouts,
          .member = p.member,
          .masked = masked,
          .path = path};
}

uint64_t CudaEndpoint::num_operations() const { return Read(state_->operations); }
uint64_t CudaEndpoint::dropped_rows() const { return Read(state_->dropped_rows); }
uint64_t CudaEndpoint::invalid_ids() const { return Read(state_->invalid_ids); }

std::string CudaEndpoint::Failure() const {
  const auto code = cuda::Failure(reinterpret_cast<volatile const uint32_t&>(report_->code));
  if (code == cuda::Failure::kNone) return "";
  const std::string what = OpTag::Name(report_->tag) + " (operation " +
                           std::to_string(report_->stamp & (kTimedOutBit - 1)) + " of epoch " +
                           std::to_string(report_->stamp >> kEpochShift) + "): ";
  const std::string who = "rank " + std::to_string(report_->peer);
  switch (code) {
    case cuda::Failure::kTimedOut:
      return what + who + " did not arrive within " + std::to_string(options_.timeout_s) +
             " s; check that rank's output, or raise timeout_s if it is only slow";
    case cuda::Failure::kOtherOp:
      return what + who + " runs " + OpTag::Name(report_->other_tag) +
             " at the same place; every member must run the same operations in the same order: run the same program, "
             "and pass after= between operations that do not depend on each other";
    case cuda::Failure::kPeerAhead:
      return what + who + " went on without this rank, which was too late";
    case cuda::Failure::kPeerLeft:
      return what + who + " has left the group";
    case cuda::Failure::kPeerFailed:
      return what + who + " failed; see its error";
    case cuda::Failure::kBadCount:
      return what + who + " sent a bad count";
    case cuda::Failure::kBadHandle:
      return what + "handle must be the one dispatch returned; got rows outside it; pass received.handle unchanged";
    case cuda::Failure::kOverwritten:
      return what + who + " went on while its data was read";
    default:
      return what + who + " did not finish an earlier operation; finish each started operation before the second next";
  }
}

Launch CudaEndpoint::MakeLaunch(uint64_t tag, const RowFormat& format, int num_tokens, cudaStream_t stream) const {
  const std::string name = OpTag::Name(tag);
  if (!active_) throw EpError(name + ": the group was shut down; call initialize first");
  if (std::string failure = Failure(); !failure.empty()) {
    throw EpError(name + ": the group failed earlier: " + failure + "; shut down and initialize again");
  }
  if (num_tokens > capacity().max_tokens) {
    throw EpError(name + ": tokens must be at most max_tokens_per_rank = " + std::to_string(capacity().max_tokens) +
                  "; got " + std::to_string(num_tokens));
  }
  Launch launch;
  launch.state = state_;
  launch.geometry = geometry_;
  launch.format = format;
  launch.tag = tag;
  launch.num_sms = num_sms_;
  launch.stream = stream;
  return launch;
}

}  // namespace jax_nixlep::cuda
