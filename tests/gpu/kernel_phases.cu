// The kernels alone, all ranks in one process: microseconds of each phase, with the L2 cache evicted before. Rank r is
// on GPU r % GPUS (environment; 1). For tuning: what tests/gpu/phases.py measures through JAX and NIXL, without either.
//   nvcc -std=c++20 -arch=sm_90 -O3 -fmad=false --expt-relaxed-constexpr -Iffi -isystem UCX/include \
//       tests/gpu/kernel_phases.cu ffi/cuda/*.cu -o kernel_phases
//   ./kernel_phases RANKS TOKENS HIDDEN EXPERTS_PER_RANK TOP_K ITERATIONS FP8 CAPACITY_FACTOR
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "bulk.cuh"
#include "cuda/kernels.h"

using namespace jax_nixlep;
using namespace jax_nixlep::cuda;

#define CHECK(call)                                                                        \
  do {                                                                                     \
    cudaError_t status = (call);                                                           \
    if (status != cudaSuccess) {                                                           \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(status)); \
      std::exit(1);                                                                        \
    }                                                                                      \
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

__device__ uint64_t Nanoseconds() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}
__global__ void Delay(uint64_t ns) {
  for (const uint64_t end = Nanoseconds() + ns; Nanoseconds() < end;) continue;
}

// What no kernel of a phase can do without: as many dependent reads as it has (`chain`), its bytes moved, and at the
// end one word that says so, after a fence. Pieces of `from` are read, and each is written as often as comes out on
// average.
constexpr int kFloorWarps = 16, kFloorSlots = 3, kFloorPiece = 4096;
struct Floor {
  const uint64_t* chain;
  int reads_before;  // of the chain, before data can be asked for
  const std::byte* from;
  std::byte* to;
  int in, out;  // pieces
  uint32_t* arrived;
  uint64_t* flag;
  bool signals;
};
__global__ void __launch_bounds__(kFloorWarps * 32) FloorKernel(const __grid_constant__ Floor f) {
  extern __shared__ __align__(128) std::byte slots[];
  __shared__ Landing landings[kFloorWarps * kFloorSlots];
  __shared__ uint64_t at;
  const int warp = threadIdx.x / 32, first = warp * gridDim.x + blockIdx.x, step = gridDim.x * kFloorWarps;
  std::byte* own = slots + warp * kFloorSlots * kFloorPiece;
  Landing* landing = landings + warp * kFloorSlots;
  const bool leads = threadIdx.x % 32 == 0;
  auto fetch = [&](int piece, int slot) {
    landing[slot].Expect(kFloorPiece);
    BulkLoad(own + slot * kFloorPiece, f.from + size_t(piece) * kFloorPiece, kFloorPiece, landing[slot]);
  };
  auto chase = [&](int reads, uint64_t from) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < reads; ++i) from = *reinterpret_cast<const volatile uint64_t*>(f.chain + from);
      at = from;
    }
    __syncthreads();
  };
  if (leads) {
    for (int i = 0; i < kFloorSlots; ++i) landing[i].Init(1);
    FenceBulk();
  }
  chase(f.reads_before, 0);
  if (leads) {
    for (int i = 0; i < kFloorSlots && first + i * step < f.in; ++i) fetch(first + i * step, i);
  }
  if (f.reads_before == 0) chase(1, at);  // the state, while data is on its way
  if (leads) {
    int slot = 0;
    unsigned parity = 0;
    for (int piece = first; piece < f.in; piece += step) {
      landing[slot].Wait(parity >> slot & 1);
      parity ^= 1u << slot;
      const int64_t begin = int64_t(piece) * f.out / f.in, end = int64_t(piece + 1) * f.out / f.in;
      for (int64_t i = begin; i < end; ++i) BulkStore(f.to + i * kFloorPiece, own + slot * kFloorPiece, kFloorPiece);
      CloseStores();
      if (piece + kFloorSlots * step < f.in) {
        AwaitStoresRead<0>();
        fetch(piece + kFloorSlots * step, slot);
      }
      slot = slot + 1 == kFloorSlots ? 0 : slot + 1;
    }
  }
  if (!f.signals) return AwaitStoresRead<0>();
  AwaitStores<0>();
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    if (gridDim.x == 1 || atomicInc(f.arrived, gridDim.x - 1) == gridDim.x - 1) *f.flag = at;
  }
}

struct Rank {
  int device;
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
  const int64_t most_rows = int64_t(R) * T * std::min(K, E);
  const int64_t C = factor > 0 ? (int64_t(factor * T * K) + 127) / 128 * 128 : most_rows;
  Capacity capacity{R, E, T, K, int64_t(AlignUp(size_t(H) * 2))};
  const Layout layout{capacity, /*has_picks=*/true};
  const Geometry geometry(layout);
  RowFormat format;
  format.type = TokenType::kBfloat16;
  format.wire = fp8 ? Wire::kFp8 : Wire::kSame;
  format.dequantize = !fp8;
  format.hidden = H;
  RowFormat sums = format;
  sums.wire = Wire::kSame;

  double distinct = 0;  // ranks that a token goes to, on average
  std::mt19937 random(1);
  const char* gpus = std::getenv("GPUS");
  const int num_devices = gpus ? std::atoi(gpus) : 1;
  std::vector<Rank> ranks(R);
  for (int r = 0; r < R; ++r) {
    ranks[r].device = r % num_devices;
    CHECK(cudaSetDevice(ranks[r].device));
    for (int other = 0; r < num_devices && other < num_devices; ++other) {
      if (other != r) CHECK(cudaDeviceEnablePeerAccess(other, 0));
    }
    ranks[r].control = Allocate<Control>(1), ranks[r].region = Allocate(layout.num_bytes());
  }
  FailureReport* report = nullptr;
  CHECK(cudaHostAlloc(&report, sizeof(*report), cudaHostAllocMapped | cudaHostAllocPortable));
  std::memset(report, 0, sizeof(*report));
  for (int r = 0; r < R; ++r) {
    Rank& k = ranks[r];
    CHECK(cudaSetDevice(k.device));
    DeviceState state{};
    state.region = k.region;
    state.scratch = Allocate(ScratchBytes(geometry));
    state.report = report;
    state.rank = r;
    state.active = 1;
    state.timeout_ns = 60'000'000'000;
    state.geometry = geometry;
    state.started = state.current = state.finished = uint64_t(1) << kEpochShift;
    for (int p = 0; p < R; ++p) state.peers[p] = {ranks[p].region, ranks[p].control, 0, 1, 0, 0, uint64_t(p) + 7};
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
    for (int t = 0; t < T; ++t) {
      std::vector<bool> to(R);
      for (int i = 0; i < K; ++i) to[ids[t * K + i] / E] = true;
      distinct += double(std::count(to.begin(), to.end(), true)) / (R * T);
    }
    k.ids = Upload(ids), k.weights = Upload(weights);
    k.rows = Allocate(size_t(C) * H * 2), k.scales = Allocate(size_t(C) * H / 32), k.y = Allocate(size_t(T) * H * 2);
    k.clean_ids = Allocate<int32_t>(T * K), k.invalid = Allocate<int32_t>(1), k.group_sizes = Allocate<int32_t>(E);
    k.demand = Allocate<int32_t>(E), k.row_of = Allocate<int32_t>(size_t(R) * T * K), k.peers = Allocate<int32_t>(R);
    k.dropped = Allocate<int32_t>(1), k.row_weights = Allocate<float>(C), k.order = Allocate<float>(1);
  }
  int num_sms = 0;
  CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0));
  constexpr size_t kEvict = size_t(1) << 29;
  struct Device {
    std::byte *flush, *sink;
    cudaEvent_t begin, end;
  };
  std::vector<Device> devices(num_devices);
  for (int i = num_devices - 1; i >= 0; --i) {
    CHECK(cudaSetDevice(i));
    CHECK(Preload());
    devices[i].flush = Allocate(kEvict), devices[i].sink = Allocate(kEvict);
    CHECK(cudaEventCreate(&devices[i].begin));
    CHECK(cudaEventCreate(&devices[i].end));
  }
  std::byte *flush = devices[0].flush, *sink = devices[0].sink;
  auto timed = [&](auto launch, int device = 0) {
    for (int i = num_devices - 1; i >= 0; --i) {  // what is read may be in another's cache
      CHECK(cudaSetDevice(i));
      CHECK(cudaMemcpyAsync(devices[i].sink, devices[i].flush, kEvict, cudaMemcpyDeviceToDevice, 0));
      if (i != device) CHECK(cudaDeviceSynchronize());
    }
    CHECK(cudaSetDevice(device));
    CHECK(cudaEventRecord(devices[device].begin));
    launch();
    CHECK(cudaEventRecord(devices[device].end));
    CHECK(cudaDeviceSynchronize());
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, devices[device].begin, devices[device].end));
    CHECK(cudaSetDevice(0));
    return double(ms) * 1e3;
  };
  CHECK(cudaFuncSetAttribute(FloorKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kFloorWarps * kFloorSlots * kFloorPiece));
  std::vector<uint64_t> links(4096);  // each in a line of its own, far from the one before
  for (size_t i = 0; i < 8; ++i) links[i * 512] = (i + 1) % 8 * 512;
  const uint64_t* chain = Upload(links);
  auto* arrived = Allocate<uint32_t>(1);
  auto* flag = Allocate<uint64_t>(1);
  auto floor_of = [&](int phase) {
    const double token = H * (fp8 ? 1 + 4.0 / kQuantBlock : 2), row = H * (fp8 ? 1.0 : 2.0), sum = H * 2.0;
    const double in[] = {T * H * 2.0, distinct * T * token, double(K) * T * sum, distinct * T * sum};
    const double out[] = {T * token, double(C) * row, distinct * T * sum, T * sum};
    auto pieces = [](double bytes) { return std::max(1, int(std::ceil(bytes / kFloorPiece))); };
    const bool sends = phase % 2 == 0;
    const Floor f{chain, sends ? 0 : 2, flush, sink, pieces(in[phase]), pieces(out[phase]), arrived, flag, sends};
    const int blocks = std::clamp(f.in, 1, num_sms);
    FloorKernel<<<blocks, kFloorWarps * 32, kFloorWarps * kFloorSlots * kFloorPiece>>>(f);
  };
  auto median = [](std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
  };

  auto launch_of = [&](Rank& k, const RowFormat& f, uint64_t tag) {
    Launch l;
    l.control = k.control, l.region = k.region, l.geometry = geometry, l.format = f, l.tag = tag, l.num_sms = num_sms,
    l.order = k.order;
    return l;
  };

  std::vector<std::vector<double>> samples(9);
  for (int i = 0; i < iterations + 2; ++i) {
    std::vector<std::vector<double>> now(9);
    for (Rank& k : ranks) {
      now[0].push_back(timed(
          [&] { SendTokens(launch_of(k, format, 1), {T, k.x, k.ids, k.weights, k.clean_ids, k.invalid}); }, k.device));
    }
    for (Rank& k : ranks) {
      now[1].push_back(timed(
          [&] {
            ReceiveTokens(launch_of(k, format, 1), {C, true, k.rows, fp8 ? k.scales : nullptr, k.row_weights,
                                                    k.group_sizes, k.demand, k.row_of, k.peers, k.dropped});
          },
          k.device));
    }
    for (Rank& k : ranks) {
      now[2].push_back(timed(
          [&] { SendSums(launch_of(k, sums, 2), {T, C, fp8 ? k.out : k.rows, k.row_weights, nullptr, k.row_of}); },
          k.device));
    }
    for (Rank& k : ranks) {
      now[3].push_back(timed([&] { ReceiveSums(launch_of(k, sums, 2), {T, k.y, nullptr}); }, k.device));
    }
    now[4].push_back(timed([&] { Nothing<<<1, 32>>>(); }));
    for (int p = 0; p < 4; ++p) now[5 + p].push_back(timed([&] { floor_of(p); }));
    for (int p = 0; p < 9; ++p) {
      if (i >= 2) samples[p].insert(samples[p].end(), now[p].begin(), now[p].end());
    }
  }
  // With a GPU for each rank: dispatch and combine again and again, all ranks at once. Kernels wait for each other.
  double together = 0;
  if (num_devices == R && R > 1) {
    constexpr int kPairs = 32;
    for (int i = 0; i <= kPairs; ++i) {
      for (Rank& k : ranks) {
        CHECK(cudaSetDevice(k.device));
        if (i == 1 && k.device) Delay<<<1, 1>>>(100'000);  // one waits while the other works, as programs do
        if (i == 2) CHECK(cudaEventRecord(devices[k.device].begin));
        SendTokens(launch_of(k, format, 1), {T, k.x, k.ids, k.weights, k.clean_ids, k.invalid});
        ReceiveTokens(launch_of(k, format, 1), {C, true, k.rows, fp8 ? k.scales : nullptr, k.row_weights, k.group_sizes,
                                                k.demand, k.row_of, k.peers, k.dropped});
        SendSums(launch_of(k, sums, 2), {T, C, fp8 ? k.out : k.rows, k.row_weights, nullptr, k.row_of});
        ReceiveSums(launch_of(k, sums, 2), {T, k.y, nullptr});
        if (i == kPairs) CHECK(cudaEventRecord(devices[k.device].end));
      }
    }
    for (Rank& k : ranks) {
      CHECK(cudaSetDevice(k.device));
      CHECK(cudaDeviceSynchronize());
      float ms = 0;
      CHECK(cudaEventElapsedTime(&ms, devices[k.device].begin, devices[k.device].end));
      together = std::max(together, double(ms) * 1e3 / (kPairs - 1));
    }
    CHECK(cudaSetDevice(0));
  }
  double copy = 0;
  {
    std::vector<double> times;
    for (int i = 0; i < 7; ++i) {
      times.push_back(timed([&] { CHECK(cudaMemcpyAsync(sink, flush, kEvict, cudaMemcpyDeviceToDevice, 0)); }));
    }
    copy = 2.0 * kEvict / median(times) * 1e-6;
  }
  // Experts do nothing here: each token comes back times the sum of its weights, each rank's share rounded once.
  double worst = 0;
  for (Rank& k : ranks) {
    std::vector<uint16_t> x(size_t(T) * H), y(size_t(T) * H);
    CHECK(cudaMemcpy(x.data(), k.x, x.size() * 2, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(y.data(), k.y, y.size() * 2, cudaMemcpyDeviceToHost));
    auto value = [](uint16_t bits) {
      const uint32_t word = uint32_t(bits) << 16;
      float f;
      std::memcpy(&f, &word, 4);
      return double(f);
    };
    for (size_t i = 0; i < x.size(); ++i) {
      const double difference = std::abs(value(y[i]) - value(x[i]) * 0.125 * K) / std::abs(value(x[i]));
      worst = std::max(worst, difference != difference ? 1e9 : difference);
    }
  }
  int32_t dropped = 0;
  CHECK(cudaMemcpy(&dropped, ranks[0].dropped, 4, cudaMemcpyDeviceToHost));
  double sum = 0;
  std::printf("R%d T%d H%d E%d K%d fp8=%d C=%ld:", R, T, H, E, K, fp8, long(C));
  for (int p = 0; p < 4; ++p) std::printf(" %6.1f", median(samples[p])), sum += median(samples[p]);
  double floor = 0;
  std::printf("  sum %6.1f us  floor", sum);
  for (int p = 5; p < 9; ++p) std::printf(" %5.1f", median(samples[p])), floor += median(samples[p]);
  std::printf("  sum %6.1f us  (empty kernel %.1f, copy %.2f TB/s, dropped %d, failure %u, error %.1e)\n", floor,
              median(samples[4]), copy, dropped, report->code, fp8 ? 0.0 : worst);
  if (together > 0) std::printf("dispatch and combine, all ranks at once: %.1f us\n", together);
  return 0;
}
