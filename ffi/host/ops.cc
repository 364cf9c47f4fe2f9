#include "host/ops.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <span>
#include <vector>

namespace jax_nixlep {
namespace {

template <typename Function>
void WithTokenType(TokenType type, Function function) {
  switch (type) {
    case TokenType::kFloat32:
      return function(float{});
    case TokenType::kBfloat16:
      return function(bfloat16{});
    case TokenType::kFloat16:
      return function(float16{});
  }
}

template <typename T>
void EncodeRow(const RowFormat& format, std::byte* wire, const T* x) {
  const size_t n = size_t(format.hidden);
  if (format.wire == Wire::kFp8) {
    Quantize(reinterpret_cast<uint8_t*>(wire), wire + format.value_bytes(), x, n, format.fp8);
    return;
  }
  if constexpr (!std::is_same_v<T, bfloat16>) {
    if (format.wire == Wire::kBf16) return Convert(reinterpret_cast<bfloat16*>(wire), x, n);
  }
  std::memcpy(wire, x, n * sizeof(T));
}

template <typename T>
void DecodeRow(const RowFormat& format, std::byte* row, std::byte* scales, const std::byte* wire) {
  const size_t n = size_t(format.hidden);
  if (format.wire == Wire::kFp8) {
    if (format.dequantize) {
      return Dequantize(reinterpret_cast<T*>(row), reinterpret_cast<const uint8_t*>(wire), wire + format.value_bytes(),
                        n, format.fp8);
    }
    std::memcpy(row, wire, n);
    std::memcpy(scales, wire + format.value_bytes(), format.scale_bytes());
    return;
  }
  if constexpr (!std::is_same_v<T, bfloat16>) {
    if (format.wire == Wire::kBf16) {
      return Convert(reinterpret_cast<T*>(row), reinterpret_cast<const bfloat16*>(wire), n);
    }
  }
  std::memcpy(row, wire, n * sizeof(T));
}

bool RoutesTo(const int32_t* ids, int top_k, int rank, int experts_per_rank) {
  return std::any_of(ids, ids + top_k, [&](int32_t id) { return id >= 0 && id / experts_per_rank == rank; });
}

// Writes this rank's tokens and tables into its message and tells every peer. `x_scales`: of tokens that are fp8
// already.
void SendTokens(Operation& op, const Capacity& capacity, const RowFormat& format, int num_tokens, const std::byte* x,
                const std::byte* x_scales, const int32_t* ids, bool send_ids, const float* weights) {
  const int top_k = capacity.top_k;
  const Message message = op.outgoing(op.rank());
  const size_t table_bytes = size_t(num_tokens) * top_k * sizeof(int32_t);
  if (send_ids) std::memcpy(message.first(), ids, table_bytes);
  if (weights) std::memcpy(message.second(), weights, table_bytes);
  if (x_scales) {
    const size_t value_bytes = format.value_bytes(), scale_bytes = format.scale_bytes();
    for (int t = 0; t < num_tokens; ++t) {
      std::memcpy(message.row(t), x + t * value_bytes, value_bytes);
      std::memcpy(message.row(t) + value_bytes, x_scales + t * scale_bytes, scale_bytes);
    }
  } else if (format.hidden) {
    WithTokenType(format.type, [&](auto type) {
      auto* tokens = reinterpret_cast<const decltype(type)*>(x);
      for (int t = 0; t < num_tokens; ++t) EncodeRow(format, message.row(t), tokens + t * format.hidden);
    });
  }
  for (int i = 1; i <= op.max_ranks(); ++i) {
    const int to = (op.rank() + i) % op.max_ranks();  // not all the same peer first
    op.Publish(to, send_ids ? table_bytes : 0, weights ? table_bytes : 0, format.wire_bytes(),
               [&](int t) { return RoutesTo(ids + t * top_k, top_k, to, capacity.experts_per_rank); });
  }
}

// Copies the token of `message` into each of the distinct rows that its choices name.
template <typename T>
void TakeToken(const RowFormat& format, const Message& message, int token, const int32_t* row_of, int top_k,
               std::byte* rows, std::byte* scales) {
  for (int k = 0; k < top_k; ++k) {
    const int32_t row = row_of[k];
    if (row < 0 || std::find(row_of, row_of + k, row) != row_of + k) continue;
    DecodeRow<T>(format, rows + size_t(row) * format.row_bytes(), scales + size_t(row) * format.scale_bytes(),
                 message.row(token));
  }
}

// The most rows each expert may keep when only `capacity` fit: an equal limit, the remainder to the first experts.
std::vector<int32_t> FairLimits(const std::vector<int32_t>& demand, int64_t capacity) {
  std::vector<int32_t> limits(demand), sorted(demand);
  if (std::accumulate(demand.begin(), demand.end(), int64_t(0)) <= capacity) return limits;
  std::sort(sorted.begin(), sorted.end());
  int64_t left = capacity, limit = 0;
  for (size_t i = 0; i < sorted.size(); ++i) {
    limit = left / int64_t(sorted.size() - i);
    if (sorted[i] > limit) {
      left -= limit * int64_t(sorted.size() - i);
      break;
    }
    left -= sorted[i];
  }
  for (size_t e = 0; e < demand.size(); ++e) {
    if (demand[e] <= limit) continue;
    limits[e] = int32_t(limit) + (left > 0);
    left -= left > 0;
  }
  return limits;
}

constexpr size_t kLarge = 1 << 18;

// The whole pages of a large piece of memory; empty if it is not worth a system call.
std::span<std::byte> WholePages(std::byte* data, size_t num_bytes) {
  static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + num_bytes) / page * page;
  if (num_bytes < kLarge || first >= last) return {};
  return {reinterpret_cast<std::byte*>(first), size_t(last - first)};
}

// Zeroes private memory, as XLA's buffers are. Pages that are given back to the kernel are zero when they are next
// touched: a worst-case buffer is mostly padding, and writing that would cost more than all else in a dispatch.
void Zero(std::byte* data, size_t num_bytes) {
  const std::span<std::byte> pages = WholePages(data, num_bytes);
  if (pages.empty() || madvise(pages.data(), pages.size(), MADV_DONTNEED) != 0) {
    std::memset(data, 0, num_bytes);
    return;
  }
  std::byte* const rest = pages.data() + pages.size();
  std::memset(data, 0, size_t(pages.data() - data));
  std::memset(rest, 0, size_t(data + num_bytes - rest));
}

// Memory that is about to be written gets its pages in one call instead of one fault each; without the call it still
// does.
void Populate([[maybe_unused]] std::byte* data, [[maybe_unused]] size_t num_bytes) {
#ifdef MADV_POPULATE_WRITE
  const std::span<std::byte> pages = WholePages(data, num_bytes);
  if (!pages.empty()) madvise(pages.data(), pages.size(), MADV_POPULATE_WRITE);
#endif
}

void CheckHandle(const int32_t* row_of, size_t count, int64_t num_rows, const char* op) {
  const auto bad = [&](int32_t row) { return row < -1 || row >= num_rows; };
  if (std::any_of(row_of, row_of + count, bad)) {
    throw EpError(std::string(op) + ": handle must be the one dispatch returned; got rows outside [-1, " +
                  std::to_string(num_rows) + "); pass received.handle unchanged");
  }
}

}  // namespace

void Dispatch(Endpoint& endpoint, const DispatchArgs& a) {
  const Capacity& capacity = endpoint.capacity();
  const int R = capacity.max_ranks, E = capacity.experts_per_rank, T = capacity.max_tokens, K = capacity.top_k;
  const RowFormat& format = a.format;

  *a.invalid_ids = 0;
  for (int i = 0; i < a.num_tokens * K; ++i) {
    const bool slot = a.ids[i] >= 0 && a.ids[i] < R * E;
    *a.invalid_ids += !slot && a.ids[i] != -1;
    a.clean_ids[i] = slot ? a.ids[i] : -1;
  }
  endpoint.invalid_ids += uint64_t(*a.invalid_ids);

  Operation op(endpoint, {OpKind::kDispatch, a.ordinal, format.Digest(a.weights)}, a.num_tokens, /*broadcast=*/true);
  SendTokens(op, capacity, format, a.num_tokens, a.x, a.x_scales, a.clean_ids, /*send_ids=*/true, a.weights);
  for (int r = 0; r < R; ++r) op.Wait(r);
  for (int r = 0; r < R; ++r) a.peers[r] = int32_t(op.state(r));  // a wait for one may show that another is gone

  // Pass 1: local expert of each choice (as -2 - expert until rows are known), and how many rows each expert wants.
  std::vector<int32_t> demand(E, 0);
  std::fill_n(a.row_of, size_t(R) * T * K, -1);
  for (int r = 0; r < R; ++r) {
    if (!op.live(r)) continue;
    const int32_t* ids = op.incoming(r).first();
    for (int t = 0; t < op.num_tokens(r); ++t, ids += K) {
      int32_t* choices = a.row_of + (size_t(r) * T + t) * K;
      for (int k = 0; k < K; ++k) {
        const int64_t expert = int64_t(ids[k]) - int64_t(op.rank()) * E;
        if (expert < 0 || expert >= E) continue;
        const int32_t mark = -2 - int32_t(expert);
        if (std::find(choices, choices + k, mark) == choices + k) ++demand[expert];
        choices[k] = mark;
      }
    }
  }
  const std::vector<int32_t> kept = FairLimits(demand, a.num_rows);
  std::vector<int32_t> next(E), end(E);
  std::exclusive_scan(kept.begin(), kept.end(), next.begin(), 0);
  std::inclusive_scan(kept.begin(), kept.end(), end.begin());
  const int64_t used = end.back();
  std::copy(demand.begin(), demand.end(), a.demand);
  std::copy(kept.begin(), kept.end(), a.group_sizes);
  *a.dropped = int32_t(std::accumulate(demand.begin(), demand.end(), int64_t(0)) - used);
  endpoint.dropped_rows += uint64_t(*a.dropped);

  // Pass 2: give out the rows and copy the tokens, one read each.
  Populate(a.rows, size_t(used) * format.row_bytes());
  std::fill_n(a.row_weights, a.num_rows, 0.0f);
  WithTokenType(format.type, [&](auto type) {
    for (int r = 0; r < R; ++r) {
      if (!op.live(r)) continue;
      const Message message = op.incoming(r);
      uint64_t taken = 0;
      for (int t = 0; t < op.num_tokens(r); ++t) {
        int32_t* choices = a.row_of + (size_t(r) * T + t) * K;
        for (int k = 0; k < K; ++k) {
          if (choices[k] >= -1) continue;  // not here, or the repetition of an earlier choice
          const int32_t mark = choices[k], expert = -2 - mark;
          const int32_t row = next[expert] < end[expert] ? next[expert]++ : -1;
          for (int j = k; j < K; ++j) {
            if (choices[j] != mark) continue;
            choices[j] = row;
            if (row >= 0 && a.weights) a.row_weights[row] += message.second()[t * K + j];
          }
          if (row >= 0 && !a.weights) a.row_weights[row] = 1;
        }
        if (std::all_of(choices, choices + K, [](int32_t row) { return row < 0; })) continue;
        TakeToken<decltype(type)>(format, message, t, choices, K, a.rows, a.scales);
        ++taken;
      }
      op.CountBytesIn(r, taken * format.wire_bytes());
    }
  });
  op.Finish();
  Zero(a.rows + size_t(used) * format.row_bytes(), size_t(a.num_rows - used) * format.row_bytes());
  if (a.scales) {
    std::memset(a.scales + size_t(used) * format.scale_bytes(), 0, size_t(a.num_rows - used) * format.scale_bytes());
  }
}

void Redispatch(Endpoint& endpoint, const RedispatchArgs& a) {
  const Capacity& capacity = endpoint.capacity();
  const int R = capacity.max_ranks, T = capacity.max_tokens, K = capacity.top_k;
  const RowFormat& format = a.format;
  CheckHandle(a.row_of, size_t(R) * T * K, a.num_rows, "dispatch along a handle");

  Operation op(endpoint, {OpKind::kRedispatch, a.ordinal, format.Digest(a.weights)}, a.num_tokens, /*broadcast=*/true);
  SendTokens(op, capacity, format, a.num_tokens, a.x, nullptr, a.ids, /*send_ids=*/false, a.weights);
  std::vector<char> filled(size_t(a.num_rows), 0);
  if (a.row_weights) std::fill_n(a.row_weights, a.num_rows, 0.0f);
  WithTokenType(format.type, [&](auto type) {
    for (int r = 0; r < R; ++r) {
      if (op.Wait(r) != PeerState::kOk) continue;
      const Message message = op.incoming(r);
      uint64_t taken = 0;
      for (int t = 0; t < op.num_tokens(r); ++t) {
        const int32_t* choices = a.row_of + (size_t(r) * T + t) * K;
        if (std::all_of(choices, choices + K, [](int32_t row) { return row < 0; })) continue;
        for (int k = 0; k < K; ++k) {
          if (choices[k] < 0) continue;
          filled[choices[k]] = 1;
          if (a.row_weights) a.row_weights[choices[k]] += message.second()[t * K + k];
        }
        if (format.hidden) TakeToken<decltype(type)>(format, message, t, choices, K, a.rows, nullptr);
        ++taken;
      }
      op.CountBytesIn(r, taken * format.wire_bytes());
    }
  });
  op.Finish();
  const int64_t used = std::find(filled.rbegin(), filled.rend(), 1).base() - filled.begin();
  for (int64_t row = 0; row < used; ++row) {
    if (!filled[row]) std::memset(a.rows + size_t(row) * format.row_bytes(), 0, format.row_bytes());
  }
  Zero(a.rows + size_t(used) * format.row_bytes(), size_t(a.num_rows - used) * format.row_bytes());
}

void Combine(Endpoint& endpoint, const CombineArgs& a) {
  const Capacity& capacity = endpoint.capacity();
  const int R = capacity.max_ranks, T = capacity.max_tokens, K = capacity.top_k;
  const RowFormat& format = a.format;
  const size_t H = size_t(format.hidden);
  CheckHandle(a.row_of, size_t(R) * T * K, a.num_rows, "combine");

  Operation op(endpoint, {OpKind::kCombine, a.ordinal, format.Digest(a.row_scalars)}, a.num_tokens,
               /*broadcast=*/false);
  std::vector<const std::byte*> summands(size_t(std::max(K, R)));
  std::vector<float> weights(summands.size());
  WithTokenType(format.type, [&](auto type) {
    using T_ = decltype(type);
    for (int i = 1; i <= R; ++i) {
      const int to = (op.rank() + i) % R;
      if (!op.live(to)) continue;
      const Message message = op.outgoing(to);
      for (int t = 0; t < T; ++t) {
        const int32_t* choices = a.row_of + (size_t(to) * T + t) * K;
        bool present = false;
        int count = 0;
        for (int k = 0; k < K; ++k) {
          const int32_t row = choices[k];
          if (a.row_scalars) message.second()[t * K + k] = row < 0 ? 0.0f : a.row_scalars[row];
          if (row < 0) continue;
          present = true;
          if (std::find(choices, choices + k, row) != choices + k) continue;
          summands[count] = a.rows + size_t(row) * H * sizeof(T_);
          weights[count++] = a.row_weights[row];
        }
        message.first()[t] = present;
        if (!present || !H) continue;
        if (format.wire == Wire::kBf16) {
          WeightedSum<T_>(reinterpret_cast<bfloat16*>(message.row(t)), summands.data(), weights.data(), count, H);
        } else {
          WeightedSum<T_>(reinterpret_cast<T_*>(message.row(t)), summands.data(), weights.data(), count, H);
        }
      }
      op.Publish(to, size_t(T) * sizeof(int32_t), a.row_scalars ? size_t(T) * K * sizeof(float) : 0,
                 format.wire_bytes(), [&](int t) { return message.first()[t] != 0; });
    }
  });

  for (int r = 0; r < R; ++r) op.Wait(r);
  std::fill(weights.begin(), weights.end(), 1.0f);
  if (a.scalars) std::fill_n(a.scalars, size_t(a.num_tokens) * K, 0.0f);
  std::vector<uint64_t> taken(R);
  for (int t = 0; t < a.num_tokens; ++t) {
    int count = 0;
    for (int r = 0; r < R; ++r) {
      if (!op.live(r)) continue;
      const Message message = op.incoming(r);
      if (!message.first()[t]) continue;
      ++taken[r];
      for (int k = 0; a.scalars && k < K; ++k) a.scalars[t * K + k] += message.second()[t * K + k];
      summands[count++] = message.row(t);
    }
    WithTokenType(format.type, [&](auto type) {
      using T_ = decltype(type);
      T_* y = reinterpret_cast<T_*>(a.y) + size_t(t) * H;
      if (format.wire == Wire::kBf16) {
        WeightedSum<bfloat16>(y, summands.data(), weights.data(), count, H);
      } else {
        WeightedSum<T_>(y, summands.data(), weights.data(), count, H);
      }
    });
  }
  for (int r = 0; r < R; ++r) op.CountBytesIn(r, taken[r] * format.wire_bytes());
  op.Finish();
}

}  // namespace jax_nixlep
