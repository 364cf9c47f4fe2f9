// What happens between operations.
#include "cuda/launch.cuh"

namespace jax_nixlep::cuda {
namespace {

__global__ void FindPointersKernel(void* view, int num_rows, const uint32_t* wanted, std::byte** pointers) {
  for (int i = threadIdx.x; i < num_rows; i += blockDim.x) {
    void* pointer = nullptr;
    auto* list = static_cast<ucp_device_remote_mem_list_h>(view);
    if (wanted[i] && list->version == UCP_DEVICE_MEM_LIST_VERSION_V1) {
      if (ucp_device_get_ptr(list, unsigned(i), &pointer) != UCS_OK) pointer = nullptr;
    }
    pointers[i] = static_cast<std::byte*>(pointer);
  }
}

__global__ void NotifyKernel(const __grid_constant__ Params p, Notice notice) {
  __shared__ Op op;
  Begin(op, p, /*sending=*/true);
  if (threadIdx.x == 0) TellPeers(op, p, notice);
}

}  // namespace

cudaError_t FindPointers(void* remote_view, int num_rows, const uint32_t* wanted, std::byte** pointers,
                         cudaStream_t stream) {
  FindPointersKernel<<<1, kWarp, 0, stream>>>(remote_view, num_rows, wanted, pointers);
  return cudaGetLastError();
}

cudaError_t Notify(Control* control, const Geometry& geometry, Notice notice, cudaStream_t stream) {
  Params p{};
  p.control = control;
  p.g = geometry;
  NotifyKernel<<<1, kStateWarps * kWarp, 0, stream>>>(p, notice);
  return cudaGetLastError();
}

cudaError_t Preload() {
  for (auto* load : {+[] { return LoadKernel(&FindPointersKernel); }, +[] { return LoadKernel(&NotifyKernel); },
                     &PreloadTokens, &PreloadSums}) {
    if (const cudaError_t status = load(); status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace jax_nixlep::cuda
