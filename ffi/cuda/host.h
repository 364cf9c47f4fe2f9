// Small things that both kinds of endpoints and their handlers do with CUDA's host API.
#pragma once

#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#include <cstdlib>
#include <string>

#include "runtime/endpoint.h"

namespace jax_nixlep::cuda {

inline void CheckCuda(const char* who, cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw EpError(std::string(who) + ": " + what + " failed: " + cudaGetErrorString(status));
  }
}

// Makes the device current for a scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    CheckCuda("endpoint", cudaGetDevice(&before_), "cudaGetDevice");
    CheckCuda("endpoint", cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

// Whether peers may be reached by pointer.
inline bool PointersAllowed() {
  const char* text = std::getenv("JAX_NIXLEP_P2P");
  return !text || std::string(text) != "0";
}

// What profilers show for a scope.
class Range {
 public:
  explicit Range(const char* name) { nvtxRangePushA(name); }
  ~Range() { nvtxRangePop(); }
};

}  // namespace jax_nixlep::cuda
