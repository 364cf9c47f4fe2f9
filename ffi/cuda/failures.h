// The words for what kernels report.
#pragma once

#include <string>

#include "cuda/state.h"

namespace jax_nixlep::cuda {

// Which operation failed, on which rank's account, and what to do. `report.code` was read before the rest.
std::string Describe(const FailureReport& report, double timeout_s);

}  // namespace jax_nixlep::cuda
