// A rank's end of a group on a GPU: symmetric device memory, peers reached through NIXL memory views, and the state
// that kernels advance. Knows no XLA and no Python.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "cuda/kernels.h"
#include "runtime/endpoint.h"
#include "runtime/nixl_agent.h"
#include "runtime/shared_memory.h"

namespace jax_nixlep::cuda {

struct HostBlock;

class CudaEndpoint {
 public:
  // `device`: CUDA's number of the GPU. One endpoint at a time for each device.
  CudaEndpoint(const EndpointOptions& options, int device);
  ~CudaEndpoint();
  CudaEndpoint(const CudaEndpoint&) = delete;

  int rank() const { return options_.rank; }
  const Capacity& capacity() const { return layout_.capacity; }
  uint64_t nonce() const { return nonce_; }
  std::byte* region() const { return region_; }
  int page_fd() const { return page_.fd(); }
  size_t num_bytes() const { return layout_.num_bytes(); }

  // --- Connecting, as runtime/endpoint.h, by one thread at a time, at any time: kernels see it after Activate. ---
  // Remembers how the death of a peer of this machine will show. True for one of this process, which is connected then:
  // UCX has no lane between two GPUs of one process. False: it is to be reached through NIXL.
  bool MapPeer(int peer, int pid, int fd, uint64_t nonce);
  std::string OpenNixl(const std::string& library, const std::string& name);
  void ConnectNixl(int peer, const std::string& metadata, uint64_t remote_base, uint64_t nonce);
  void DropPeer(int peer);
  // Makes the views of the peers that Activate needs for `members`, and gives back what the last change left over. May
  // take its time; operations go on.
  void Prepare(std::span<const int> members);

  // No operation of this rank may run, or be queued.
  void Activate(uint16_t epoch, std::span<const int> members);
  void Interrupt();
  void Drain();
  // False once a peer of this machine is known to be dead.
  bool PeerAlive(int peer) const;
  bool ShowsDeath(int peer) const;
  void Close();

  // --- Reading; any thread, any time. ---
  PeerHealth Health(int peer) const;
  uint64_t num_operations() const;
  uint64_t dropped_rows() const;
  uint64_t invalid_ids() const;
  uint16_t epoch() const { return epoch_; }
  // Why no operation can run any more; empty while all is well. Kernels cannot raise: the next call does.
  std::string Failure() const;
  bool GaveUp() const;  // a member, since Activate; costs nothing

  // What the launches of one operation have in common. Throws EpError if none can run.
  Launch MakeLaunch(uint64_t tag, const RowFormat& format, int num_tokens, cudaStream_t stream) const;

 private:
  bool ReachesDevice(int device) const;

  // A connection; ends with its last user.
  struct Link {
    NixlAgent* nixl;  // null: a peer of this process
    std::string agent;
    uint64_t nonce, base, control;
    int device;
    ~Link() {
      if (nixl) nixl->Disconnect(agent);
    }
  };
  using Links = std::vector<std::shared_ptr<Link>>;  // by rank; null: not connected

  // What kernels reach peers with. Holds the connections.
  struct Views {
    Links links;
    NixlAgent* nixl;
    void* remote = nullptr;
    std::vector<std::byte*> pointers;  // as the rows of the view
    ~Views() {
      if (remote) nixl->ReleaseView(remote);
    }
  };

  // Under mutex_. Throws EpError if a member is not connected.
  Links LinksOf(std::span<const int> members) const;
  std::shared_ptr<Views> MakeViews(Links links);  // under connect_
  void Watch(std::stop_token stop);               // tells kernels of peers that died
  const char* PathTo(int peer) const;             // under mutex_
  template <typename T>
  T Read(const T& field) const;  // `field`: an lvalue in *control_, whose address alone is used

  EndpointOptions options_;
  const int device_;
  Layout layout_;
  Geometry geometry_;
  uint64_t nonce_ = 0;
  SharedMemory page_;  // by which peers of this machine notice a death
  int num_sms_ = 0;
  std::byte* region_ = nullptr;  // stays allocated: a peer may still read it
  std::byte* scratch_ = nullptr;
  Control* control_ = nullptr;  // one per device and process, as host_
  HostBlock* host_ = nullptr;
  // Streams of the host's own: neither waits for kernels of the program.
  cudaStream_t stream_ = nullptr, background_ = nullptr;

  // Held by what uses NIXL, and may take long. Before mutex_. Activate needs it only for peers that were not prepared.
  std::mutex connect_;
  std::unique_ptr<NixlAgent> nixl_;
  void* local_view_ = nullptr;
  bool stuck_ = false;  // a view is being made, and may be for ever: NIXL is not to be called any more

  // For what follows and for stream_. Until Close, not held while anything is waited for but copies.
  mutable std::mutex mutex_;
  Links links_;  // as of now
  std::vector<std::unique_ptr<SharedMemory>> pages_;
  std::vector<bool> members_;
  std::shared_ptr<Views> views_, next_views_;   // of the kernels; ready for them
  std::vector<std::shared_ptr<void>> retired_;  // links and views that nothing uses; Prepare ends them
  bool active_ = false;
  uint16_t epoch_ = 0;
  std::atomic<bool> closed_{false};  // the control block and host_ may be another endpoint's
  std::jthread watch_;
};

}  // namespace jax_nixlep::cuda
