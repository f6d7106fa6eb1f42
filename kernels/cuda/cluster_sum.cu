// cluster_sum and cluster_broadcast: clusters of rows to one row each, and back. The contract is
// megatron_moe_comp/ops/cluster_sum.py.
//
// A thread has a few neighbouring columns of one cluster: it walks the cluster's rows in their
// order, so that the sum is the same in every run, and threads beside it have the columns beside.
#include <cstring>

#include "../quantize_math.cuh"
#include "launchers.h"
#include "row_types.cuh"

namespace moe_comp {
namespace {

constexpr int kThreads = 256;   // in a block
constexpr int kRowsAtOnce = 4;  // that a thread has asked for before it adds the first

__device__ inline double add_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

__device__ inline double div_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __ddiv_rn(a, b);
#else
  return a / b;
#endif
}

struct Float64 {
  using Bits = uint64_t;

  static __device__ double value(const uint32_t* words, int i) {
    double value;
    std::memcpy(&value, words + 2 * i, sizeof value);
    return value;
  }
  static __device__ Bits bits(double value) {
    Bits bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
  }
};

// Neighbouring columns of a row: 16 bytes, or one column where rows are not aligned.
template <typename Row, bool kWide>
struct Columns {
  using Bits = typename Row::Bits;
  using Value = decltype(Row::value(nullptr, 0));  // in which rows are added
  static constexpr int kSize = kWide ? sizeof(uint4) / sizeof(Bits) : 1;

  alignas(16) uint32_t words[4];

  __device__ void load(const Bits* source) {
    if constexpr (kWide) {
      const uint4 vector = __ldg(reinterpret_cast<const uint4*>(source));
      std::memcpy(words, &vector, sizeof vector);
    } else {
      const Bits bits = __ldg(source);
      std::memcpy(words, &bits, sizeof bits);
    }
  }

  __device__ void store(Bits* target) const {
    if constexpr (kWide) {
      // An assignment may become four stores.
      __stwb(reinterpret_cast<uint4*>(target), make_uint4(words[0], words[1], words[2], words[3]));
    } else {
      std::memcpy(target, words, sizeof(Bits));
    }
  }

  __device__ Value value(int i) const { return Row::value(words, i); }

  __device__ void set_values(const Value* values) {
    Bits bits[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) bits[i] = Row::bits(values[i]);
    std::memcpy(words, bits, sizeof bits);
  }
};

// What a thread does.
struct Work {
  int64_t cluster;
  int64_t column;
  int64_t first;  // of the cluster, in p.order
  int64_t last;

  __device__ Work(const ClusterCall& p, int columns_per_thread) {
    const int64_t threads_per_cluster = p.hidden / columns_per_thread;
    const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    cluster = index / threads_per_cluster;
    column = index % threads_per_cluster * columns_per_thread;
    const bool exists = cluster < p.num_clusters;
    first = exists ? __ldg(p.offsets + cluster) : 0;
    last = exists ? __ldg(p.offsets + cluster + 1) : 0;
  }
};

template <typename Row, bool kWide>
__global__ void __launch_bounds__(kThreads)
    cluster_sum_kernel(const __grid_constant__ ClusterCall p) {
  using Piece = Columns<Row, kWide>;
  const Work work(p, Piece::kSize);
  if (work.cluster >= p.num_clusters) return;
  const auto* rows = static_cast<const typename Row::Bits*>(p.rows) + work.column;
  typename Piece::Value sums[Piece::kSize] = {};
#pragma unroll 1
  for (int64_t i = work.first; i < work.last; i += kRowsAtOnce) {
    Piece pieces[kRowsAtOnce];
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if (i + k < work.last) pieces[k].load(rows + __ldg(p.order + i + k) * p.hidden);
    }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if (i + k >= work.last) break;
#pragma unroll
      for (int j = 0; j < Piece::kSize; ++j) sums[j] = add_rn(sums[j], pieces[k].value(j));
    }
  }
  if (p.mean && work.last - work.first > 1) {
    const auto count = static_cast<typename Piece::Value>(work.last - work.first);
#pragma unroll
    for (int j = 0; j < Piece::kSize; ++j) sums[j] = div_rn(sums[j], count);
  }
  Piece piece;
  piece.set_values(sums);
  piece.store(static_cast<typename Row::Bits*>(p.values) + work.cluster * p.hidden + work.column);
}

template <typename Row, bool kWide>
__global__ void __launch_bounds__(kThreads)
    cluster_broadcast_kernel(const __grid_constant__ ClusterCall p) {
  using Piece = Columns<Row, kWide>;
  const Work work(p, Piece::kSize);
  if (work.first == work.last) return;
  Piece piece;
  piece.load(static_cast<const typename Row::Bits*>(p.values) + work.cluster * p.hidden +
             work.column);
  if (p.mean && work.last - work.first > 1) {
    const auto count = static_cast<typename Piece::Value>(work.last - work.first);
    typename Piece::Value quotients[Piece::kSize];
#pragma unroll
    for (int j = 0; j < Piece::kSize; ++j) quotients[j] = div_rn(piece.value(j), count);
    piece.set_values(quotients);
  }
  auto* rows = static_cast<typename Row::Bits*>(p.rows) + work.column;
#pragma unroll 4
  for (int64_t i = work.first; i < work.last; ++i) {
    piece.store(rows + __ldg(p.order + i) * p.hidden);
  }
}

using Kernel = void (*)(ClusterCall);

// Launches the kernel for rows that can be moved 16 bytes at a time, or that for any rows.
cudaError_t launch(Kernel wide, Kernel narrow, int value_bytes, const ClusterCall& call,
                   cudaStream_t stream) {
  const auto addresses =
      reinterpret_cast<uintptr_t>(call.rows) | reinterpret_cast<uintptr_t>(call.values);
  const bool is_wide = (addresses | call.hidden * value_bytes) % sizeof(uint4) == 0;
  const int64_t columns_per_thread = is_wide ? sizeof(uint4) / value_bytes : 1;
  const int64_t num_threads = call.num_clusters * (call.hidden / columns_per_thread);
  const int64_t num_blocks = (num_threads + kThreads - 1) / kThreads;
  if (num_blocks == 0) return cudaSuccess;
  if (num_blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<uint32_t>(num_blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, is_wide ? wide : narrow, call);
}

template <typename Row>
cudaError_t launch_sum(const ClusterCall& call, cudaStream_t stream) {
  return launch(cluster_sum_kernel<Row, true>, cluster_sum_kernel<Row, false>,
                sizeof(typename Row::Bits), call, stream);
}

template <typename Row>
cudaError_t launch_broadcast(const ClusterCall& call, cudaStream_t stream) {
  return launch(cluster_broadcast_kernel<Row, true>, cluster_broadcast_kernel<Row, false>,
                sizeof(typename Row::Bits), call, stream);
}

}  // namespace
}  // namespace moe_comp

cudaError_t moe_comp_cluster_sum(const moe_comp::ClusterCall* call, cudaStream_t stream) {
  using namespace moe_comp;
  switch (call->row_type) {
    case RowType::kFloat32:
      return launch_sum<Float32>(*call, stream);
    case RowType::kBfloat16:
      return launch_sum<Bfloat16>(*call, stream);
    case RowType::kFloat16:
      return launch_sum<Float16>(*call, stream);
    case RowType::kFloat64:
      return launch_sum<Float64>(*call, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t moe_comp_cluster_broadcast(const moe_comp::ClusterCall* call, cudaStream_t stream) {
  using namespace moe_comp;
  switch (call->row_type) {
    case RowType::kFloat32:
      return launch_broadcast<Float32>(*call, stream);
    case RowType::kBfloat16:
      return launch_broadcast<Bfloat16>(*call, stream);
    case RowType::kFloat16:
      return launch_broadcast<Float16>(*call, stream);
    case RowType::kFloat64:
      return launch_broadcast<Float64>(*call, stream);
  }
  return cudaErrorInvalidValue;
}
