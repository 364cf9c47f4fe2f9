#include "cuda/endpoint.h"

#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <tuple>
#include <utility>

#include "cuda/failures.h"
#include "cuda/host.h"

namespace jax_nixlep::cuda {

// Host memory that the GPU can reach: copies to and from it go straight, and kernels may use it.
struct HostBlock {
  FailureReport report;
  DeviceState to_write;
  PeerEntry peer;
  PeerCounters counters;
  uint64_t word, given_up;
  uint32_t wanted[2 * kMaxRanks];
  std::byte* pointers[2 * kMaxRanks];
};

namespace {

void Check(cudaError_t status, const char* what) { CheckCuda("endpoint", status, what); }

// Memory that outlives endpoints. The control block is found by captured graphs, a region by peers that are slow to
// leave; so neither is freed, and a later endpoint takes them over.
struct DeviceMemory {
  Control* control = nullptr;
  HostBlock* host = nullptr;
  std::multimap<size_t, std::byte*> free_regions;
  // Of the endpoint that has it; 0: none.
  uint64_t nonce = 0;
  std::byte* region = nullptr;
  size_t region_bytes = 0;  // allocated: at least what the endpoint asked for
};

std::mutex memory_mutex;
std::map<int, DeviceMemory>& Memories() {
  static auto* memories = new std::map<int, DeviceMemory>;
  return *memories;
}

void TakeRegion(DeviceMemory& memory, size_t num_bytes) {
  auto found = memory.free_regions.lower_bound(num_bytes);
  if (found != memory.free_regions.end()) {  // it stays as it is: a slow peer of the earlier group may still read it
    std::tie(memory.region_bytes, memory.region) = *found;
    memory.free_regions.erase(found);
    return;
  }
  std::byte* region = nullptr;
  Check(cudaMalloc(&region, num_bytes), "allocating the symmetric memory");
  Check(cudaMemset(region, 0, num_bytes), "clearing the symmetric memory");
  memory.region_bytes = num_bytes, memory.region = region;
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

constexpr std::chrono::milliseconds kWatch{20};  // between two looks at whether the peers live

}  // namespace

CudaEndpoint::CudaEndpoint(const EndpointOptions& options, int device)
    : options_(options), device_(device), layout_{options.capacity, /*has_picks=*/true}, geometry_(layout_) {
  if (capacity().max_ranks > kMaxRanks) {
    throw EpError("endpoint: max_ranks must be at most " + std::to_string(kMaxRanks) + " on a GPU; got " +
                  std::to_string(capacity().max_ranks));
  }
  OnDevice current(device_);
  std::lock_guard lock(memory_mutex);
  DeviceMemory& memory = Memories()[device_];
  if (memory.nonce) {  // before anything is allocated
    throw EpError("endpoint: GPU " + std::to_string(device_) +
                  " must belong to one group of this process; got a second; shut the first one down");
  }
  if (getrandom(&nonce_, sizeof(nonce_), 0) != sizeof(nonce_)) throw EpError("endpoint: getrandom failed");
  nonce_ |= 1;
  page_ = SharedMemory::Create(sizeof(nonce_));
  std::memcpy(page_.data(), &nonce_, sizeof(nonce_));
  num_sms_ = NumSms(device_);
  Check(Preload(), "loading the kernels");
  for (cudaStream_t* stream : {&stream_, &background_}) {
    Check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "creating a stream");
  }
  Check(cudaMalloc(&scratch_, ScratchBytes(geometry_)), "allocating the routing plan");
  const auto num_ranks = size_t(capacity().max_ranks);
  links_.resize(num_ranks), pages_.resize(num_ranks), members_.resize(num_ranks);

  if (!memory.control) {
    Check(cudaMalloc(&memory.control, sizeof(Control)), "allocating the control block");
    Check(cudaHostAlloc(&memory.host, sizeof(HostBlock), cudaHostAllocMapped), "allocating host memory");
  }
  TakeRegion(memory, num_bytes());
  region_ = memory.region;
  control_ = memory.control;
  host_ = memory.host;
  std::memset(static_cast<void*>(host_), 0, sizeof(*host_));
  Check(cudaMemset(control_, 0, sizeof(Control)), "clearing the control block");
  Check(cudaDeviceSynchronize(), "clearing the symmetric memory");
  memory.nonce = nonce_;
}

CudaEndpoint::~CudaEndpoint() {
  try {
    Close();
  } catch (const std::exception&) {  // the device is gone; there is nobody left to tell
  }
}

bool CudaEndpoint::MapPeer(int peer, int pid, int fd, uint64_t nonce) {
  try {
    auto page = std::make_unique<SharedMemory>(SharedMemory::Open(pid, fd, sizeof(nonce)));
    if (std::memcmp(page->data(), &nonce, sizeof(nonce)) != 0) return false;
    std::lock_guard lock(mutex_);
    pages_.at(size_t(peer)) = std::move(page);
    if (!closed_ && !watch_.joinable()) watch_ = std::jthread([this](std::stop_token stop) { Watch(stop); });
    std::lock_guard memory_lock(memory_mutex);
    for (const auto& [device, memory] : Memories()) {
      if (pid != getpid() || memory.nonce != nonce || !ReachesDevice(device)) continue;
      links_[size_t(peer)] = std::shared_ptr<Link>(new Link{.nixl = nullptr,
                                                            .agent = "",
                                                            .nonce = nonce,
                                                            .base = reinterpret_cast<uint64_t>(memory.region),
                                                            .control = reinterpret_cast<uint64_t>(memory.control),
                                                            .device = device});
      return true;
    }
  } catch (const std::runtime_error&) {  // another machine or container: its ids mean something else here
  }
  return false;
}

bool CudaEndpoint::ReachesDevice(int device) const {
  OnDevice current(device_);
  int can = 0;
  cudaError_t status = cudaDeviceCanAccessPeer(&can, device_, device);
  if (status == cudaSuccess && can) status = cudaDeviceEnablePeerAccess(device, 0);
  cudaGetLastError();  // or the next check finds it
  return can && (status == cudaSuccess || status == cudaErrorPeerAccessAlreadyEnabled);
}

bool CudaEndpoint::PeerAlive(int peer) const {
  std::lock_guard lock(mutex_);
  const auto& page = pages_.at(size_t(peer));
  return !page || page->OwnerAlive();
}

void CudaEndpoint::Watch(std::stop_token stop) {
  while (!stop.stop_requested()) {
    std::this_thread::sleep_for(kWatch);
    std::lock_guard lock(mutex_);
    for (size_t r = 0; r < pages_.size(); ++r) {
      const bool dead = members_[r] && pages_[r] && !pages_[r]->OwnerAlive();
      std::atomic_ref(host_->report.dead[r]).store(dead, std::memory_order_relaxed);
    }
  }
}

bool CudaEndpoint::ShowsDeath(int peer) const {
  std::lock_guard lock(mutex_);
  return pages_.at(size_t(peer)) != nullptr;
}

// What peers need beside NIXL's metadata and the base of the region.
struct Place {
  uint64_t control;
  int32_t device;
};

std::string CudaEndpoint::OpenNixl(const std::string& library, const std::string& name) {
  std::lock_guard connect(connect_);
  OnDevice current(device_);
  if (stuck_) throw EpError(kStuck);
  if (closed_) throw EpError("endpoint: it is closed; it cannot connect");
  if (!nixl_) {
    auto agent = std::make_unique<NixlAgent>(library, name, device_);
    const auto control = reinterpret_cast<std::byte*>(control_);
    agent->Register(region_, num_bytes());
    agent->Register(control, sizeof(Control));
    const NixlAgent::ViewRow own[] = {{reinterpret_cast<uint64_t>(region_), num_bytes(), device_},
                                      {reinterpret_cast<uint64_t>(control_), sizeof(Control), device_}};
    local_view_ = agent->LocalView(own);
    nixl_ = std::move(agent);
  }
  const Place place{reinterpret_cast<uint64_t>(control_), device_};
  return std::string(reinterpret_cast<const char*>(&place), sizeof(place)) + nixl_->Metadata();
}

void CudaEndpoint::ConnectNixl(int peer, const std::string& metadata, uint64_t remote_base, uint64_t nonce) {
  std::lock_guard connect(connect_);
  OnDevice current(device_);
  if (stuck_) throw EpError(kStuck);
  if (closed_) throw EpError("endpoint: it is closed; it cannot connect");
  Place place;
  if (metadata.size() <= sizeof(place)) throw EpError("endpoint: metadata must come from a peer's open_nixl");
  std::memcpy(&place, metadata.data(), sizeof(place));
  std::shared_ptr<Link>& link = links_.at(size_t(peer));
  std::vector<std::shared_ptr<void>> over;
  {
    std::lock_guard lock(mutex_);
    over.swap(retired_);
    over.push_back(std::exchange(link, nullptr));
    over.push_back(std::exchange(next_views_, nullptr));
    // NIXL refuses to know one agent twice: what kernels may still use is used on.
    if (views_ && views_->links[size_t(peer)] && views_->links[size_t(peer)]->nonce == nonce) {
      link = views_->links[size_t(peer)];
      return;
    }
  }
  over.clear();
  std::shared_ptr<Link> made(new Link{.nixl = nixl_.get(),
                                      .agent = nixl_->Connect(metadata.substr(sizeof(place))),
                                      .nonce = nonce,
                                      .base = remote_base,
                                      .control = place.control,
                                      .device = place.device});
  std::lock_guard lock(mutex_);
  link = std::move(made);
}

void CudaEndpoint::DropPeer(int peer) {
  std::lock_guard lock(mutex_);
  retired_.push_back(std::exchange(links_.at(size_t(peer)), nullptr));
  pages_[size_t(peer)].reset();
}

CudaEndpoint::Links CudaEndpoint::LinksOf(std::span<const int> members) const {
  Links links(links_.size());
  for (int r : members) {
    if (r == rank()) continue;
    links[size_t(r)] = links_.at(size_t(r));
    if (links[size_t(r)]) continue;
    throw EpError("endpoint: rank " + std::to_string(r) + " is to be a member but is not connected");
  }
  return links;
}

std::shared_ptr<CudaEndpoint::Views> CudaEndpoint::MakeViews(Links links) {
  const int R = capacity().max_ranks;
  std::vector<NixlAgent::ViewRow> rows(size_t(2 * R));
  std::fill_n(host_->wanted, 2 * R, 0);
  auto views = std::make_shared<Views>();
  views->pointers.resize(rows.size());
  bool any = false;
  for (int r = 0; r < R; ++r) {
    const Link* link = links[size_t(r)].get();
    if (!link) continue;
    const int region = RegionRow(r), control = ControlRow(r, R);
    if (!link->nixl) {
      views->pointers[size_t(region)] = reinterpret_cast<std::byte*>(link->base);
      views->pointers[size_t(control)] = reinterpret_cast<std::byte*>(link->control);
      continue;
    }
    any = true;
    rows[size_t(region)] = {link->base, num_bytes(), link->device, link->agent};
    rows[size_t(control)] = {link->control, sizeof(Control), link->device, link->agent};
    host_->wanted[region] = host_->wanted[control] = PointersAllowed();
  }
  views->links = std::move(links);
  views->nixl = nixl_.get();
  if (!any) return views;
  const std::optional<void*> remote = RemoteViewInTime(*nixl_, std::move(rows), device_);
  if (!remote) {
    stuck_ = true;
    new Links(std::move(views->links));  // stays: ending a connection would wait, too
    throw EpError(kStuck);
  }
  views->remote = *remote;
  Check(FindPointers(views->remote, 2 * R, host_->wanted, host_->pointers, background_),
        "looking for pointers to the peers");
  Check(cudaStreamSynchronize(background_), "looking for pointers to the peers");
  for (int r = 0; r < R; ++r) {
    std::byte *region = host_->pointers[RegionRow(r)], *control = host_->pointers[ControlRow(r, R)];
    if (!region || !control) continue;  // both or none
    views->pointers[size_t(RegionRow(r))] = region;
    views->pointers[size_t(ControlRow(r, R))] = control;
  }
  return views;
}

void CudaEndpoint::Prepare(std::span<const int> members) {
  std::lock_guard connect(connect_);
  OnDevice current(device_);
  std::vector<std::shared_ptr<void>> over;
  Links wanted;
  bool there = false;
  {
    std::lock_guard lock(mutex_);
    if (closed_ || stuck_) return;
    over.swap(retired_);
    const bool connected = std::all_of(members.begin(), members.end(),
                                       [&](int r) { return r == rank() || links_.at(size_t(r)) != nullptr; });
    wanted = connected ? LinksOf(members) : Links(links_.size());
    there = next_views_ && next_views_->links == wanted;
    if (!there) over.push_back(std::exchange(next_views_, nullptr));
    there = there || wanted == Links(links_.size()) || (views_ && views_->links == wanted);
  }
  over.clear();
  if (there) return;
  auto made = MakeViews(std::move(wanted));
  std::lock_guard lock(mutex_);
  next_views_ = std::move(made);
}

void CudaEndpoint::Activate(uint16_t epoch, std::span<const int> members) {
  OnDevice current(device_);
  Check(cudaDeviceSynchronize(), "finishing before the membership changes");
  const int R = capacity().max_ranks;
  Links wanted;  // by the members
  // Views of more peers than the members will do: kernels use the rows of members only.
  auto serves = [&](const std::shared_ptr<Views>& views) {
    for (size_t r = 0; r < wanted.size(); ++r) {
      if (wanted[r] && !(views && views->links[r] == wanted[r])) return false;
    }
    return true;
  };
  bool ready = false;
  {
    std::lock_guard lock(mutex_);
    wanted = LinksOf(members);
    if (closed_) throw EpError("endpoint: it is closed; it cannot begin an epoch");
    ready = serves(views_) || serves(next_views_);
  }
  if (!ready) Prepare(members);
  const bool alone = wanted == Links(wanted.size());

  std::lock_guard lock(mutex_);
  if (closed_) throw EpError("endpoint: it is closed; it cannot begin an epoch");
  // Who is out, and perhaps does not know it, may still be reading what this rank is about to overwrite.
  host_->given_up = nonce_ + (uint64_t(epoch_) << kEpochShift | 1);
  for (int r = 0; r < R; ++r) {
    if (!members_[size_t(r)] || r == rank() || std::find(members.begin(), members.end(), r) != members.end()) continue;
    auto* control = reinterpret_cast<Control*>(views_->pointers[size_t(ControlRow(r, R))]);
    if (!control) continue;  // by put it reads its own memory only, and finds that nobody answers
    Check(cudaMemcpyAsync(&control->notices[rank()].given_up, &host_->given_up, sizeof(host_->given_up),
                          cudaMemcpyHostToDevice, stream_),
          "telling a rank that it is out");
  }
  if (alone) {
    retired_.push_back(std::exchange(views_, nullptr));
  } else if ((next_views_ && next_views_->links == wanted) || (serves(next_views_) && !serves(views_))) {
    retired_.push_back(std::exchange(views_, std::exchange(next_views_, nullptr)));
  } else if (!serves(views_)) {
    throw EpError("endpoint: the members were connected anew while an epoch began, or NIXL never connected one");
  }
  DeviceState& state = host_->to_write;
  std::memset(static_cast<void*>(&state), 0, sizeof(state));
  state.region = region_;
  state.scratch = scratch_;
  state.report = &host_->report;
  state.rank = rank();
  state.active = 1;
  state.mask_late_peers = options_.mask_late_peers;
  state.timeout_ns = uint64_t(options_.timeout_s * 1e9);
  state.geometry = geometry_;
  state.started = state.current = state.finished = uint64_t(epoch) << kEpochShift;
  state.local_view = local_view_;
  state.remote_view = views_ ? views_->remote : nullptr;
  members_.assign(members_.size(), false);
  for (int r : members) {
    members_[size_t(r)] = true;
    PeerEntry& peer = state.peers[r];
    peer.pointer = r == rank() ? region_ : views_->pointers[size_t(RegionRow(r))];
    peer.control = r == rank() ? control_ : reinterpret_cast<Control*>(views_->pointers[size_t(ControlRow(r, R))]);
    peer.member = 1;
    peer.nonce = r == rank() ? nonce_ : views_->links[size_t(r)]->nonce;
    state.num_put_peers += !peer.pointer;
  }
  host_->report.code = uint32_t(cuda::Failure::kNone);
  host_->report.gave_up = 0;
  std::atomic_ref(host_->report.stop).store(uint32_t(Stop::kNo));
  // Up to what is counted as long as the endpoint lives.
  Check(cudaMemcpyAsync(&control_->state, &state, offsetof(DeviceState, operations), cudaMemcpyHostToDevice, stream_),
        "writing the state");
  Check(cudaStreamSynchronize(stream_), "writing the state");
  // Counters of coming epochs start at zero. Not those of this one, which peers may have begun before this rank: they
  // were cleared an epoch ago. Alone, nobody adds.
  for (int bank = 0; bank < kBanks; ++bank) {
    for (int ahead = alone ? 0 : 1; ahead < kEpochSlots; ++ahead) {
      uint64_t* counters = &control_->signals[bank][0].arrivals[(epoch + ahead) % kEpochSlots];
      Check(cudaMemset2DAsync(counters, sizeof(SignalCell), 0, sizeof(uint64_t), size_t(R), background_),
            "clearing the counters");
    }
  }
  if (alone) Check(cudaStreamSynchronize(background_), "clearing the counters");  // else the next boundary does
  epoch_ = epoch;
  active_ = true;
}

void CudaEndpoint::Interrupt() {
  if (closed_) return;
  uint32_t expected = uint32_t(Stop::kNo);
  std::atomic_ref(host_->report.stop).compare_exchange_strong(expected, uint32_t(Stop::kInterrupt));
}

void CudaEndpoint::Drain() {
  OnDevice current(device_);
  Check(cudaDeviceSynchronize(), "waiting for the operations to end");
  std::lock_guard lock(mutex_);
  if (!views_ || !next_views_ || closed_) return;
  for (size_t r = 0; r < members_.size(); ++r) {
    const auto& link = int(r) == rank() || !members_[r] ? nullptr : views_->links[r];
    if (next_views_->links[r] != link) return;
  }
  // The same members and connections, without those that are out: nothing keeps them any more.
  host_->word = reinterpret_cast<uint64_t>(next_views_->remote);
  void** field = &control_->state.remote_view;
  Check(cudaMemcpyAsync(field, &host_->word, sizeof(*field), cudaMemcpyHostToDevice, stream_), "changing the view");
  Check(cudaStreamSynchronize(stream_), "changing the view");
  retired_.push_back(std::exchange(views_, std::exchange(next_views_, nullptr)));
}

void CudaEndpoint::Close() {
  {
    std::lock_guard lock(mutex_);
    if (closed_) return;
    closed_ = true;
    std::atomic_ref(host_->report.stop).store(uint32_t(Stop::kClose));  // ends kernels that wait
  }
  if (watch_.joinable()) watch_.request_stop(), watch_.join();
  std::lock_guard connect(connect_);
  std::lock_guard lock(mutex_);
  OnDevice current(device_);
  const uint32_t zero = 0;
  if (active_) {
    // Says goodbye, unless the peers know worse.
    if (!host_->report.code) Check(Notify(control_, geometry_, Notice::kLeft, stream_), "telling the peers");
    Check(cudaDeviceSynchronize(), "closing");
    Check(cudaMemcpy(&control_->state.active, &zero, sizeof(zero), cudaMemcpyHostToDevice), "closing");
  }
  active_ = false;
  if (!stuck_) {
    views_.reset(), next_views_.reset();
    links_.assign(links_.size(), nullptr);
    retired_.clear();
    if (local_view_) nixl_->ReleaseView(local_view_);
    nixl_.reset();
  } else {  // what NIXL holds goes with the process
    for (auto* views : {&views_, &next_views_}) new std::shared_ptr<Views>(std::move(*views));
    new Links(std::move(links_));
    new std::vector<std::shared_ptr<void>>(std::move(retired_));
    static_cast<void>(nixl_.release());
  }
  cudaFree(scratch_);
  cudaStreamDestroy(stream_), cudaStreamDestroy(background_);
  std::lock_guard memory_lock(memory_mutex);
  DeviceMemory& memory = Memories()[device_];
  memory.free_regions.emplace(memory.region_bytes, region_);
  memory.nonce = 0;
}

template <typename T>
T CudaEndpoint::Read(const T& field) const {
  static_assert(sizeof(T) == sizeof(host_->word));
  std::lock_guard lock(mutex_);
  if (closed_) return T{};
  OnDevice current(device_);
  Check(cudaMemcpyAsync(&host_->word, &field, sizeof(T), cudaMemcpyDeviceToHost, stream_), "reading the state");
  Check(cudaStreamSynchronize(stream_), "reading the state");
  return T(host_->word);
}

const char* CudaEndpoint::PathTo(int peer) const {
  const auto r = size_t(peer);
  if (peer == rank()) return "self";
  for (const auto& views : {views_, next_views_}) {
    if (views && views->links[r] && (views->links[r] == links_[r] || (members_[r] && views == views_))) {
      return views->pointers[size_t(RegionRow(peer))] ? "pointer" : "put";
    }
  }
  return links_[r] ? "put" : "none";
}

PeerHealth CudaEndpoint::Health(int peer) const {
  std::lock_guard lock(mutex_);
  if (closed_) return {};
  OnDevice current(device_);
  const DeviceState& state = control_->state;
  auto copy = [&](auto& to, const auto& from) {
    Check(cudaMemcpyAsync(&to, &from, sizeof(to), cudaMemcpyDeviceToHost, stream_), "reading the state");
  };
  copy(host_->peer, state.peers[peer]);
  copy(host_->counters, state.counters[peer]);
  Check(cudaStreamSynchronize(stream_), "reading the state");
  const PeerCounters& counters = host_->counters;
  return {.bytes_out = counters.bytes_out,
          .bytes_in = counters.bytes_in,
          .wait_us = counters.wait_ns / 1000,
          .timeouts = counters.timeouts,
          .member = members_.at(size_t(peer)),
          .masked = host_->peer.masked != 0,
          .path = PathTo(peer)};
}

uint64_t CudaEndpoint::num_operations() const { return Read(control_->state.operations); }
uint64_t CudaEndpoint::dropped_rows() const { return Read(control_->state.dropped_rows); }
uint64_t CudaEndpoint::invalid_ids() const { return Read(control_->state.invalid_ids); }

bool CudaEndpoint::GaveUp() const { return !closed_ && std::atomic_ref(host_->report.gave_up).load() != 0; }

std::string CudaEndpoint::Failure() const {
  if (closed_) return "";
  FailureReport& report = host_->report;
  if (std::atomic_ref(report.code).load() != uint32_t(cuda::Failure::kNone))
    return Describe(report, options_.timeout_s);
  return std::atomic_ref(report.stop).load() == uint32_t(Stop::kInterrupt) ? "the members changed" : "";
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
