#include "runtime/nixl_agent.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <type_traits>

namespace jax_nixlep {
namespace {

// The part of NIXL's C ABI that is used here (values as of nixl 1.5). Handles are opaque pointers.
enum Status : int { kSuccess = 0, kInProgress = 1 };
enum MemoryType : int { kHostMemory = 0, kGpuMemory = 1 };
enum ThreadSync : int { kStrict = 1 };

struct AgentConfig {
  bool enable_progress_thread;
  bool enable_listen_thread;
  int listen_port;
  int thread_sync;
  unsigned int num_workers;
  uint64_t progress_delay_us;
  uint64_t listen_delay_us;
  bool capture_telemetry;
};

// How long the progress thread sleeps when nothing happens; events wake it earlier.
constexpr uint64_t kProgressDelayUs = 1000;

// Of the UCX backend; what memory views were seen to work with (channels for kernels, no error callbacks).
constexpr std::pair<const char*, const char*> kGpuParams[] = {
    {"ucx_num_device_channels", "4"}, {"ucx_error_handling_mode", "none"}, {"num_workers", "1"}};

void Check(int status, const char* what) {
  if (status != kSuccess)
    throw NixlError(std::string("nixl: ") + what + " failed with status " + std::to_string(status));
}

}  // namespace

struct NixlAgent::Api {
  void* library = nullptr;
  bool (*is_stub)();
  int (*create_configured_agent)(const char*, const AgentConfig*, void**);
  int (*destroy_agent)(void*);
  int (*create_params)(void**);
  int (*destroy_params)(void*);
  int (*params_add)(void*, const char*, const char*);
  int (*create_backend)(void*, const char*, void*, void**);
  int (*destroy_backend)(void*);
  int (*create_opt_args)(void**);
  int (*destroy_opt_args)(void*);
  int (*opt_args_add_backend)(void*, void*);
  int (*create_reg_dlist)(int, void**);
  int (*destroy_reg_dlist)(void*);
  int (*reg_dlist_add_desc)(void*, uintptr_t, size_t, uint64_t, const void*, size_t);
  int (*register_mem)(void*, void*, void*);
  int (*deregister_mem)(void*, void*, void*);
  int (*get_local_md)(void*, void**, size_t*);
  int (*load_remote_md)(void*, const void*, size_t, char**);
  int (*invalidate_remote_md)(void*, const char*);
  int (*agent_make_connection)(void*, const char*, void*);
  int (*create_xfer_dlist)(int, void**);
  int (*destroy_xfer_dlist)(void*);
  int (*xfer_dlist_add_desc)(void*, uintptr_t, size_t, uint64_t);
  int (*create_xfer_req)(void*, int, void*, void*, const char*, void**, void*);
  int (*post_xfer_req)(void*, void*, void*);
  int (*get_xfer_status)(void*, void*);
  int (*release_xfer_req)(void*, void*);
  int (*destroy_xfer_req)(void*);
  int (*create_remote_dlist)(int, void**);
  int (*destroy_remote_dlist)(void*);
  int (*remote_dlist_add_desc)(void*, uintptr_t, size_t, uint64_t, const char*);
  int (*prep_mem_view_local)(void*, void*, void**, void*);
  int (*prep_mem_view_remote)(void*, void*, void**, void*);
  int (*release_mem_view)(void*, void*);
  int (*gen_notif)(void*, const char*, const void*, size_t, void*);
  int (*create_notif_map)(void**);
  int (*destroy_notif_map)(void*);
  int (*get_notifs)(void*, void*, void*);
  int (*notif_map_size)(void*, size_t*);
  int (*notif_map_get_agent_at)(void*, size_t, const char**);
  int (*notif_map_get_notifs_size)(void*, const char*, size_t*);
  int (*notif_map_get_notif)(void*, const char*, size_t, const void**, size_t*);

  explicit Api(const std::string& path) {
    // UCX would otherwise replace the process's handlers for SIGSEGV and friends.
    setenv("UCX_HANDLE_ERRORS", "none", /*overwrite=*/0);
    library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) throw NixlError(std::string("nixl: cannot load ") + path + ": " + dlerror());
    auto find = [&](auto& function, const char* name) {
      std::string symbol = std::string("nixl_capi_") + name;
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, symbol.c_str()));
      if (!function) throw NixlError("nixl: " + path + " has no " + symbol + "; install nixl >= 1.5");
    };
#define FIND(name) find(name, #name)
    FIND(is_stub), FIND(create_configured_agent), FIND(destroy_agent), FIND(create_params), FIND(destroy_params);
    FIND(create_backend), FIND(destroy_backend), FIND(create_opt_args), FIND(destroy_opt_args);
    FIND(opt_args_add_backend), FIND(create_reg_dlist), FIND(destroy_reg_dlist), FIND(reg_dlist_add_desc);
    FIND(register_mem), FIND(deregister_mem), FIND(get_local_md), FIND(load_remote_md), FIND(invalidate_remote_md);
    FIND(agent_make_connection), FIND(create_xfer_dlist), FIND(destroy_xfer_dlist), FIND(xfer_dlist_add_desc);
    FIND(create_xfer_req), FIND(post_xfer_req), FIND(get_xfer_status), FIND(release_xfer_req), FIND(destroy_xfer_req);
    FIND(params_add), FIND(create_remote_dlist), FIND(destroy_remote_dlist), FIND(remote_dlist_add_desc);
    FIND(prep_mem_view_local), FIND(prep_mem_view_remote), FIND(release_mem_view);
    FIND(gen_notif), FIND(create_notif_map), FIND(destroy_notif_map), FIND(get_notifs), FIND(notif_map_size);
    FIND(notif_map_get_agent_at), FIND(notif_map_get_notifs_size), FIND(notif_map_get_notif);
#undef FIND
    if (is_stub()) throw NixlError("nixl: " + path + " is a stub without an implementation; install nixl >= 1.5");
  }
  // The library stays loaded: UCX keeps threads and exit handlers of its own.
};

NixlAgent::NixlAgent(const std::string& library, const std::string& name, int gpu)
    : api_(std::make_unique<Api>(library)), gpu_(gpu) {
  try {
    AgentConfig config{.enable_progress_thread = true,
                       .enable_listen_thread = false,
                       .listen_port = 0,
                       .thread_sync = kStrict,
                       .num_workers = 1,
                       .progress_delay_us = kProgressDelayUs,
                       .listen_delay_us = 0,
                       .capture_telemetry = false};
    Check(api_->create_configured_agent(name.c_str(), &config, &agent_), "creating an agent");
    void* params = nullptr;
    Check(api_->create_params(&params), "create_params");
    if (gpu_ != kHost) {
      for (auto [key, value] : kGpuParams) Check(api_->params_add(params, key, value), "params_add");
    }
    int status = api_->create_backend(agent_, "UCX", params, &backend_);
    api_->destroy_params(params);
    Check(status, "creating the UCX backend");
    Check(api_->create_opt_args(&options_), "create_opt_args");
    Check(api_->opt_args_add_backend(options_, backend_), "opt_args_add_backend");
  } catch (...) {
    Close();
    throw;
  }
}

NixlAgent::~NixlAgent() { Close(); }

void NixlAgent::Close() {
  for (void* list : registered_) {
    api_->deregister_mem(agent_, list, options_);
    api_->destroy_reg_dlist(list);
  }
  if (options_) api_->destroy_opt_args(options_);
  if (backend_) api_->destroy_backend(backend_);
  if (agent_) api_->destroy_agent(agent_);
}

void NixlAgent::Register(std::byte* data, size_t num_bytes) {
  void* list = nullptr;
  Check(api_->create_reg_dlist(gpu_ == kHost ? kHostMemory : kGpuMemory, &list), "create_reg_dlist");
  const auto device = uint64_t(gpu_ == kHost ? 0 : gpu_);
  int status = api_->reg_dlist_add_desc(list, reinterpret_cast<uintptr_t>(data), num_bytes, device, nullptr, 0);
  if (status == kSuccess) status = api_->register_mem(agent_, list, options_);
  if (status != kSuccess) api_->destroy_reg_dlist(list);
  Check(status, "registering the symmetric memory");
  registered_.push_back(list);
}

std::string NixlAgent::Metadata() const {
  void* data = nullptr;
  size_t num_bytes = 0;
  Check(api_->get_local_md(agent_, &data, &num_bytes), "reading the agent's metadata");
  std::string metadata(static_cast<char*>(data), num_bytes);
  std::free(data);
  return metadata;
}

std::string NixlAgent::Connect(const std::string& metadata) {
  char* name = nullptr;
  Check(api_->load_remote_md(agent_, metadata.data(), metadata.size(), &name), "loading a peer's metadata");
  std::string peer(name);
  std::free(name);
  const int status = api_->agent_make_connection(agent_, peer.c_str(), options_);
  if (status != kSuccess) Disconnect(peer);  // NIXL refuses to know one agent twice
  Check(status, "connecting to a peer");
  return peer;
}

void NixlAgent::Disconnect(const std::string& peer) { api_->invalidate_remote_md(agent_, peer.c_str()); }

void NixlAgent::Tell(const std::string& peer, const std::string& message) {
  Check(api_->gen_notif(agent_, peer.c_str(), message.data(), message.size(), options_), "sending a notification");
}

std::vector<std::string> NixlAgent::Told() {
  void* map = nullptr;
  Check(api_->create_notif_map(&map), "create_notif_map");
  std::vector<std::string> messages;
  int status = api_->get_notifs(agent_, map, options_);
  size_t agents = 0;
  if (status == kSuccess) status = api_->notif_map_size(map, &agents);
  for (size_t i = 0; status == kSuccess && i < agents; ++i) {
    const char* agent = nullptr;
    size_t count = 0;
    status = api_->notif_map_get_agent_at(map, i, &agent);
    if (status == kSuccess) status = api_->notif_map_get_notifs_size(map, agent, &count);
    for (size_t j = 0; status == kSuccess && j < count; ++j) {
      const void* data = nullptr;
      size_t num_bytes = 0;
      status = api_->notif_map_get_notif(map, agent, j, &data, &num_bytes);
      if (status == kSuccess) messages.emplace_back(static_cast<const char*>(data), num_bytes);
    }
  }
  api_->destroy_notif_map(map);
  Check(status, "reading notifications");
  return messages;
}

void* NixlAgent::LocalView(std::span<const ViewRow> rows) {
  void *list = nullptr, *view = nullptr;
  Check(api_->create_xfer_dlist(kGpuMemory, &list), "create_xfer_dlist");
  int status = kSuccess;
  for (const ViewRow& row : rows) {
    if (status == kSuccess) status = api_->xfer_dlist_add_desc(list, row.base, row.num_bytes, uint64_t(row.device));
  }
  if (status == kSuccess) status = api_->prep_mem_view_local(agent_, list, &view, options_);
  api_->destroy_xfer_dlist(list);
  Check(status, "preparing the local memory view");
  return view;
}

void* NixlAgent::RemoteView(std::span<const ViewRow> rows) {
  void *list = nullptr, *view = nullptr;
  Check(api_->create_remote_dlist(kGpuMemory, &list), "create_remote_dlist");
  int status = kSuccess;
  for (const ViewRow& row : rows) {
    if (status != kSuccess) break;
    const char* agent = row.agent.empty() ? nullptr : row.agent.c_str();  // null: a hole
    status = api_->remote_dlist_add_desc(list, row.base, row.num_bytes, uint64_t(row.device), agent);
  }
  if (status == kSuccess) status = api_->prep_mem_view_remote(agent_, list, &view, options_);
  api_->destroy_remote_dlist(list);
  Check(status,
        "preparing the memory view of the peers (UCX must have a lane from this GPU to each: cuda_ipc to another "
        "process of this machine, or a network card)");
  return view;
}

void NixlAgent::ReleaseView(void* view) { api_->release_mem_view(agent_, view); }

NixlAgent::Transfer::Transfer(NixlAgent& agent, const std::string& peer, std::span<const Piece> pieces,
                              Direction direction)
    : agent_(&agent) {
  Api& api = *agent.api_;
  void *local = nullptr, *remote = nullptr;
  Check(api.create_xfer_dlist(kHostMemory, &local), "create_xfer_dlist");
  int status = api.create_xfer_dlist(kHostMemory, &remote);
  for (const Piece& piece : pieces) {
    if (status == kSuccess) {
      status = api.xfer_dlist_add_desc(local, reinterpret_cast<uintptr_t>(piece.local), piece.num_bytes, 0);
    }
    if (status == kSuccess) status = api.xfer_dlist_add_desc(remote, piece.remote, piece.num_bytes, 0);
  }
  if (status == kSuccess) {
    status = api.create_xfer_req(agent.agent_, int(direction), local, remote, peer.c_str(), &request_, agent.options_);
  }
  api.destroy_xfer_dlist(local);
  if (remote) api.destroy_xfer_dlist(remote);
  Check(status, "preparing a transfer");
  status = api.post_xfer_req(agent.agent_, request_, nullptr);
  if (status == kInProgress || status == kSuccess) return;
  Release();  // an object that throws while it is made is not destroyed
  Check(status, "posting a transfer");
}

bool NixlAgent::Transfer::Done() {
  if (!request_) return true;
  int status = agent_->api_->get_xfer_status(agent_->agent_, request_);
  if (status == kInProgress) return false;
  Check(status, "a transfer");
  return true;
}

void NixlAgent::Transfer::Release() {
  if (!request_) return;
  agent_->api_->release_xfer_req(agent_->agent_, request_);
  agent_->api_->destroy_xfer_req(request_);
}

}  // namespace jax_nixlep
