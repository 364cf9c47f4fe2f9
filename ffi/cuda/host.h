// Small things that both kinds of endpoints and their handlers do with CUDA's host API.
#pragma once

#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#include <chrono>
#include <cstdlib>
#include <exception>
#include <future>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/endpoint.h"
#include "runtime/nixl_agent.h"

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

constexpr std::chrono::seconds kViewTimeout{30};
constexpr const char* kStuck =
    "endpoint: a rank that is being connected must answer; got none for 30 s, and NIXL waits on; start this rank "
    "again, it cannot connect to others any more";

// A view of peers' memory. NIXL can wait without end for a rank that dies while it is being connected. Nothing then:
// the caller throws kStuck, and leaves the agent and its connections to the process, since ending one would wait, too.
inline std::optional<void*> RemoteViewInTime(NixlAgent& nixl, std::vector<NixlAgent::ViewRow> rows, int device) {
  std::promise<void*> made;
  std::future<void*> view = made.get_future();
  std::thread([rows = std::move(rows), made = std::move(made), &nixl, device]() mutable {
    try {
      OnDevice current(device);
      made.set_value(nixl.RemoteView(rows));
    } catch (...) {
      made.set_exception(std::current_exception());
    }
  }).detach();
  if (view.wait_for(kViewTimeout) != std::future_status::ready) return std::nullopt;
  return view.get();
}

// What profilers show for a scope.
class Range {
 public:
  explicit Range(const char* name) { nvtxRangePushA(name); }
  ~Range() { nvtxRangePop(); }
};

}  // namespace jax_nixlep::cuda
