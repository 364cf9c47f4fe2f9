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

// Device memory that outlives endpoints. The control block is found by captured graphs, a region by peers that are slow
// to leave; so neither is freed, and a later endpoint takes them over.
struct DeviceMemory {
  Control* control = nullptr;
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
  if (!memory.control) {
    Check(cudaMalloc(&memory.control, sizeof(Control)), "allocating the control block");
    Check(cudaHostAlloc(&memory.report, sizeof(FailureReport), cudaHostAllocMapped), "allocating the failure report");
  }
  region_ = TakeRegion(memory, num_bytes());
  control_ = memory.control;
  report_ = memory.report;
  std::memset(report_, 0, sizeof(*report_));
  Check(cudaMemset(control_, 0, sizeof(Control)), "clearing the control block");
  Check(cudaDeviceSynchronize(), "clearing the symmetric memory");
  memory.in_use = true;
}

CudaEndpoint::~CudaEndpoint() {
  try {
    Close();
  } catch (const std::exception&) {  // the device is gone; there is nobody left to tell
  }
}

// What peers need beside NIXL's metadata and the base of the region.
struct Place {
  uint64_t control;
  int32_t device;
};

std::string CudaEndpoint::OpenNixl(const std::string& library, const std::string& name) {
  std::lock_guard lock(mutex_);
  OnDevice current(device_);
  if (!nixl_) {
    auto agent = std::make_unique<NixlAgent>(library, name, device_);
    agent->Register(region_, num_bytes());
    agent->Register(reinterpret_cast<std::byte*>(control_), sizeof(Control));
    nixl_ = std::move(agent);
  }
  const Place place{reinterpret_cast<uint64_t>(control_), device_};
  return std::string(reinterpret_cast<const char*>(&place), sizeof(place)) + nixl_->Metadata();
}

void CudaEndpoint::ConnectNixl(int peer, const std::string& metadata, uint64_t remote_base, uint64_t /*nonce*/) {
  std::lock_guard lock(mutex_);
  OnDevice current(device_);
  Place place;
  if (metadata.size() <= sizeof(place)) throw EpError("endpoint: metadata must come from a peer's open_nixl");
  std::memcpy(&place, metadata.data(), sizeof(place));
  Peer& p = peers_.at(size_t(peer));
  p.agent = nixl_->Connect(metadata.substr(sizeof(place)));
  p.device = place.device;
  p.remote_base = remote_base;
  p.remote_control = place.control;
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
  std::vector<std::byte*> pointers(size_t(2 * R), nullptr);  // as the rows of the view
  const bool alone = std::none_of(members.begin(), members.end(), [&](int r) { return r != rank(); });
  if (nixl_) ReleaseViews();
  if (!alone) {
    using Row = NixlAgent::ViewRow;
    const auto control = reinterpret_cast<uint64_t>(control_), region = reinterpret_cast<uint64_t>(region_);
    const Row own[] = {Row{region, num_bytes(), device_}, Row{control, sizeof(Control), device_}};
    std::vector<Row> rows(size_t(2 * R));
    std::vector<uint32_t> wanted(size_t(2 * R), 0);
    for (int r = 0; r < R; ++r) {
      const Peer& peer = peers_[size_t(r)];
      if (!peer.member || r == rank()) continue;
      const size_t region_row = size_t(RegionRow(r)), control_row = size_t(ControlRow(r, R));
      rows[region_row] = {peer.remote_base, num_bytes(), peer.device, peer.agent};
      rows[control_row] = {peer.remote_control, sizeof(Control), peer.device, peer.agent};
      wanted[region_row] = wanted[control_row] = PointersAllowed();
    }
    local_view_ = nixl_->LocalView(own);
    remote_view_ = nixl_->RemoteView(rows);
    uint32_t* device_wanted = nullptr;
    std::byte** device_pointers = nullptr;
    const size_t wanted_bytes = wanted.size() * sizeof(uint32_t), pointer_bytes = pointers.size() * sizeof(std::byte*);
    Check(cudaMalloc(&device_wanted, wanted_bytes), "allocating");
    Check(cudaMalloc(&device_pointers, pointer_bytes), "allocating");
    Check(cudaMemcpy(device_wanted, wanted.data(), wanted_bytes, cudaMemcpyHostToDevice), "copying");
    Check(FindPointers(remote_view_, 2 * R, device_wanted, device_pointers, stream_),
          "looking for pointers to the peers");
    Check(cudaStreamSynchronize(stream_), "looking for pointers to the peers");
    Check(cudaMemcpy(pointers.data(), device_pointers, pointer_bytes, cudaMemcpyDeviceToHost), "copying");
    cudaFree(device_wanted), cudaFree(device_pointers);
  }

  auto state = std::make_unique<DeviceState>();
  Check(cudaMemcpy(state.get(), &control_->state, sizeof(DeviceState), cudaMemcpyDeviceToHost), "reading the state");
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
  state->started = state->current = state->finished = uint64_t(epoch) << kEpochShift;
  state->local_view = local_view_;
  state->remote_view = remote_view_;
  state->operations = before.operations;
  state->dropped_rows = before.dropped_rows;
  state->invalid_ids = before.invalid_ids;
  for (int r = 0; r < R; ++r) {
    Peer& peer = peers_[size_t(r)];
    auto* control = r == rank() ? control_ : reinterpret_cast<Control*>(pointers[size_t(ControlRow(r, R))]);
    peer.pointer = r == rank() ? region_ : control ? pointers[size_t(RegionRow(r))] : nullptr;
    state->peers[r].pointer = peer.pointer;
    state->peers[r].control = control;
    state->peers[r].member = peer.member;
    state->num_put_peers += peer.member && !peer.pointer;
    state->counters[r] = before.counters[r];
  }
  std::memset(report_, 0, sizeof(*report_));
  // Counters of the coming epoch start at zero; late adders of an earlier one use other slots.
  for (int bank = 0; bank < kBanks; ++bank) {
    uint64_t* counters = &control_->signals[bank][0].arrivals[epoch % kEpochSlots];
    Check(cudaMemset2D(counters, sizeof(SignalCell), 0, sizeof(uint64_t), size_t(R)), "clearing the counters");
  }
  Check(cudaMemset(control_->notices, 0, sizeof(control_->notices)), "clearing the notices");
  Check(cudaMemcpy(&control_->state, state.get(), sizeof(DeviceState), cudaMemcpyHostToDevice), "writing the state");
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
    Check(cudaMemcpyAsync(&control_->state.closing, &one, sizeof(one), cudaMemcpyHostToDevice, stream_), "closing");
    if (!report_->code) Check(Notify(control_, geometry_, Notice::kLeft, stream_), "telling the peers");
    Check(cudaStreamSynchronize(stream_), "closing");
    Check(cudaDeviceSynchronize(), "closing");
    Check(cudaMemcpy(&control_->state.active, &zero, sizeof(zero), cudaMemcpyHostToDevice), "closing");
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
  const PeerCounters counters = Read(control_->state.counters[peer]);
  const bool masked = Read(control_->state.peers[peer].masked) != 0;
  const char* path = peer == rank() ? "self" : !p.member ? "none" : p.pointer ? "pointer" : "put";
  return {.bytes_out = counters.bytes_out,
          .bytes_in = counters.bytes_in,
          .wait_us = counters.wait_ns / 1000,
          .timeouts = counters.timeouts,
          .member = p.member,
          .masked = masked,
          .path = path};
}

uint64_t CudaEndpoint::num_operations() const { return Read(control_->state.operations); }
uint64_t CudaEndpoint::dropped_rows() const { return Read(control_->state.dropped_rows); }
uint64_t CudaEndpoint::invalid_ids() const { return Read(control_->state.invalid_ids); }

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
  launch.control = control_;
  launch.region = region_;
  launch.geometry = geometry_;
  launch.format = format;
  launch.tag = tag;
  launch.num_sms = num_sms_;
  launch.stream = stream;
  return launch;
}

}  // namespace jax_nixlep::cuda
