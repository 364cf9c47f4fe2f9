// The kernels alone, all ranks in one process on one GPU: microseconds of each phase, with the L2 cache evicted before.
// For tuning: what tests/gpu/phases.py measures through JAX and NIXL, without either.
//   nvcc -std=c++20 -arch=sm_90 -O3 -fmad=false --expt-relaxed-constexpr -Iffi -isystem UCX/include \
//       tests/gpu/kernel_phases.cu ffi/cuda/kernels.cu -o kernel_phases
//   ./kernel_phases RANKS TOKENS HIDDEN EXPERTS_PER_RANK TOP_K ITERATIONS FP8 CAPACITY_FACTOR
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/kernels.h"

using namespace jax_nixlep;
using namespace jax_nixlep::cuda;

#define CHECK(call)                                                                          \
  do {                                                                                       \
    cudaError_t status = (call);                                                             \
    if (status != cudaSuccess) {                                                             \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(status)); \
      std::exit(1);                                                                          \
    }                                                                                        \
  } while (0)

template <typename T = std::byte>
T* Allocate(size_t count) {
  void* p = nullptr;
  CHECK(cudaMalloc(&p, std::max<size_t>(1, count * sizeof(T))));
  CHECK(cudaMemset(p, 0, std::max<size_t>(1, count * sizeof(T))));
  return static_cast<T*>(p);
}

template <typename T>
T* Upload(const std::vector<T>& values) {
  T* p = Allocate<T>(values.size());
  CHECK(cudaMemcpy(p, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}

__global__ void Nothing() {}

struct Rank {
  Control* control;
  std::byte *region, *x, *rows, *scales, *y, *out;
  int32_t *ids, *clean_ids, *invalid, *group_sizes, *demand, *row_of, *peers, *dropped;
  float *weights, *row_weights, *order;
};

int main(int argc, char** argv) {
  const int R = std::atoi(argv[1]), T = std::atoi(argv[2]), H = std::atoi(argv[3]), E = std::atoi(argv[4]);
  const int K = std::atoi(argv[5]), iterations = std::atoi(argv[6]);
  const bool fp8 = std::atoi(argv[7]);
  const double factor = argc > 8 ? std::atof(argv[8]) : 1.25;
  const int64_t worst = int64_t(R) * T * std::min(K, E);
  const int64_t C = factor > 0 ? (int64_t(factor * T * K) + 127) / 128 * 128 : worst;
  Capacity capacity{R, E, T, K, int64_t(AlignUp(size_t(H) * 2))};
  const Layout layout{capacity};
  const Geometry geometry(layout);
  RowFormat format;
  format.type = TokenType::kBfloat16;
  format.wire = fp8 ? Wire::kFp8 : Wire::kSame;
  format.dequantize = !fp8;
  format.hidden = H;
  RowFormat sums = format;
  sums.wire = Wire::kSame;

  std::mt19937 random(1);
  std::vector<Rank> ranks(R);
  for (Rank& k : ranks) k.control = Allocate<Control>(1), k.region = Allocate(layout.num_bytes());
  FailureReport* report = nullptr;
  CHECK(cudaHostAlloc(&report, sizeof(*report), cudaHostAllocMapped));
  std::memset(report, 0, sizeof(*report));
  for (int r = 0; r < R; ++r) {
    Rank& k = ranks[r];
    DeviceState state{};
    state.region = k.region;
    state.scratch = Allocate(ScratchBytes(geometry));
    state.report = report;
    state.rank = r;
    state.active = 1;
    state.timeout_ns = 60'000'000'000;
    state.geometry = geometry;
    state.started = state.current = state.finished = uint64_t(1) << kEpochShift;
    for (int p = 0; p < R; ++p) state.peers[p] = {ranks[p].region, ranks[p].control, 0, 1, 0, 0};
    CHECK(cudaMemcpy(&k.control->state, &state, sizeof(state), cudaMemcpyHostToDevice));
    std::vector<uint16_t> x(size_t(T) * H), out(size_t(C) * H);
    for (auto& v : x) v = uint16_t(0x3F80 | (random() & 0x807F));
    for (auto& v : out) v = uint16_t(0x3F80 | (random() & 0x807F));
    std::vector<int32_t> ids, all(R * E);
    std::iota(all.begin(), all.end(), 0);
    for (int t = 0; t < T; ++t) {
      for (int i = 0; i < K; ++i) std::swap(all[i], all[i + random() % (R * E - i)]);
      ids.insert(ids.end(), all.begin(), all.begin() + K);
    }
    std::vector<float> weights(size_t(T) * K, 0.125f);
    k.x = reinterpret_cast<std::byte*>(Upload(x)), k.out = reinterpret_cast<std::byte*>(Upload(out));
    k.ids = Upload(ids), k.weights = Upload(weights);
    k.rows = Allocate(size_t(C) * H * 2), k.scales = Allocate(size_t(C) * H / 32), k.y = Allocate(size_t(T) * H * 2);
    k.clean_ids = Allocate<int32_t>(T * K), k.invalid = Allocate<int32_t>(1), k.group_sizes = Allocate<int32_t>(E);
    k.demand = Allocate<int32_t>(E), k.row_of = Allocate<int32_t>(size_t(R) * T * K), k.peers = Allocate<int32_t>(R);
    k.dropped = Allocate<int32_t>(1), k.row_weights = Allocate<float>(C), k.order = Allocate<float>(1);
  }
  int num_sms = 0;
  CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0));
  constexpr size_t kEvict = size_t(1) << 29;
  std::byte *flush = Allocate(kEvict), *sink = Allocate(kEvict);
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  auto timed = [&](auto launch) {
    CHECK(cudaMemcpyAsync(sink, flush, kEvict, cudaMemcpyDeviceToDevice, 0));
    CHECK(cudaEventRecord(begin));
    launch();
    CHECK(cudaEventRecord(end));
    CHECK(cudaDeviceSynchronize());
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    return double(ms) * 1e3;
  };
  auto median = [](std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
  };

  std::vector<std::vector<double>> samples(5);
  for (int i = 0; i < iterations + 2; ++i) {
    std::vector<std::vector<double>> now(5);
    auto launch_of = [&](Rank& k, const RowFormat& f, uint64_t tag) {
      Launch l;
      l.control = k.control, l.region = k.region, l.geometry = geometry, l.format = f, l.tag = tag, l.num_sms = num_sms, l.order = k.order;
      return l;
    };
    for (Rank& k : ranks) {
      now[0].push_back(timed([&] { SendTokens(launch_of(k, format, 1), {T, k.x, k.ids, k.weights, k.clean_ids, k.invalid}); }));
    }
    for (Rank& k : ranks) {
      now[1].push_back(timed([&] {
        ReceiveTokens(launch_of(k, format, 1), {C, true, k.rows, fp8 ? k.scales : nullptr, k.row_weights, k.group_sizes,
                                                k.demand, k.row_of, k.peers, k.dropped});
      }));
    }
    for (Rank& k : ranks) {
      now[2].push_back(timed(
          [&] { SendSums(launch_of(k, sums, 2), {T, C, fp8 ? k.out : k.rows, k.row_weights, nullptr, k.row_of}); }));
    }
    for (Rank& k : ranks) {
      now[3].push_back(timed([&] { ReceiveSums(launch_of(k, sums, 2), {T, k.y, nullptr}); }));
    }
    now[4].push_back(timed([&] { Nothing<<<1, 32>>>(); }));
    for (int p = 0; p < 5; ++p) {
      if (i >= 2) samples[p].insert(samples[p].end(), now[p].begin(), now[p].end());
    }
  }
  double copy = 0;
  {
    std::vector<double> times;
    for (int i = 0; i < 7; ++i) {
      times.push_back(timed([&] { CHECK(cudaMemcpyAsync(sink, flush, kEvict, cudaMemcpyDeviceToDevice, 0)); }));
    }
    copy = 2.0 * kEvict / median(times) * 1e-6;
  }
  int32_t dropped = 0;
  CHECK(cudaMemcpy(&dropped, ranks[0].dropped, 4, cudaMemcpyDeviceToHost));
  double sum = 0;
  std::printf("R%d T%d H%d E%d K%d fp8=%d C=%ld:", R, T, H, E, K, fp8, long(C));
  for (int p = 0; p < 4; ++p) std::printf(" %6.1f", median(samples[p])), sum += median(samples[p]);
  std::printf("  sum %6.1f us  (empty kernel %.1f, copy %.2f TB/s, dropped %d, failure %u)\n", sum, median(samples[4]), copy,
              dropped, report->code);
  return 0;
}
