// The static part of an operation, as the custom calls of every platform get it.
#pragma once

#include <string>

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

// Of tokens that come as `x` and leave as `rows`. Either may be fp8 already, which is no token type: an fp8 wire then
// needs none.
inline RowFormat MakeTokenFormat(const OpAttributes& attributes, xla::ffi::DataType x, xla::ffi::DataType rows,
                                 int64_t hidden) {
  RowFormat format = MakeFormat(attributes, x == xla::ffi::F8E4M3FN ? rows : x, hidden);
  format.dequantize = rows != xla::ffi::F8E4M3FN;
  return format;
}

// The operand `scales` if `x` came with them, else null.
inline const std::byte* ScalesOf(const xla::ffi::AnyBuffer& x, const xla::ffi::AnyBuffer& scales) {
  return x.element_type() == xla::ffi::F8E4M3FN ? static_cast<const std::byte*>(scales.untyped_data()) : nullptr;
}

// Sizes of arrays that must be the group's; -1: none to check. A program may have been traced for another group.
struct Sizes {
  int64_t top_k = -1, experts = -1, ranks = -1, tokens = -1;

  bool Fit(const Capacity& group) const {
    auto fits = [](int64_t got, int64_t want) { return got < 0 || got == want; };
    return fits(top_k, group.top_k) && fits(experts, group.experts_per_rank) && fits(ranks, group.max_ranks) &&
           fits(tokens, group.max_tokens);
  }
};

inline Sizes HandleSizes(const xla::ffi::Buffer<xla::ffi::S32>& row_of, int64_t experts = -1) {
  auto dims = row_of.dimensions();
  return {.top_k = dims[2], .experts = experts, .ranks = dims[0], .tokens = dims[1]};
}

inline xla::ffi::Error SizesDiffer(const char* op) {
  return xla::ffi::Error::InvalidArgument(std::string(op) + ": the arrays must have the sizes of the group's config; " +
                                          "initialize with the config that the program uses");
}

}  // namespace jax_nixlep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_nixlep::OpAttributes, xla::ffi::StructMember<int64_t>("ordinal"),
                                      xla::ffi::StructMember<int64_t>("wire"),
                                      xla::ffi::StructMember<int64_t>("scale_format"),
                                      xla::ffi::StructMember<int64_t>("round_scale"),
                                      xla::ffi::StructMember<int64_t>("weighted"));
