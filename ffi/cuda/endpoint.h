// A rank's end of a group on a GPU: symmetric device memory, peers reached through NIXL memory views, and the state
// that kernels advance. Knows no XLA and no Python.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "runtime/endpoint.h"
#include "runtime/nixl_agent.h"

namespace jax_nixlep::cuda {

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
  size_t num_bytes() const { return layout_.num_bytes(); }

  // --- Connecting, as runtime/endpoint.h; none of these may run while an operation does. ---
  std::string OpenNixl(const std::string& library, const std::string& name);
  // The nonce that keeps late writes of an earlier group apart on CPUs is not needed: views end with their agent.
  void ConnectNixl(int peer, const std::string& metadata, uint64_t remote_base, uint64_t nonce);
  void DropPeer(int peer);
  void Activate(uint16_t epoch, std::span<const int> members);
  void Close();

  // --- Reading; any thread, any time. ---
  PeerHealth Health(int peer) const;
  uint64_t num_operations() const;
  uint64_t dropped_rows() const;
  uint64_t invalid_ids() const;
  uint16_t epoch() const { return epoch_; }
  // Why no operation can run any more; empty while all is well. Kernels cannot raise: the next call does.
  std::string Failure() const;

  // What the launches of one operation have in common. Throws EpError if none can run.
  Launch MakeLaunch(uint64_t tag, const RowFormat& format, int num_tokens, cudaStream_t stream) const;

 private:
  struct Peer {
    std::string agent;
    uint64_t remote_base = 0, remote_control = 0;
    int device = 0;
    bool member = false;
    std::byte* pointer = nullptr;
  };

  void ReleaseViews();
  template <typename T>
  T Read(const T& field) const;  // `field`: an lvalue in *control_, whose address alone is used

  EndpointOptions options_;
  const int device_;
  Layout layout_;
  Geometry geometry_;
  uint64_t nonce_ = 0;
  int num_sms_ = 0;
  std::byte* region_ = nullptr;  // stays allocated: a peer may still read it
  std::byte* scratch_ = nullptr;
  Control* control_ = nullptr;  // one per device and process
  FailureReport* report_ = nullptr;
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<NixlAgent> nixl_;
  void *local_view_ = nullptr, *remote_view_ = nullptr;
  std::vector<Peer> peers_;

  mutable std::mutex mutex_;
  bool active_ = false, closed_ = false;
  uint16_t epoch_ = 0;
};

}  // namespace jax_nixlep::cuda
