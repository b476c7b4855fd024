// Launches of the fused row pass. Raw pointers and a stream: no torch linkage, one build for every torch.

#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <cmath>
#include <stdexcept>
#include <string>

#include "rows.cuh"

namespace sgopd {
namespace {

constexpr int kThreads = 256;
constexpr int kMostShared = 200 * 1024;  // bytes of a block's stage; sm_90 and sm_100 have 227 KiB

__global__ void __launch_bounds__(kThreads, 2) rows_kernel(const RowsArgs a) {
  __shared__ cuda::Shared<kThreads> shared;
  cuda::run_row<kThreads, false>(a, blockIdx.x, {shared}, nullptr);
}

// A cluster a token. Two blocks a multiprocessor: one row is read while the other is worked on.
__global__ void __launch_bounds__(kThreads, 2) staged_rows_kernel(const RowsArgs a) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ float4 stage[];
  __shared__ cuda::Shared<kThreads> shared;
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = static_cast<int>(cluster.num_blocks());
  cuda::run_row<kThreads, true>(a, blockIdx.x / blocks, {shared, static_cast<int>(cluster.block_rank()), blocks},
                                stage + threadIdx.x);
#endif
}

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA row pass: ") + cudaGetErrorString(status));
  }
}

int stage_bytes(const RowsArgs& a, int blocks) {
  const int models = a.reference != nullptr ? 3 : a.teacher != nullptr ? 2 : 1;
  return models * cuda::stage_quads(a.vocabulary, kThreads, blocks) * kThreads * static_cast<int>(sizeof(float4));
}

}  // namespace

// Device pointers throughout; asynchronous on `stream`, of the current device. `staged`: each row is read once, by a
// cluster of blocks (sm_90 and newer).
void cuda_rows(const RowsArgs& args, void* stream, bool staged) {
  int devices = 0;
  check(cudaGetDeviceCount(&devices));
  if (devices == 0) throw std::runtime_error("CUDA row pass: no CUDA device is available");
  if (!staged) {
    rows_kernel<<<static_cast<unsigned>(args.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    check(cudaGetLastError());
    return;
  }
  int blocks = 2;  // the fewest whose stages leave room for two a multiprocessor; else those of the largest cluster
  while (blocks < cuda::kMostBlocks && stage_bytes(args, blocks) > kMostShared / 2) blocks *= 2;
  const int bytes = stage_bytes(args, blocks);
  if (bytes > kMostShared)
    throw std::invalid_argument("CUDA row pass: a row of " + std::to_string(args.vocabulary) +
                                " columns doesn't fit into a cluster; take backend='triton'");
  check(cudaFuncSetAttribute(staged_rows_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  check(cudaFuncSetAttribute(staged_rows_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(args.rows * blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, staged_rows_kernel, args));
}

}  // namespace sgopd
