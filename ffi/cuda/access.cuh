// How a thread reads and writes memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jax_nixlep::cuda {

inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;
inline constexpr int kWarp = 32;

__device__ inline uint64_t LoadAcquire(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}
__device__ inline uint64_t LoadRelaxed(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}
__device__ inline uint32_t LoadRelaxed(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
__device__ inline void StoreRelaxed(uint64_t* p, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}
__device__ inline void StoreRelaxed(uint32_t* p, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
__device__ inline void StoreRelease(uint64_t* p, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}

// atomicInc that sees what those before it wrote; a fence would take several times as long.
__device__ inline uint32_t IncrementAcquire(uint32_t* p, uint32_t most) {
  uint32_t before;
  asm volatile("atom.acquire.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(most) : "memory");
  return before;
}

__device__ inline uint64_t Now() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

// Neighbouring 4-byte words that move in one instruction. Values inside are taken apart by Unpack, in registers.
template <int kWords>
struct alignas(4 * kWords) Words {
  uint32_t w[kWords];
};

// Rows are used once: keep them out of L1, which would only delay the loads. Never the read-only path: peers write
// while kernels run.
template <int kWords>
__device__ inline Words<kWords> LoadOnce(const std::byte* p) {
  static_assert(kWords == 4 || kWords == 2 || kWords == 1);
  Words<kWords> x;
  if constexpr (kWords == 4) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3])
                 : "l"(p));
  } else if constexpr (kWords == 2) {
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(x.w[0]), "=r"(x.w[1]) : "l"(p));
  } else {
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(x.w[0]) : "l"(p));
  }
  return x;
}

template <int kWords>
__device__ inline void Store(std::byte* p, const Words<kWords>& x) {
  if constexpr (kWords == 4) {
    *reinterpret_cast<uint4*>(p) = {x.w[0], x.w[1], x.w[2], x.w[3]};
  } else if constexpr (kWords == 2) {
    *reinterpret_cast<uint2*>(p) = {x.w[0], x.w[1]};
  } else {
    *reinterpret_cast<uint32_t*>(p) = x.w[0];
  }
}

// What will be read: into L2, where it is at home, hence always fresh. Never of a peer's memory: each such line takes
// 20 ns of NVLink, one after the other.
__device__ inline void Prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
inline constexpr int kLineBytes = 128;
// A range, by one warp.
__device__ inline void PrefetchRange(const std::byte* p, int num_bytes) {
#pragma unroll 1
  for (int i = threadIdx.x % kWarp * kLineBytes; i < num_bytes; i += kWarp * kLineBytes) Prefetch(p + i);
}
// A range of whole 16 bytes, by one thread. Of memory that is there: a plain prefetch may name any.
__device__ inline void PrefetchBulk(const std::byte* p, int num_bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(num_bytes) : "memory");
}

}  // namespace jax_nixlep::cuda
