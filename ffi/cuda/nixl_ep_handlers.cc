// XLA's face of NVIDIA's NIXL-EP kernels. Not for command buffers: which bank a call uses is the host's to say, and a
// replay would say the same again.
#include <cuda_runtime.h>

#include <string>

#include "cuda/handlers.h"
#include "cuda/host.h"
#include "cuda/nixl_ep.h"
#include "registry.h"

namespace jax_nixlep::cuda::nixl_ep {
namespace {

namespace ffi = xla::ffi;

using I32 = ffi::Buffer<ffi::S32>;
using F32 = ffi::Buffer<ffi::F32>;
using BF16 = ffi::Buffer<ffi::BF16>;
using Any = ffi::AnyBuffer;
using Stream = ffi::PlatformStream<cudaStream_t>;

// `ids` [t, K] and `ranges` [E, R, 2] show the sizes that a program was traced for.
template <typename Function>
ffi::Error Run(const char* name, int32_t device, cudaStream_t stream, I32 ids, I32 ranges, F32 order, int64_t hidden,
               int64_t slots, Function function) {
  Range range(name);
  try {
    std::shared_ptr<NixlEpEndpoint> endpoint = RegistryOf<NixlEpEndpoint>::Get().Find(device);
    if (!endpoint) {
      return ffi::Error(
          ffi::ErrorCode::kFailedPrecondition,
          std::string(name) + ": device " + std::to_string(device) +
              " must belong to a group with kernels=\"nixl_ep\"; got none; call jax_nixlep.initialize so, "
              "or trace the program again after it");
    }
    const Shape& s = endpoint->shape();
    auto sizes = ranges.dimensions();
    const Shape traced{int(sizes[1]), int(sizes[0]), sizes[1] ? int(slots / sizes[1]) : 0, int(ids.dimensions()[1]),
                       int(hidden)};
    if (!(traced == s)) {
      return ffi::Error::InvalidArgument(std::string(name) +
                                         ": the arrays must have the sizes of the group's config; initialize with the "
                                         "config that the program uses");
    }
    function(*endpoint, int(ids.dimensions()[0]));
    cudaMemsetAsync(order.typed_data(), 0, sizeof(float), stream);
    const cudaError_t status = cudaGetLastError();
    if (status == cudaSuccess) return ffi::Error::Success();
    return ffi::Error::Internal(std::string(name) + ": launching failed: " + cudaGetErrorString(status));
  } catch (const std::exception& error) {  // the library's own checks throw too
    return ffi::Error(ffi::ErrorCode::kAborted, error.what());
  }
}

ffi::Error Dispatch(cudaStream_t stream, int32_t device, int64_t round_scale, BF16 x, I32 ids, Any /*after*/,
                    ffi::Result<Any> rows, ffi::Result<Any> scales, ffi::Result<I32> counts, ffi::Result<I32> source,
                    ffi::Result<I32> ranges, ffi::Result<I32> masked, ffi::Result<F32> order) {
  return Run("jax_nixlep.nixl_ep_dispatch", device, stream, ids, *ranges, *order, x.dimensions()[1],
             rows->dimensions()[1], [&](NixlEpEndpoint& endpoint, int num_tokens) {
               endpoint.Dispatch({.num_tokens = num_tokens,
                                  .x = x.untyped_data(),
                                  .ids = ids.typed_data(),
                                  .fp8 = rows->element_type() != ffi::BF16,
                                  .round_scale = round_scale != 0,
                                  .ue8m0 = scales->element_type() == ffi::S32,
                                  .rows = rows->untyped_data(),
                                  .scales = scales->untyped_data(),
                                  .source = source->typed_data(),
                                  .ranges = reinterpret_cast<int64_t*>(ranges->typed_data()),
                                  .counts = counts->typed_data(),
                                  .masked = masked->typed_data()},
                                 stream);
             });
}

ffi::Error Combine(cudaStream_t stream, int32_t device, int64_t slots, BF16 rows, I32 ids, F32 weights, I32 source,
                   I32 ranges, Any /*after*/, ffi::Result<BF16> y, ffi::Result<I32> masked, ffi::Result<F32> order) {
  return Run("jax_nixlep.nixl_ep_combine", device, stream, ids, ranges, *order, y->dimensions()[1], slots,
             [&](NixlEpEndpoint& endpoint, int num_tokens) {
               endpoint.Combine({.num_tokens = num_tokens,
                                 .rows = rows.untyped_data(),
                                 .ids = ids.typed_data(),
                                 .weights = weights.typed_data(),
                                 .source = source.typed_data(),
                                 .ranges = reinterpret_cast<const int64_t*>(ranges.typed_data()),
                                 .y = y->untyped_data(),
                                 .masked = masked->typed_data()},
                                stream);
             });
}

}  // namespace
}  // namespace jax_nixlep::cuda::nixl_ep

namespace gpu = jax_nixlep::cuda::nixl_ep;

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxNixlepNixlEpDispatchCuda, gpu::Dispatch,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<gpu::Stream>()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Attr<int64_t>("round_scale")
                                  .Arg<gpu::BF16>()   // x [t, H]
                                  .Arg<gpu::I32>()    // ids [t, K]
                                  .Arg<gpu::Any>()    // after
                                  .Ret<gpu::Any>()    // rows [E, R * T, H]
                                  .Ret<gpu::Any>()    // scales [E, H / 128, R * T], [E, H / 512, R * T] or [0]
                                  .Ret<gpu::I32>()    // counts [E]
                                  .Ret<gpu::I32>()    // source [E, R * T]
                                  .Ret<gpu::I32>()    // ranges [E, R, 2]: count, first
                                  .Ret<gpu::I32>()    // masked [3, R]: before, after, fatal
                                  .Ret<gpu::F32>());  // order []

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxNixlepNixlEpCombineCuda, gpu::Combine,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<gpu::Stream>()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Attr<int64_t>("slots")  // R * T
                                  .Arg<gpu::BF16>()        // rows [E, R * T, H], or [C, H] in any order `ranges` says
                                  .Arg<gpu::I32>()         // ids [t, K]
                                  .Arg<gpu::F32>()         // weights [t, K]
                                  .Arg<gpu::I32>()         // source [E, R * T], or [C]
                                  .Arg<gpu::I32>()         // ranges [E, R, 2]: count, first
                                  .Arg<gpu::Any>()         // after
                                  .Ret<gpu::BF16>()        // y [t, H]
                                  .Ret<gpu::I32>()         // masked [3, R]
                                  .Ret<gpu::F32>());       // order []
