// Rows through shared memory: Hopper's bulk copies, which keep far more bytes under way than registers can hold.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jax_nixlep::cuda {

// Bytes in flight to a place in shared memory. `arrivals`: acts besides the bytes that complete a phase.
struct Landing {
  uint64_t word;

  __device__ uint32_t address() const { return uint32_t(__cvta_generic_to_shared(this)); }
  __device__ void Init(uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
  }
  // One arrival, and `num_bytes` to come.
  __device__ void Expect(uint32_t num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(num_bytes) : "memory");
  }
  // One arrival, once the single words that this thread has asked for are there.
  __device__ void ArriveWithWords() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address()) : "memory");
  }
  __device__ void Wait(uint32_t parity) const {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(address()),
        "r"(parity)
        : "memory");
  }
};

constexpr int kBulk = 16;  // bulk copies move multiples of it, between multiples of it
constexpr int BulkUp(int num_bytes) { return (num_bytes + kBulk - 1) / kBulk * kBulk; }

// What ordinary accesses wrote becomes visible to bulk copies, in shared and in global memory.
__device__ inline void FenceBulk() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ inline void BulkLoad(std::byte* to, const std::byte* from, uint32_t num_bytes, Landing& landing) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   uint32_t(__cvta_generic_to_shared(to))),
               "l"(from), "r"(num_bytes), "r"(landing.address())
               : "memory");
}
__device__ inline void WordLoad(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from)
               : "memory");
}

__device__ inline void BulkStore(std::byte* to, const std::byte* from, uint32_t num_bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(uint32_t(__cvta_generic_to_shared(from))), "r"(num_bytes)
               : "memory");
}
// A thread's stores since the last call are one group.
__device__ inline void CloseStores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but the last `kGroups` groups of this thread have read their shared memory, or have ended.
template <int kGroups>
__device__ inline void AwaitStoresRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}
template <int kGroups>
__device__ inline void AwaitStores() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace jax_nixlep::cuda
