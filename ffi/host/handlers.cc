// XLA's face of the operations: unpacks buffers and attributes, checks them, calls host/ops.h.
#include "host/handlers.h"

#include <string>

#include "attributes.h"
#include "host/ops.h"
#include "registry.h"

namespace jax_nixlep {
namespace {

namespace ffi = xla::ffi;

using I32 = ffi::Buffer<ffi::S32>;
using F32 = ffi::Buffer<ffi::F32>;
using Any = ffi::AnyBuffer;

// Runs one operation on the endpoint of `device`; whatever goes wrong becomes an error of the XLA program.
template <typename Function>
ffi::Error Run(int32_t device, const char* op, const RowFormat& format, const Sizes& sizes, Function function) {
  try {
    std::shared_ptr<Endpoint> endpoint = RegistryOf<Endpoint>::Get().Find(device);
    if (!endpoint) {
      return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                        std::string(op) + ": device " + std::to_string(device) +
                            " must belong to a group; got none; call jax_nixlep.initialize on this process first");
    }
    if (int64_t(format.wire_bytes()) > endpoint->capacity().row_bytes) {
      return ffi::Error::InvalidArgument(std::string(op) + ": a row must fit the group's rows of " +
                                         std::to_string(endpoint->capacity().row_bytes) + " bytes; got " +
                                         std::to_string(format.wire_bytes()) + "; initialize with this config");
    }
    if (!sizes.Fit(endpoint->capacity())) return SizesDiffer(op);
    function(*endpoint);
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kAborted, error.what());
  }
}

template <typename Buffer>
std::byte* Bytes(Buffer&& buffer) {
  return static_cast<std::byte*>(buffer.untyped_data());
}

ffi::Error DispatchHandler(int32_t device, OpAttributes attributes, Any x, Any x_scales, I32 ids, F32 weights,
                           Any /*after*/, ffi::Result<Any> rows, ffi::Result<Any> scales, ffi::Result<F32> row_weights,
                           ffi::Result<I32> group_sizes, ffi::Result<I32> demand, ffi::Result<I32> clean_ids,
                           ffi::Result<I32> row_of, ffi::Result<I32> peers, ffi::Result<I32> dropped,
                           ffi::Result<I32> invalid_ids, ffi::Result<F32> order) {
  DispatchArgs args{.format = MakeTokenFormat(attributes, x.element_type(), rows->element_type(), x.dimensions()[1]),
                    .ordinal = uint32_t(attributes.ordinal),
                    .num_tokens = int(x.dimensions()[0]),
                    .num_rows = rows->dimensions()[0],
                    .x = Bytes(x),
                    .x_scales = ScalesOf(x, x_scales),
                    .ids = ids.typed_data(),
                    .weights = attributes.weighted ? weights.typed_data() : nullptr,
                    .rows = Bytes(*rows),
                    .scales = scales->element_count() ? Bytes(*scales) : nullptr,
                    .row_weights = row_weights->typed_data(),
                    .group_sizes = group_sizes->typed_data(),
                    .demand = demand->typed_data(),
                    .clean_ids = clean_ids->typed_data(),
                    .row_of = row_of->typed_data(),
                    .peers = peers->typed_data(),
                    .dropped = dropped->typed_data(),
                    .invalid_ids = invalid_ids->typed_data()};
  *order->typed_data() = 0;
  return Run(device, "dispatch", args.format, HandleSizes(*row_of, group_sizes->dimensions()[0]),
             [&](Endpoint& endpoint) { Dispatch(endpoint, args); });
}

ffi::Error RedispatchHandler(int32_t device, OpAttributes attributes, Any x, F32 weights, I32 ids, I32 row_of,
                             Any /*after*/, ffi::Result<Any> rows, ffi::Result<F32> row_weights,
                             ffi::Result<F32> order) {
  RedispatchArgs args{.format = MakeFormat(attributes, x.element_type(), x.dimensions()[1]),
                      .ordinal = uint32_t(attributes.ordinal),
                      .num_tokens = int(ids.dimensions()[0]),
                      .num_rows = rows->dimensions()[0],
                      .x = Bytes(x),
                      .weights = attributes.weighted ? weights.typed_data() : nullptr,
                      .ids = ids.typed_data(),
                      .row_of = row_of.typed_data(),
                      .rows = Bytes(*rows),
                      .row_weights = attributes.weighted ? row_weights->typed_data() : nullptr};
  *order->typed_data() = 0;
  return Run(device, "dispatch", args.format, HandleSizes(row_of),
             [&](Endpoint& endpoint) { Redispatch(endpoint, args); });
}

ffi::Error CombineHandler(int32_t device, OpAttributes attributes, Any rows, F32 row_weights, F32 row_scalars,
                          I32 row_of, Any /*after*/, ffi::Result<Any> y, ffi::Result<F32> scalars,
                          ffi::Result<F32> order) {
  CombineArgs args{.format = MakeFormat(attributes, rows.element_type(), rows.dimensions()[1]),
                   .ordinal = uint32_t(attributes.ordinal),
                   .num_tokens = int(y->dimensions()[0]),
                   .num_rows = rows.dimensions()[0],
                   .rows = Bytes(rows),
                   .row_weights = row_weights.typed_data(),
                   .row_scalars = attributes.weighted ? row_scalars.typed_data() : nullptr,
                   .row_of = row_of.typed_data(),
                   .y = Bytes(*y),
                   .scalars = attributes.weighted ? scalars->typed_data() : nullptr};
  *order->typed_data() = 0;
  return Run(device, "combine", args.format, HandleSizes(row_of), [&](Endpoint& endpoint) { Combine(endpoint, args); });
}

}  // namespace

}  // namespace jax_nixlep

namespace ffi = xla::ffi;
using jax_nixlep::Any, jax_nixlep::F32, jax_nixlep::I32, jax_nixlep::OpAttributes;

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxNixlepDispatchCpu, jax_nixlep::DispatchHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attrs<OpAttributes>()
                                  .Arg<Any>()    // x [t, H]
                                  .Arg<Any>()    // scales [t, H / 128] of an fp8 x, or [0]
                                  .Arg<I32>()    // expert_ids [t, K]
                                  .Arg<F32>()    // weights [t, K], or [0]: ones
                                  .Arg<Any>()    // after
                                  .Ret<Any>()    // tokens [C, H]
                                  .Ret<Any>()    // scales [C, H / 128], or [C, 0]
                                  .Ret<F32>()    // row_weights [C]
                                  .Ret<I32>()    // group_sizes [E]
                                  .Ret<I32>()    // demand [E]
                                  .Ret<I32>()    // clean ids [t, K]
                                  .Ret<I32>()    // row_of [R, T, K]
                                  .Ret<I32>()    // peers [R]
                                  .Ret<I32>()    // dropped []
                                  .Ret<I32>()    // invalid_ids []
                                  .Ret<F32>());  // order []: always 0; a later operation that takes it runs later

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxNixlepRedispatchCpu, jax_nixlep::RedispatchHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attrs<OpAttributes>()
                                  .Arg<Any>()    // x [t, H], H may be 0
                                  .Arg<F32>()    // weights [t, K], or [0]
                                  .Arg<I32>()    // expert_ids [t, K]
                                  .Arg<I32>()    // row_of [R, T, K]
                                  .Arg<Any>()    // after
                                  .Ret<Any>()    // tokens [C, H]
                                  .Ret<F32>()    // row_weights [C], or [0]
                                  .Ret<F32>());  // order []

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxNixlepCombineCpu, jax_nixlep::CombineHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attrs<OpAttributes>()
                                  .Arg<Any>()    // expert_out [C, H], H may be 0
                                  .Arg<F32>()    // row_weights [C]
                                  .Arg<F32>()    // row_scalars [C], or [0]
                                  .Arg<I32>()    // row_of [R, T, K]
                                  .Arg<Any>()    // after
                                  .Ret<Any>()    // y [t, H]
                                  .Ret<F32>()    // scalars [t, K], or [0]
                                  .Ret<F32>());  // order []
