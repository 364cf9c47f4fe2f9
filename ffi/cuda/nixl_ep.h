// NVIDIA's own NIXL-EP kernels, called in the library that the nixl wheel brings for torch. What is known about them
// is here: the symbols, the context they read, where they expect things in memory (read from nixl 1.4.1 and 1.5.1;
// Activate and the self-test in jax_nixlep/nixl_ep find out when it is no longer so). Knows no XLA, Python or torch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "runtime/endpoint.h"
#include "runtime/nixl_agent.h"

namespace jax_nixlep::cuda::nixl_ep {

// In device memory; kernels get its address. Nothing in the library tells its layout.
struct Context {
  void *local_view, *barrier_view, *remote_view, *throughput_view;
  int *barrier_counters, *barrier_counts;
  uint64_t *throughput_last, *throughput_counter;
  std::byte* region;
  std::byte** pointers;  // [max_ranks] of the peers' regions; null: by put
  int max_ranks, num_hosts, rank;
};

// The functions of the library that are used, found by their mangled names: their argument types are part of those.
struct Kernels {
  void (*dispatch)(void* rows, void* scales, int* source, int64_t* ranges, int* counts, int* mask, int* row_stats,
                   int64_t* wait_stats, void* inbox, uint64_t* signals, void* outbox, const void* x, const int* ids,
                   uint64_t* next_signals, int num_next_signals, int num_tokens, int hidden, int max_tokens, int top_k,
                   int num_ranks, int experts_per_rank, int rank, bool fp8, bool round_scale, bool ue8m0,
                   uint64_t timeout_cycles, void* workspace, int num_sms, cudaStream_t stream, int phases,
                   Context* context);
  void (*combine)(void* y, void* inbox, uint64_t* signals, void* outbox, const void* rows, const int* ids,
                  const float* weights, const int* source, const int64_t* ranges, int* mask, int64_t* wait_stats,
                  uint64_t* next_signals, int num_next_signals, int num_tokens, int hidden, int max_tokens, int top_k,
                  int num_ranks, int experts_per_rank, int rank, bool log_format, uint64_t timeout_cycles,
                  void* workspace, int num_sms, cudaStream_t stream, int phases, bool zero_copy, Context* context);
  void (*cache_pointer)(Context* context, int rank, cudaStream_t stream);

  // Throws EpError if the library cannot be loaded or lacks one; names it.
  explicit Kernels(const std::string& library);
};

struct Shape {
  int max_ranks = 0, experts_per_rank = 0, max_tokens = 0, top_k = 0, hidden = 0;

  bool operator==(const Shape&) const = default;
};

// What lies where in a region: signals, then what is sent, then what arrives, each of it twice.
struct RegionLayout {
  size_t signals, outbox, inbox;  // bytes of one bank

  explicit RegionLayout(const Shape& shape);
  size_t signals_at(int bank) const { return signals * size_t(bank); }
  size_t outbox_at(int bank) const { return 2 * signals + outbox * size_t(bank); }
  size_t inbox_at(int bank) const { return 2 * signals + 2 * outbox + inbox * size_t(bank); }
  size_t num_bytes() const;
};

// What ranks tell each other beside the metadata of their agents; upstream sends the same as a notification.
struct PeerInfo {
  uint64_t region, barrier_counters, throughput_counter;
  int32_t device, rank;
};

class NixlEpEndpoint {
 public:
  struct Options {
    int rank = 0;
    Shape shape;
    int num_hosts = 1;  // as upstream counts them
    double timeout_s = 60;
    bool mask_late_peers = false;
  };

  // `library`: path of nixl_ep_cpp_torch*.so; torch's libraries must be in the process.
  NixlEpEndpoint(const Options& options, int device, const std::string& library);
  ~NixlEpEndpoint();
  NixlEpEndpoint(const NixlEpEndpoint&) = delete;

  const Shape& shape() const { return options_.shape; }
  uint64_t nonce() const { return nonce_; }
  std::byte* region() const { return memory_; }
  size_t num_bytes() const { return layout_.num_bytes(); }

  // --- Connecting; none of these may run while an operation does. ---
  std::string OpenNixl(const std::string& library, const std::string& name);
  void ConnectNixl(int peer, const std::string& metadata, uint64_t remote_base, uint64_t nonce);
  // Meets a peer that is upstream's Buffer while it runs connect_ranks. Both agents must have their ranks as names.
  std::string AgentMetadata() const;
  void ConnectUpstream(int peer, const std::string& metadata, double timeout_s);
  // All members must be idle, and none may begin an operation before all have done this.
  void Activate(uint16_t epoch, std::span<const int> members);
  void Close();

  // --- Reading; any thread, any time. ---
  PeerHealth Health(int peer) const;
  uint64_t num_operations() const;
  uint16_t epoch() const { return epoch_; }
  std::string Failure() const;

  // --- Operations. What changes from call to call is kept by the host: no command buffer may capture these. ---
  struct DispatchArgs {
    int num_tokens = 0;
    const void* x = nullptr;       // [t, H] bfloat16
    const int32_t* ids = nullptr;  // [t, K]
    bool fp8 = false, round_scale = false, ue8m0 = false;
    void* rows = nullptr;       // [E, R * T, H] bfloat16 or float8_e4m3fn
    void* scales = nullptr;     // [E, H / 128, R * T] float, or [E, H / 512, R * T] of four exponents; with fp8
    int32_t* source = nullptr;  // [E, R * T] token of each row
    int64_t* ranges = nullptr;  // [E, R] count of rows from each rank, first of them << 32
    int32_t* counts = nullptr;  // [E]
    int32_t* masked = nullptr;  // [3, R] before the operation; after it; whether that ends the group
  };
  void Dispatch(const DispatchArgs& args, cudaStream_t stream);
  struct CombineArgs {
    int num_tokens = 0;
    const void* rows = nullptr;       // [E, R * T, H] bfloat16
    const int32_t* ids = nullptr;     // [t, K]
    const float* weights = nullptr;   // [t, K]
    const int32_t* source = nullptr;  // as from Dispatch
    const int64_t* ranges = nullptr;  // as from Dispatch
    void* y = nullptr;                // [t, H] bfloat16
    int32_t* masked = nullptr;        // as in DispatchArgs
  };
  void Combine(const CombineArgs& args, cudaStream_t stream);

 private:
  struct Peer {
    std::string agent;
    PeerInfo info{};
    bool member = false, by_pointer = false;
  };

  // Under mutex_.
  std::string FailureLocked() const;
  // Throws EpError if none can run. Reports the mask as it is before, and returns it, for the kernel.
  int32_t* Begin(const char* op, int num_tokens, int32_t* masked, cudaStream_t stream) const;
  void End(int32_t* masked, cudaStream_t stream);
  void WriteMask();
  void ReleaseViews();
  void MakeViews();
  void FindPointersOf(std::span<const int> peers);
  std::byte* Piece(size_t offset) const { return memory_ + offset; }

  const Options options_;
  const int device_;
  const Kernels kernels_;
  const RegionLayout layout_;
  uint64_t nonce_ = 0;
  int num_sms_ = 0;
  uint64_t clock_khz_ = 0, timeout_cycles_ = 0;
  // One block of device memory: the region, then what only this rank uses.
  size_t counters_at_ = 0, counts_at_ = 0, mask_at_ = 0, fatal_at_ = 0, waits_at_ = 0, pointers_at_ = 0,
         context_at_ = 0, workspace_at_ = 0, memory_bytes_ = 0;
  std::byte* memory_ = nullptr;
  int32_t* host_mask_ = nullptr;  // as of the last operation that has run
  std::vector<int32_t> fatal_;    // peers that must not be masked by an operation
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<NixlAgent> nixl_;  // none any more where a peer that was being connected did not answer
  Context context_{};
  std::vector<Peer> peers_;
  uint16_t epoch_ = 0;
  int bank_ = 0;
  uint64_t operations_ = 0;
  bool active_ = false, closed_ = false;
  mutable std::mutex mutex_;
};

}  // namespace jax_nixlep::cuda::nixl_ep
