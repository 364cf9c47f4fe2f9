// The three operations on the CPU. Plain pointers in and out: no XLA, no Python.
//
// Contract (jax_nixlep/routing.py has the shapes): a row is one distinct (source rank, token, local expert); rows are
// packed by expert and ordered by (source rank, token) within it, so that results do not depend on timing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "host/numeric.h"
#include "runtime/endpoint.h"
#include "runtime/format.h"

namespace jax_nixlep {

// Routes tokens by fresh ids and makes the handle.
struct DispatchArgs {
  RowFormat format;
  uint32_t ordinal = 0;
  int num_tokens = 0;                   // t of this rank
  int64_t num_rows = 0;                 // C
  const std::byte* x;                   // [t, H]
  const std::byte* x_scales = nullptr;  // [t, H / 128] if x is e4m3 already
  const int32_t* ids;                   // [t, K] physical slots
  const float* weights;                 // [t, K], or null: ones
  std::byte* rows;                      // [C, H]
  std::byte* scales;                    // [C, H / 128], or null
  float* row_weights;                   // [C]
  int32_t* group_sizes;                 // [E]
  int32_t* demand;                      // [E]
  int32_t* clean_ids;                   // [t, K]
  int32_t* row_of;                      // [R, T, K]
  int32_t* peers;                       // [R] PeerState
  int32_t* dropped;                     // [1]
  int32_t* invalid_ids;                 // [1]
};
void Dispatch(Endpoint& endpoint, const DispatchArgs& args);

// Sends tokens and weights again along a handle.
struct RedispatchArgs {
  RowFormat format;
  uint32_t ordinal = 0;
  int num_tokens = 0;
  int64_t num_rows = 0;
  const std::byte* x;     // [t, H], H may be 0
  const float* weights;   // [t, K], or null
  const int32_t* ids;     // [t, K]
  const int32_t* row_of;  // [R, T, K]
  std::byte* rows;        // [C, H]
  float* row_weights;     // [C], or null
};
void Redispatch(Endpoint& endpoint, const RedispatchArgs& args);

// Returns weighted sums of rows, and scalars of rows, to the tokens they belong to: the transpose of Redispatch.
struct CombineArgs {
  RowFormat format;
  uint32_t ordinal = 0;
  int num_tokens = 0;
  int64_t num_rows = 0;
  const std::byte* rows;     // [C, H], H may be 0
  const float* row_weights;  // [C]
  const float* row_scalars;  // [C], or null
  const int32_t* row_of;     // [R, T, K]
  std::byte* y;              // [t, H]
  float* scalars;            // [t, K], or null
};
void Combine(Endpoint& endpoint, const CombineArgs& args);

}  // namespace jax_nixlep
