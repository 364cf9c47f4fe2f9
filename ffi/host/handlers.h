// The XLA FFI handlers of platform "cpu".
#pragma once

#include "xla/ffi/api/ffi.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxNixlepDispatchCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxNixlepRedispatchCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JaxNixlepCombineCpu);
