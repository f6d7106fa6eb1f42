// The CUDA kernels as torch ops. megatron_moe_comp/ops/ has their schemas; importing the module
// registers them.
#include <Python.h>

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../cluster_checks.h"
#include "../gaussian_math.cuh"
#include "../hash_checks.h"
#include "../segment_checks.h"
#include "launchers.h"

namespace moe_comp {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Throws a ValueError that names the value and the requirement.
void check(at::IntArrayRef table, const at::Tensor& rows, const OptionalTensor& row_scales,
           const at::Tensor& message, SegmentForm form = {}) {
  check_arguments(table, rows, row_scales, message, form);
  TORCH_CHECK_VALUE(rows.is_cuda(), "rows must be on a CUDA device, not on ", rows.device());
  TORCH_CHECK_VALUE(rows.size(1) <= kMaxHidden, "rows must have at most ", kMaxHidden,
                    " columns, not ", rows.size(1));
}

RowType row_type_of(const at::Tensor& rows) {
  switch (rows.scalar_type()) {
    case at::kBFloat16:
      return RowType::kBfloat16;
    case at::kHalf:
      return RowType::kFloat16;
    default:
      return RowType::kFloat32;
  }
}

// Rows of other types are converted to and from float32.
bool has_kernel(const at::Tensor& rows) {
  return rows.scalar_type() == at::kFloat || row_type_of(rows) != RowType::kFloat32;
}

// Returns the arguments of a launcher; `rows` are of a type that has a kernel.
OpCall call_of(const at::Tensor& rows, const OptionalTensor& row_scales, const at::Tensor& message,
               at::IntArrayRef table) {
  OpCall call = {};
  call.rows = rows.data_ptr();
  call.hidden = rows.size(1);
  call.row_scales = row_scales ? row_scales->const_data_ptr<float>() : nullptr;
  call.message = static_cast<uint8_t*>(message.data_ptr());
  call.segments = table.data();
  call.num_segments = static_cast<int64_t>(table.size()) / kSegmentFields;
  call.row_type = row_type_of(rows);
  return call;
}

uint32_t checked_word(const char* name, int64_t value) {
  check_32_bits(name, value);
  return static_cast<uint32_t>(value);
}

void quantize_pack(const at::Tensor& rows, const OptionalTensor& row_scales,
                   const at::Tensor& message, at::IntArrayRef table, int64_t key, int64_t offset,
                   int64_t stream, bool mid_rise) {
  check(table, rows, row_scales, message);
  const RandomStream random = {static_cast<uint64_t>(key), checked_word("offset", offset),
                               checked_word("stream", stream)};
  const c10::cuda::CUDAGuard guard(rows.device());
  const at::Tensor source = has_kernel(rows) ? rows : rows.to(at::kFloat);
  const OpCall call = call_of(source, row_scales, message, table);
  C10_CUDA_CHECK(
      moe_comp_quantize_pack(&call, &random, mid_rise, c10::cuda::getCurrentCUDAStream()));
}

// Calls `launch` with the arguments of an op that writes rows. Rows of a type without a kernel are
// converted from float32.
template <typename Launch>
void write_rows(const at::Tensor& message, const OptionalTensor& row_scales, const at::Tensor& rows,
                at::IntArrayRef table, const Launch& launch) {
  const c10::cuda::CUDAGuard guard(rows.device());
  const bool direct = has_kernel(rows);
  const at::Tensor target =
      direct ? rows : rows.new_empty(rows.sizes(), rows.options().dtype(at::kFloat));
  const OpCall call = call_of(target, row_scales, message, table);
  C10_CUDA_CHECK(launch(&call, c10::cuda::getCurrentCUDAStream()));
  if (direct) return;
  for (size_t i = 0; i < table.size(); i += kSegmentFields) {
    rows.narrow(0, table[i], table[i + 1]).copy_(target.narrow(0, table[i], table[i + 1]));
  }
}

void unpack_dequantize(const at::Tensor& message, const OptionalTensor& row_scales,
                       const at::Tensor& rows, at::IntArrayRef table) {
  check(table, rows, row_scales, message);
  write_rows(message, row_scales, rows, table, moe_comp_unpack_dequantize);
}

void unpack_dithered(const at::Tensor& message, const at::Tensor& rows, at::IntArrayRef table,
                     at::IntArrayRef senders, int64_t offset, int64_t stream) {
  check(table, rows, std::nullopt, message);
  check_senders(table, senders);
  const uint32_t words[] = {checked_word("offset", offset), checked_word("stream", stream)};
  write_rows(message, std::nullopt, rows, table, [&](const OpCall* call, cudaStream_t queue) {
    return moe_comp_unpack_dithered(call, senders.data(), words[0], words[1], queue);
  });
}

constexpr SegmentForm kGaussianForm = {kMaxGaussianBits, kGaussianScaleBytes};

void gaussian_pack(const at::Tensor& rows, const at::Tensor& message, at::IntArrayRef table) {
  check(table, rows, std::nullopt, message, kGaussianForm);
  const c10::cuda::CUDAGuard guard(rows.device());
  const at::Tensor source = has_kernel(rows) ? rows : rows.to(at::kFloat);
  const OpCall call = call_of(source, std::nullopt, message, table);
  C10_CUDA_CHECK(moe_comp_gaussian_pack(&call, c10::cuda::getCurrentCUDAStream()));
}

void gaussian_unpack(const at::Tensor& message, const at::Tensor& rows, at::IntArrayRef table) {
  check(table, rows, std::nullopt, message, kGaussianForm);
  write_rows(message, std::nullopt, rows, table, moe_comp_gaussian_unpack);
}

// Enqueues `launch`; `rows` have the device and the type of `values`.
void launch_clusters(const at::Tensor& rows, const at::Tensor& values, const at::Tensor& order,
                     const at::Tensor& offsets, bool mean,
                     cudaError_t (*launch)(const ClusterCall*, cudaStream_t)) {
  ClusterCall call = {};
  call.rows = rows.data_ptr();
  call.values = values.data_ptr();
  call.order = order.const_data_ptr<int64_t>();
  call.offsets = offsets.const_data_ptr<int64_t>();
  call.num_clusters = values.size(0);
  call.hidden = rows.size(1);
  call.row_type = rows.scalar_type() == at::kDouble ? RowType::kFloat64 : row_type_of(rows);
  call.mean = mean;
  C10_CUDA_CHECK(launch(&call, c10::cuda::getCurrentCUDAStream()));
}

at::Tensor cluster_sum(const at::Tensor& rows, const at::Tensor& order, const at::Tensor& offsets,
                       bool mean) {
  check_cluster_sum(rows, order, offsets);
  const c10::cuda::CUDAGuard guard(rows.device());
  const at::Tensor values = rows.new_empty({offsets.size(0) - 1, rows.size(1)});
  launch_clusters(rows, values, order, offsets, mean, moe_comp_cluster_sum);
  return values;
}

at::Tensor cluster_broadcast(const at::Tensor& values, const at::Tensor& order,
                             const at::Tensor& offsets, bool mean) {
  check_cluster_broadcast(values, order, offsets);
  const c10::cuda::CUDAGuard guard(values.device());
  const at::Tensor rows = values.new_empty({order.size(0), values.size(1)});
  launch_clusters(rows, values, order, offsets, mean, moe_comp_cluster_broadcast);
  return rows;
}

// Returns the keys that a launcher writes, which has `shared` coordinates of a row at once.
at::Tensor hash(const at::Tensor& rows, const at::Tensor& rotation, int64_t num_coordinates,
                int64_t block_size, int64_t shared,
                cudaError_t (*launch)(const HashCall*, cudaStream_t)) {
  TORCH_CHECK_VALUE(rows.is_cuda(), "rows must be on a CUDA device, not on ", rows.device());
  TORCH_CHECK_VALUE(rows.size(1) <= kMaxHidden, "rows must have at most ", kMaxHidden,
                    " columns, not ", rows.size(1));
  TORCH_CHECK_VALUE(shared <= kMaxCoordinates, "the rotations must have at most ", kMaxCoordinates,
                    " coordinates on a CUDA device, not ", shared,
                    ": use fewer, or rows with fewer columns");
  const c10::cuda::CUDAGuard guard(rows.device());
  const at::Tensor source = has_kernel(rows) ? rows : rows.to(at::kFloat);
  const at::Tensor factors = rotation.contiguous();
  const at::Tensor keys = rows.new_empty({rows.size(0)}, rows.options().dtype(at::kLong));
  HashCall call = {};
  call.rows = source.const_data_ptr();
  call.num_rows = rows.size(0);
  call.hidden = rows.size(1);
  call.rotation = factors.const_data_ptr<float>();
  call.columns = factors.size(-1);
  call.num_coordinates = num_coordinates;
  call.block_size = block_size;
  call.keys = keys.mutable_data_ptr<int64_t>();
  call.row_type = row_type_of(source);
  C10_CUDA_CHECK(launch(&call, c10::cuda::getCurrentCUDAStream()));
  return keys;
}

at::Tensor hadamard_hash(const at::Tensor& rows, const at::Tensor& signs, int64_t num_coordinates,
                         int64_t block_size) {
  check_hadamard(rows, signs, num_coordinates, block_size);
  const int64_t size = signs.size(2);
  return hash(rows, signs, num_coordinates, block_size, (num_coordinates + size - 1) / size * size,
              moe_comp_hadamard_hash);
}

at::Tensor dense_hash(const at::Tensor& rows, const at::Tensor& directions, int64_t num_coordinates,
                      int64_t block_size) {
  check_dense(rows, directions, num_coordinates, block_size);
  return hash(rows, directions, num_coordinates, block_size, num_coordinates, moe_comp_dense_hash);
}

}  // namespace
}  // namespace moe_comp

TORCH_LIBRARY_IMPL(megatron_moe_comp, CUDA, library) {
  library.impl("quantize_pack", moe_comp::quantize_pack);
  library.impl("unpack_dequantize", moe_comp::unpack_dequantize);
  library.impl("unpack_dithered", moe_comp::unpack_dithered);
  library.impl("gaussian_pack", moe_comp::gaussian_pack);
  library.impl("gaussian_unpack", moe_comp::gaussian_unpack);
  library.impl("cluster_sum", moe_comp::cluster_sum);
  library.impl("cluster_broadcast", moe_comp::cluster_broadcast);
  library.impl("hadamard_hash", moe_comp::hadamard_hash);
  library.impl("dense_hash", moe_comp::dense_hash);
}

PyMODINIT_FUNC PyInit__kernels_cuda() {
  static PyModuleDef module = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "_kernels_cuda"};
  return PyModule_Create(&module);
}
