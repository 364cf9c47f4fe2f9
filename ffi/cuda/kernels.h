// Launches of the kernels. Plain pointers to device memory: no XLA, no Python. Nothing here allocates or waits.
//
// An operation has two halves. The sending one makes this rank's message visible to its peers; the receiving one waits
// for theirs and writes the results. Neither waits inside for another block of its own grid, so no cooperative launch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/state.h"
#include "runtime/format.h"

namespace jax_nixlep::cuda {

struct Launch {
  Control* control = nullptr;
  const std::byte* region = nullptr;
  Geometry geometry;
  RowFormat format;
  uint64_t tag = 0;
  int num_sms = 0;
  cudaStream_t stream = nullptr;
  uint64_t* ticket = nullptr;  // names the operation between its halves; null: both follow at once in this stream
  float* order = nullptr;      // set to 0 by the last kernel
};

struct SendTokensArgs {
  int num_tokens = 0;
  const std::byte* x = nullptr;    // [t, H]
  const int32_t* ids = nullptr;    // [t, K]
  const float* weights = nullptr;  // [t, K], or null
  int32_t* clean_ids = nullptr;    // [t, K], or null: the ids are clean and the peers have them, and picks
  int32_t* invalid_ids = nullptr;  // [1], or null with clean_ids, which is null for no tokens, too
  // [t, H / 128] if x is e4m3 already, else null.
  const std::byte* x_scales = nullptr;
};
void SendTokens(const Launch& launch, const SendTokensArgs& args);

struct ReceiveTokensArgs {
  int64_t num_rows = 0;
  bool weighted = false;           // messages carry weights
  std::byte* rows = nullptr;       // [C, H]
  std::byte* scales = nullptr;     // [C, H / 128], or null
  float* row_weights = nullptr;    // [C]
  int32_t* group_sizes = nullptr;  // [E]
  int32_t* demand = nullptr;       // [E]
  int32_t* row_of = nullptr;       // [R, T, K]
  int32_t* peers = nullptr;        // [R]
  int32_t* dropped = nullptr;      // [1]
};
void ReceiveTokens(const Launch& launch, const ReceiveTokensArgs& args);

struct ReceiveAlongArgs {
  int64_t num_rows = 0;
  const int32_t* row_of = nullptr;  // [R, T, K]
  std::byte* rows = nullptr;        // [C, H]
  float* row_weights = nullptr;     // [C], or null
};
void ReceiveAlong(const Launch& launch, const ReceiveAlongArgs& args);

struct SendSumsArgs {
  int num_tokens = 0;  // of this rank, for its signal
  int64_t num_rows = 0;
  const std::byte* rows = nullptr;  // [C, H]
  const float* row_weights = nullptr;
  const float* row_scalars = nullptr;  // [C], or null
  const int32_t* row_of = nullptr;     // [R, T, K]
};
void SendSums(const Launch& launch, const SendSumsArgs& args);

struct ReceiveSumsArgs {
  int num_tokens = 0;
  std::byte* y = nullptr;    // [t, H]
  float* scalars = nullptr;  // [t, K], or null
};
void ReceiveSums(const Launch& launch, const ReceiveSumsArgs& args);

// Rows of the memory views: the region of each peer, then the control block of each.
constexpr int RegionRow(int peer) { return peer; }
constexpr int ControlRow(int peer, int max_ranks) { return max_ranks + peer; }

// --- Between operations. ---

// Loads every kernel now: a first use later could wait behind a kernel that waits for a peer.
cudaError_t Preload();
// Stores the pointer through which row i of `remote_view` can be reached where wanted[i] != 0, or null.
cudaError_t FindPointers(void* remote_view, int num_rows, const uint32_t* wanted, std::byte** pointers,
                         cudaStream_t stream);
// Tells every live member why this rank stops.
cudaError_t Notify(Control* control, const Geometry& geometry, Notice notice, cudaStream_t stream);

}  // namespace jax_nixlep::cuda
