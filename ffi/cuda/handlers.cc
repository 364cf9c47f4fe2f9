// XLA's face of the CUDA operations: unpacks buffers and attributes, checks them, launches. The signatures of whole
// operations are those of host/handlers.cc. No host synchronisation and no allocation: XLA may capture these calls into
// a command buffer and replay it; all that changes from call to call is in device memory.
#include "cuda/handlers.h"

#include <cuda_runtime.h>

#include <atomic>
#include <map>
#include <string>

#include "attributes.h"
#include "cuda/endpoint.h"
#include "cuda/host.h"
#include "registry.h"

namespace jax_nixlep::cuda {
namespace {

namespace ffi = xla::ffi;

using I32 = ffi::Buffer<ffi::S32>;
using F32 = ffi::Buffer<ffi::F32>;
using Any = ffi::AnyBuffer;
using Stream = ffi::PlatformStream<cudaStream_t>;

std::atomic<uint64_t> num_launches{0};

template <typename Buffer>
std::byte* Bytes(Buffer&& buffer) {
  return static_cast<std::byte*>(buffer.untyped_data());
}

template <typename T, typename Buffer>
T* OrNull(Buffer&& buffer) {
  return buffer.element_count() ? static_cast<T*>(buffer.untyped_data()) : nullptr;
}

// Launches one operation, or half of one, on the endpoint of `device`; whatever goes wrong is an error of the program.
template <typename Function>
ffi::Error Run(int32_t device, cudaStream_t stream, const char* name, OpTag tag, const RowFormat& format,
               int64_t tokens, const Sizes& sizes, Function function) {
  Range range(name);
  ++num_launches;
  try {
    std::shared_ptr<CudaEndpoint> endpoint = RegistryOf<CudaEndpoint>::Get().Find(device);
    if (!endpoint) {
      return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                        std::string(name) + ": device " + std::to_string(device) +
                            " must belong to a group; got none; call jax_nixlep.initialize on this process first");
    }
    const Capacity& c = endpoint->capacity();
    if (int64_t(format.wire_bytes()) > c.row_bytes || format.hidden * int64_t(TokenBytes(format.type)) % 16) {
      return ffi::Error::InvalidArgument(std::string(name) +
                                         ": a row must be whole 16-byte vectors and fit the group's " +
                                         std::to_string(c.row_bytes) + " bytes; got " +
                                         std::to_string(format.wire_bytes()) + "; initialize with this config");
    }
    if (!sizes.Fit(c)) return SizesDiffer(name);
    function(endpoint->MakeLaunch(tag.Pack(), format, int(tokens), stream));
    const cudaError_t status = cudaGetLastError();
    if (status == cudaSuccess) return ffi::Error::Success();
    return ffi::Error::Internal(std::string(name) + ": launching failed: " + cudaGetErrorString(status));
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kAborted, error.what());
  }
}

OpTag Tag(OpKind kind, const OpAttributes& attributes, const RowFormat& format, bool second_table) {
  return {kind, uint32_t(attributes.ordinal), format.Digest(second_table)};
}

uint64_t* Ticket(I32& buffer) { return reinterpret_cast<uint64_t*>(buffer.typed_data()); }

ffi::Error Dispatch(cudaStream_t stream, int32_t device, OpAttributes attributes, Any x, Any x_scales, I32 ids,
                    F32 weights, Any /*after*/, ffi::Result<Any> rows, ffi::Result<Any> scales,
                    ffi::Result<F32> row_weights, ffi::Result<I32> group_sizes, ffi::Result<I32> demand,
                    ffi::Result<I32> clean_ids, ffi::Result<I32> row_of, ffi::Result<I32> peers,
                    ffi::Result<I32> dropped, ffi::Result<I32> invalid_ids, ffi::Result<F32> order) {
  const RowFormat format = MakeTokenFormat(attributes, x.element_type(), rows->element_type(), x.dimensions()[1]);
  const bool weighted = attributes.weighted != 0;
  const Sizes sizes = HandleSizes(*row_of, group_sizes->dimensions()[0]);
  return Run(device, stream, "jax_nixlep.dispatch", Tag(OpKind::kDispatch, attributes, format, weighted), format,
             x.dimensions()[0], sizes, [&](Launch launch) {
               SendTokens(launch, {.num_tokens = int(x.dimensions()[0]),
                                   .x = Bytes(x),
                                   .ids = ids.typed_data(),
                                   .weights = weighted ? weights.typed_data() : nullptr,
                                   .clean_ids = clean_ids->typed_data(),
                                   .invalid_ids = invalid_ids->typed_data(),
                                   .x_scales = ScalesOf(x, x_scales)});
               launch.order = order->typed_data();
               ReceiveTokens(launch, {.num_rows = rows->dimensions()[0],
                                      .weighted = weighted,
                                      .rows = Bytes(*rows),
                                      .scales = OrNull<std::byte>(*scales),
                                      .row_weights = row_weights->typed_data(),
                                      .group_sizes = group_sizes->typed_data(),
                                      .demand = demand->typed_data(),
                                      .row_of = row_of->typed_data(),
                                      .peers = peers->typed_data(),
                                      .dropped = dropped->typed_data()});
             });
}

ffi::Error DispatchStart(cudaStream_t stream, int32_t device, OpAttributes attributes, Any x, Any x_scales, I32 ids,
                         F32 weights, Any /*after*/, ffi::Result<I32> clean_ids, ffi::Result<I32> invalid_ids,
                         ffi::Result<I32> ticket, ffi::Result<F32> order) {
  const RowFormat format = MakeFormat(attributes, x.element_type(), x.dimensions()[1]);
  const Sizes sizes{.top_k = ids.dimensions()[1]};
  const bool weighted = attributes.weighted != 0;
  return Run(device, stream, "jax_nixlep.dispatch_start", Tag(OpKind::kDispatch, attributes, format, weighted), format,
             x.dimensions()[0], sizes, [&](Launch launch) {
               launch.ticket = Ticket(*ticket);
               launch.order = order->typed_data();
               SendTokens(launch, {.num_tokens = int(x.dimensions()[0]),
                                   .x = Bytes(x),
                                   .ids = ids.typed_data(),
                                   .weights = weighted ? weights.typed_data() : nullptr,
                                   .clean_ids = clean_ids->typed_data(),
                                   .invalid_ids = invalid_ids->typed_data(),
                                   .x_scales = ScalesOf(x, x_scales)});
             });
}

ffi::Error DispatchFinish(cudaStream_t stream, int32_t device, OpAttributes attributes, I32 ticket, Any /*after*/,
                          ffi::Result<Any> rows, ffi::Result<Any> scales, ffi::Result<F32> row_weights,
                          ffi::Result<I32> group_sizes, ffi::Result<I32> demand, ffi::Result<I32> row_of,
                          ffi::Result<I32> peers, ffi::Result<I32> dropped, ffi::Result<F32> order) {
  const ffi::DataType type = rows->element_type();  // of x, too, unless one of them is fp8
  const RowFormat format = MakeTokenFormat(attributes, type, type, rows->dimensions()[1]);
  const bool weighted = attributes.weighted != 0;
  const Sizes sizes = HandleSizes(*row_of, group_sizes->dimensions()[0]);
  return Run(device, stream, "jax_nixlep.dispatch_finish", Tag(OpKind::kDispatch, attributes, format, weighted), format,
             0, sizes, [&](Launch launch) {
               launch.ticket = Ticket(ticket);
               launch.order = order->typed_data();
               ReceiveTokens(launch, {.num_rows = rows->dimensions()[0],
                                      .weighted = weighted,
                                      .rows = Bytes(*rows),
                                      .scales = OrNull<std::byte>(*scales),
                                      .row_weights = row_weights->typed_data(),
                                      .group_sizes = group_sizes->typed_data(),
                                      .demand = demand->typed_data(),
                                      .row_of = row_of->typed_data(),
                                      .peers = peers->typed_data(),
                                      .dropped = dropped->typed_data()});
             });
}

ffi::Error Redispatch(cudaStream_t stream, int32_t device, OpAttributes attributes, Any x, F32 weights, I32 ids,
                      I32 row_of, Any /*after*/, ffi::Result<Any> rows, ffi::Result<F32> row_weights,
                      ffi::Result<F32> order) {
  const RowFormat format = MakeFormat(attributes, x.element_type(), x.dimensions()[1]);
  const bool weighted = attributes.weighted != 0;
  return Run(device, stream, "jax_nixlep.redispatch", Tag(OpKind::kRedispatch, attributes, format, weighted), format,
             ids.dimensions()[0], HandleSizes(row_of), [&](Launch launch) {
               SendTokens(launch, {.num_tokens = int(ids.dimensions()[0]),
                                   .x = Bytes(x),
                                   .ids = ids.typed_data(),
                                   .weights = weighted ? weights.typed_data() : nullptr});
               launch.order = order->typed_data();
               ReceiveAlong(launch, {.num_rows = rows->dimensions()[0],
                                     .row_of = row_of.typed_data(),
                                     .rows = Bytes(*rows),
                                     .row_weights = weighted ? row_weights->typed_data() : nullptr});
             });
}

ffi::Error Combine(cudaStream_t stream, int32_t device, OpAttributes attributes, Any rows, F32 row_weights,
                   F32 row_scalars, I32 row_of, Any /*after*/, ffi::Result<Any> y, ffi::Result<F32> scalars,
                   ffi::Result<F32> order) {
  const RowFormat format = MakeFormat(attributes, rows.element_type(), rows.dimensions()[1]);
  const int64_t tokens = y->dimensions()[0];
  return Run(device, stream, "jax_nixlep.combine", Tag(OpKind::kCombine, attributes, format, attributes.weighted),
             format, tokens, HandleSizes(row_of), [&](Launch launch) {
               SendSums(launch, {.num_tokens = int(tokens),
                                 .num_rows = rows.dimensions()[0],
                                 .rows = Bytes(rows),
                                 .row_weights = row_weights.typed_data(),
                                 .row_scalars = attributes.weighted ? row_scalars.typed_data() : nullptr,
                                 .row_of = row_of.typed_data()});
               launch.order = order->typed_data();
               ReceiveSums(launch, {.num_tokens = int(tokens),
                                    .y = Bytes(*y),
                                    .scalars = attributes.weighted ? scalars->typed_data() : nullptr});
             });
}

ffi::Error CombineStart(cudaStream_t stream, int32_t device, OpAttributes attributes, Any rows, F32 row_weights,
                        I32 row_of, Any /*after*/, ffi::Result<I32> ticket, ffi::Result<F32> order) {
  const RowFormat format = MakeFormat(attributes, rows.element_type(), rows.dimensions()[1]);
  return Run(device, stream, "jax_nixlep.combine_start", Tag(OpKind::kCombine, attributes, format, false), format, 0,
             HandleSizes(row_of), [&](Launch launch) {
               launch.ticket = Ticket(*ticket);
               launch.order = order->typed_data();
               SendSums(launch, {.num_rows = rows.dimensions()[0],
                                 .rows = Bytes(rows),
                                 .row_weights = row_weights.typed_data(),
                                 .row_of = row_of.typed_data()});
             });
}

ffi::Error CombineFinish(cudaStream_t stream, int32_t device, OpAttributes attributes, I32 ticket, Any /*after*/,
                         ffi::Result<Any> y, ffi::Result<F32> order) {
  const RowFormat format = MakeFormat(attributes, y->element_type(), y->dimensions()[1]);
  const int64_t tokens = y->dimensions()[0];
  return Run(device, stream, "jax_nixlep.combine_finish", Tag(OpKind::kCombine, attributes, format, false), format,
             tokens, {}, [&](Launch launch) {
               launch.ticket = Ticket(ticket);
               launch.order = order->typed_data();
               ReceiveSums(launch, {.num_tokens = int(tokens), .y = Bytes(*y)});
             });
}

// For measurements: the time at which the stream comes to a place of the program.
cudaEvent_t& MarkEvent(int index) {
  static std::map<int, cudaEvent_t> events;
  cudaEvent_t& event = events[index];
  if (!event) cudaEventCreate(&event);
  return event;
}

ffi::Error Mark(cudaStream_t stream, int64_t index, Any /*after*/, ffi::Result<F32> order) {
  const cudaError_t status = cudaEventRecord(MarkEvent(int(index)), stream);
  (void)order;  // an edge only
  return status == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(status));
}

constexpr auto kTraits = ffi::Traits::kCmdBufferCompatible;

}  // namespace

uint64_t NumLaunches() { return num_launches; }

double ElapsedUs(int from, int to) {
  float ms = 0;
  return cudaEventElapsedTime(&ms, MarkEvent(from), MarkEvent(to)) == cudaSuccess ? double(ms) * 1e3 : -1;
}

}  // namespace jax_nixlep::cuda

namespace ffi = xla::ffi;
namespace gpu = jax_nixlep::cuda;
using jax_nixlep::OpAttributes;

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxNixlepDispatchCuda, gpu::Dispatch,
                              ffi::Ffi::Bind()
                                  .Ctx<gpu::Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attrs<OpAttributes>()
                                  .Arg<gpu::Any>()   // x [t, H]
                                  .Arg<gpu::Any>()   // scales [t, H / 128] of an fp8 x, or [0]
                                  .Arg<gpu::I32>()   // expert_ids [t, K]
                                  .Arg<gpu::F32>()   // weights [t, K], or [0]: ones
                                  .Arg<gpu::Any>()   // after
                                  .Ret<gpu::Any>()   // tokens [C, H]
                                  .Ret<gpu::Any>()   // scales [C, H / 128], or [C, 0]
                                  .Ret<gpu::F32>()   // row_weights [C]
                                  .Ret<gpu::I32>()   // group_sizes [E]
                                  .Ret<gpu::I32>()   // demand [E]
                                  .Ret<gpu::I32>()   // clean ids [t, K]
                                  .Ret<gpu::I32>()   // row_of [R, T, K]
                                  .Ret<gpu::I32>()   // peers [R]
                                  .Ret<gpu::I32>()   // dropped []
                                  .Ret<gpu::I32>()   // invalid_ids []
                                  .Ret<gpu::F32>(),  // order []
                              {gpu::kTraits});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxNixlepDispatchStartCuda, gpu::DispatchStart,
                              ffi::Ffi::Bind()
                                  .Ctx<gpu::Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attrs<OpAttributes>()
                                  .Arg<gpu::Any>()   // x [t, H]
                                  .Arg<gpu::Any>()   // scales [t, H / 128] of an fp8 x, or [0]
                                  .Arg<gpu::I32>()   // expert_ids [t, K]
                                  .Arg<gpu::F32>()   // weights [t, K], or [0]: ones
                                  .Arg<gpu::Any>()   // after
                                  .Ret<gpu::I32>()   // clean ids [t, K]
                                  .Ret<gpu::I32>()   // invalid_ids []
                                  .Ret<gpu::I32>()   // ticket [2]
                                  .Ret<gpu::F32>(),  // order []
                              {gpu::kTraits});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxNixlepDispatchFinishCuda, gpu::DispatchFinish,
                              ffi::Ffi::Bind()
                                  .Ctx<gpu::Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attrs<OpAttributes>()
                                  .Arg<gpu::I32>()   // ticket [2]
                                  .Arg<gpu::Any>()   // after
                                  .Ret<gpu::Any>()   // tokens [C, H]
                                  .Ret<gpu::Any>()   // scales [C, H / 128], or [C, 0]
                                  .Ret<gpu::F32>()   // row_weights [C]
                                  .Ret<gpu::I32>()   // group_sizes [E]
                                  .Ret<gpu::I32>()   // demand [E]
                                  .Ret<gpu::I32>()   // row_of [R, T, K]
                                  .Ret<gpu::I32>()   // peers [R]
                                  .Ret<gpu::I32>()   // dropped []
                                  .Ret<gpu::F32>(),  // order []
                              {gpu::kTraits});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxNixlepRedispatchCuda, gpu::Redispatch,
                              ffi::Ffi::Bind()
                                  .Ctx<gpu::Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attrs<OpAttributes>()
                                  .Arg<gpu::Any>()   // x [t, H], H may be 0
                                  .Arg<gpu::F32>()   // weights [t, K], or [0]
                                  .Arg<gpu::I32>()   // expert_ids [t, K]
                                  .Arg<gpu::I32>()   // row_of [R, T, K]
                                  .Arg<gpu::Any>()   // after
                                  .Ret<gpu::Any>()   // tokens [C, H]
                                  .Ret<gpu::F32>()   // row_weights [C], or [0]
                                  .Ret<gpu::F32>(),  // order []
                              {gpu::kTraits});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxNixlepCombineCuda, gpu::Combine,
                              ffi::Ffi::Bind()
                                  .Ctx<gpu::Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attrs<OpAttributes>()
                                  .Arg<gpu::Any>()   // expert_out [C, H], H may be 0
                                  .Arg<gpu::F32>()   // row_weights [C]
                                  .Arg<gpu::F32>()   // row_scalars [C], or [0]
                                  .Arg<gpu::I32>()   // row_of [R, T, K]
                                  .Arg<gpu::Any>()   // after
                                  .Ret<gpu::Any>()   // y [t, H]
                                  .Ret<gpu::F32>()   // scalars [t, K], or [0]
                                  .Ret<gpu::F32>(),  // order []
                              {gpu::kTraits});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxNixlepCombineStartCuda, gpu::CombineStart,
                              ffi::Ffi::Bind()
                                  .Ctx<gpu::Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attrs<OpAttributes>()
                                  .Arg<gpu::Any>()   // expert_out [C, H]
                                  .Arg<gpu::F32>()   // row_weights [C]
                                  .Arg<gpu::I32>()   // row_of [R, T, K]
                                  .Arg<gpu::Any>()   // after
                                  .Ret<gpu::I32>()   // ticket [2]
                                  .Ret<gpu::F32>(),  // order []
                              {gpu::kTraits});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxNixlepCombineFinishCuda, gpu::CombineFinish,
                              ffi::Ffi::Bind()
                                  .Ctx<gpu::Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attrs<OpAttributes>()
                                  .Arg<gpu::I32>()   // ticket [2]
                                  .Arg<gpu::Any>()   // after
                                  .Ret<gpu::Any>()   // y [t, H]
                                  .Ret<gpu::F32>(),  // order []
                              {gpu::kTraits});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxNixlepMarkCuda, gpu::Mark,
                              ffi::Ffi::Bind()
                                  .Ctx<gpu::Stream>()
                                  .Attr<int64_t>("index")
                                  .Arg<gpu::Any>()    // after
                                  .Ret<gpu::F32>());  // order []
