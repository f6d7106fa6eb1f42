// What the torch binding and the tests call; the kernels know nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace moe_comp {

constexpr int64_t kMaxHidden = (int64_t{1} << 28) - 1;  // the bits of a row fit an int

enum class RowType : int32_t { kFloat32, kBfloat16, kFloat16, kFloat64 };  // the last: clusters

// The arguments that both ops have. Everything but `segments` is in device memory; the segments are
// read before the call returns. The caller has checked that they lie within rows and message.
struct OpCall {
  void* rows;               // [N, hidden]
  int64_t hidden;           // 0 to kMaxHidden
  const float* row_scales;  // [N], or null: the scales are in the message
  uint8_t* message;
  const int64_t* segments;  // kSegmentFields each
  int64_t num_segments;
  RowType row_type;
};

// The arguments of cluster_sum and cluster_broadcast; everything is in device memory. The caller
// has checked the sizes, but not what order and offsets hold.
struct ClusterCall {
  void* rows;              // [N, hidden]
  void* values;            // [num_clusters, hidden]
  const int64_t* order;    // [N]
  const int64_t* offsets;  // [num_clusters + 1]
  int64_t num_clusters;
  int64_t hidden;
  RowType row_type;
  bool mean;
};

constexpr int64_t kMaxCoordinates = 1 << 14;  // of a row under all rotations: in shared memory

// The arguments of both hashes; everything is in device memory. The caller has checked that the
// numbers fit the tensors.
struct HashCall {
  const void* rows;  // [num_rows, hidden]
  int64_t num_rows;
  int64_t hidden;         // 0 to kMaxHidden
  const float* rotation;  // signs [rotations, kDiagonals, columns], or directions [hidden, columns]
  int64_t columns;
  int64_t num_coordinates;
  int64_t block_size;
  int64_t* keys;  // [num_rows]
  RowType row_type;
};

// Which random numbers are used: the key and two words of the counter of Philox.
struct RandomStream {
  uint64_t key;
  uint32_t offset;
  uint32_t stream;
};

}  // namespace moe_comp

extern "C" {

// Enqueues the op on a stream and returns at once; reads call->rows, writes call->message.
cudaError_t moe_comp_quantize_pack(const moe_comp::OpCall* call,
                                   const moe_comp::RandomStream* random, bool mid_rise,
                                   cudaStream_t stream);

// Enqueues the op on a stream and returns at once; reads call->message, writes call->rows.
cudaError_t moe_comp_unpack_dequantize(const moe_comp::OpCall* call, cudaStream_t stream);

// The same. `senders` holds two integers per segment, the number of its first row in the random
// stream and the key, and is read before the call returns.
cudaError_t moe_comp_unpack_dithered(const moe_comp::OpCall* call, const int64_t* senders,
                                     uint32_t offset, uint32_t random_stream, cudaStream_t stream);

// Enqueue the ops on a stream and return at once; scales are bfloat16.
cudaError_t moe_comp_gaussian_pack(const moe_comp::OpCall* call, cudaStream_t stream);
cudaError_t moe_comp_gaussian_unpack(const moe_comp::OpCall* call, cudaStream_t stream);

// Enqueues the op on a stream and returns at once; reads call->rows, writes call->values.
cudaError_t moe_comp_cluster_sum(const moe_comp::ClusterCall* call, cudaStream_t stream);

// Enqueues the op on a stream and returns at once; reads call->values, writes call->rows.
cudaError_t moe_comp_cluster_broadcast(const moe_comp::ClusterCall* call, cudaStream_t stream);

// Enqueue the op on a stream and return at once; read rows and rotation, write keys. Refuse more
// than kMaxCoordinates coordinates: of hadamard_hash, all those of the rotations that it needs.
cudaError_t moe_comp_hadamard_hash(const moe_comp::HashCall* call, cudaStream_t stream);
cudaError_t moe_comp_dense_hash(const moe_comp::HashCall* call, cudaStream_t stream);

}  // extern "C"
