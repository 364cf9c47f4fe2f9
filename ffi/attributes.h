// The static part of an operation, as the custom calls of every platform get it.
#pragma once

#include "runtime/format.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nixlep {

// jax_nixlep/_ffi.py builds the same names.
struct OpAttributes {
  int64_t ordinal;
  int64_t wire;
  int64_t scale_format;
  int64_t round_scale;
  int64_t weighted;  // weights (dispatch) or scalars (combine) travel; a rank without tokens has none to show
};

inline RowFormat MakeFormat(const OpAttributes& attributes, xla::ffi::DataType type, int64_t hidden) {
  RowFormat format;
  format.type = type == xla::ffi::F32    ? TokenType::kFloat32
                : type == xla::ffi::BF16 ? TokenType::kBfloat16
                                         : TokenType::kFloat16;
  format.wire = Wire(attributes.wire);
  format.fp8 = {ScaleFormat(attributes.scale_format), attributes.round_scale != 0};
  format.hidden = hidden;
  return format;
}

}  // namespace jax_nixlep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_nixlep::OpAttributes, xla::ffi::StructMember<int64_t>("ordinal"),
                                      xla::ffi::StructMember<int64_t>("wire"),
                                      xla::ffi::StructMember<int64_t>("scale_format"),
                                      xla::ffi::StructMember<int64_t>("round_scale"),
                                      xla::ffi::StructMember<int64_t>("weighted"));
