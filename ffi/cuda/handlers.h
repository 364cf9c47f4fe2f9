// The XLA FFI handlers of platform "CUDA".
#pragma once

#include <cstdint>

#include "xla/ffi/api/ffi.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxNixlepDispatchCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxNixlepRedispatchCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxNixlepCombineCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxNixlepDispatchStartCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxNixlepDispatchFinishCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxNixlepCombineStartCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxNixlepCombineFinishCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxNixlepMarkCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxNixlepNixlEpDispatchCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxNixlepNixlEpCombineCuda);

namespace jax_nixlep::cuda {
// Calls of handlers so far: replays of a captured command buffer make none.
uint64_t NumLaunches();
// Microseconds between two marks that a program has passed; -1 before that.
double ElapsedUs(int from, int to);
}  // namespace jax_nixlep::cuda
